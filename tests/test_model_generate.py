"""Generation equals picking tokens from full passes, and its filters keep exactly what they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.generate import Sampling, generate, sample, stream
from model.lm import MoELanguageModel

GREEDY = Sampling(max_new_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def model() -> MoELanguageModel:
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=23, dim=16, num_layers=2, num_heads=2, num_experts=3, expert_dim=8, max_seq_len=16,
        init_std=0.4,
    )  # fmt: skip
    return MoELanguageModel(config)


def _prompt(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(0))


def _greedy_without_cache(model: MoELanguageModel, ids_BS: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        ids_BS = torch.cat((ids_BS, model(ids_BS).logits_BSV[:, -1:].argmax(dim=-1)), dim=1)
    return ids_BS[:, -steps:]


def test_greedy_equals_full_passes(model: MoELanguageModel) -> None:
    assert torch.equal(generate(model, _prompt(), GREEDY), _greedy_without_cache(model, _prompt(), 6))


def test_left_padding_changes_no_text(model: MoELanguageModel) -> None:
    short, long = _prompt(1, 3), _prompt(1, 5)
    batch = torch.cat((torch.cat((torch.zeros(1, 2, dtype=torch.int64), short), dim=1), long))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    together = generate(model, batch, GREEDY, attention_mask_BS=mask)
    assert torch.equal(together, torch.cat([generate(model, prompt, GREEDY) for prompt in (short, long)]))


def test_same_seed_same_text_and_no_other_random_numbers_are_touched(model: MoELanguageModel) -> None:
    before = torch.random.get_rng_state()
    texts = [generate(model, _prompt(), Sampling(max_new_tokens=8, seed=seed)) for seed in (3, 3, 4)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stops_when_every_sequence_has_ended(model: MoELanguageModel) -> None:
    free = generate(model, _prompt(), Sampling(max_new_tokens=8, temperature=0))
    eos = int(free[0, 2])
    ended = generate(model, _prompt(), Sampling(max_new_tokens=8, temperature=0, eos_id=eos))
    for row, whole in zip(ended.tolist(), free.tolist(), strict=True):
        stop = whole.index(eos) + 1 if eos in whole else len(whole)
        assert row[:stop] == whole[: min(stop, len(row))]
        assert set(row[stop:]) <= {eos}
    lengths = [row.index(eos) + 1 if eos in row else 8 for row in free.tolist()]
    assert ended.shape[1] == max(lengths)


def test_stops_at_the_longest_sequence_the_model_takes(model: MoELanguageModel) -> None:
    assert generate(model, _prompt(), Sampling(max_new_tokens=99)).shape == (2, 11)


def test_callback_sees_each_token_as_it_is_made(model: MoELanguageModel) -> None:
    seen: list[Tensor] = []
    text = generate(model, _prompt(), GREEDY, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), text)
    assert torch.equal(torch.stack(list(stream(model, _prompt(), GREEDY)), dim=1), text)


def test_a_training_model_is_still_training_between_tokens(model: MoELanguageModel) -> None:
    model.train()
    for _ in stream(model, _prompt(), GREEDY):
        assert model.training
        assert torch.is_grad_enabled()


LOGITS = torch.log(torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1]]))


def _frequencies(sampling: Sampling) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = sample(LOGITS.expand(20_000, 5), sampling, generator)
    return ids.bincount(minlength=5) / 20_000


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.05, 0.4, 0.3, 0.15, 0.1]),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(temperature=0.5), [0.0088, 0.5614, 0.3158, 0.0789, 0.0351]),  # squares, normalised
        (Sampling(top_k=2), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_k=99), [0.05, 0.4, 0.3, 0.15, 0.1]),
        (Sampling(top_p=0.6), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_p=0.71), [0, 0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0]),
        (Sampling(top_p=0.01), [0, 1, 0, 0, 0]),
        (Sampling(top_p=1.0), [0.05, 0.4, 0.3, 0.15, 0.1]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 3 / 7, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(sampling: Sampling, expected: list[float]) -> None:
    torch.testing.assert_close(_frequencies(sampling), torch.tensor(expected).float(), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is below 1"),
        ({"temperature": -1.0}, "temperature=-1.0 is negative"),
        ({"top_k": 0}, "top_k=0 is below 1"),
        ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
    ],
)
def test_sampling_errors(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)  # type: ignore[arg-type]


def test_prompt_errors(model: MoELanguageModel) -> None:
    with pytest.raises(ValueError, match=r"16 tokens and max_seq_len=16 leaves no room; shorten"):
        generate(model, _prompt(1, 16))
    with pytest.raises(ValueError, match="0 tokens; give at least one"):
        generate(model, _prompt(1, 0))
