"""Generation equals picking tokens from full passes, and its filters keep exactly what they promise."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.attention_config import LatentConfig, ReachConfig
from model.config import ModelConfig, RouterConfig
from model.generate import NonCausalWarning, before_stop, generate, stream
from model.kv_cache import KVCache
from model.kv_eviction import HeavyHitters, SinksAndRecent
from model.lm import MoELanguageModel
from model.sampling import Sampling, sample

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
        (Sampling(min_p=0.7), [0, 4 / 7, 3 / 7, 0, 0]),
        (Sampling(min_p=1.0), [0, 1, 0, 0, 0]),
        (Sampling(min_p=0.0), [0.05, 0.4, 0.3, 0.15, 0.1]),
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
        ({"min_p": 1.5}, r"min_p=1.5 is not in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is not positive"),
        ({"stop": ("a", "")}, "has an empty text"),
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


def test_filters_equal_transformers_in_its_order() -> None:
    """Same support and probabilities, all filters on at once; draws follow them."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(1, 12, generator=generator) * 2
    text_BS = torch.tensor([[3, 7, 7, 1]])
    theirs = logits_BV
    for process in (
        RepetitionPenaltyLogitsProcessor(1.7),
        TemperatureLogitsWarper(1.3),
        TopKLogitsWarper(9),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.12),
    ):
        theirs = process(text_BS, theirs)
    expected = theirs.softmax(-1)[0]
    assert 1 < int((expected > 0).sum()) < 9
    sampling = Sampling(temperature=1.3, top_k=9, top_p=0.9, min_p=0.12, repetition_penalty=1.7)
    seen_BV = torch.zeros(1, 12, dtype=torch.bool).scatter_(1, text_BS, True)
    ids = sample(logits_BV.expand(40_000, 12), sampling, generator, seen_BV.expand(40_000, 12))
    frequencies = ids.bincount(minlength=12) / 40_000
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.01)
    assert not bool(frequencies[expected == 0].any())


def test_the_penalty_covers_prompt_and_new_text(model: MoELanguageModel) -> None:
    """A penalty without end never repeats a token, and greedy text shows it."""
    sampling = Sampling(max_new_tokens=10, temperature=0, repetition_penalty=1e9)
    prompt = _prompt()
    for row, text in zip(prompt.tolist(), generate(model, prompt, sampling).tolist(), strict=True):
        assert len(set(text)) == 10
        assert not set(text) & set(row)


def _letters(ids: list[int]) -> str:
    return "".join(chr(ord("a") + i) for i in ids)


def test_a_stop_text_ends_a_sequence_also_across_tokens(model: MoELanguageModel) -> None:
    free = generate(model, _prompt(), Sampling(max_new_tokens=10, temperature=0))
    texts = [_letters(row) for row in free.tolist()]
    stop = texts[0][3:5]
    ended = generate(
        model, _prompt(), Sampling(max_new_tokens=10, temperature=0, stop=(stop, "never")), decode=_letters
    )
    for row, text in zip(ended.tolist(), texts, strict=True):
        end = text.find(stop) + 2 if stop in text else 10
        assert _letters(row)[:end] == text[:end]
        assert set(row[end:]) <= {0}
        assert before_stop(_letters(row), [stop]) == before_stop(text, [stop])
    assert ended.shape[1] == max(text.find(stop) + 2 if stop in text else 10 for text in texts)


def test_a_stop_text_needs_a_decoder(model: MoELanguageModel) -> None:
    with pytest.raises(ValueError, match=r"without decode; hand over decode=tokenizer.decode"):
        generate(model, _prompt(), Sampling(stop=("a",)))


def test_before_stop_takes_the_first_of_several() -> None:
    assert before_stop("one two three", ["three", "two"]) == "one "
    assert before_stop("one", ["two"]) == "one"


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_reading_the_prompt_in_pieces_changes_no_text(
    model: MoELanguageModel, chunk: int, padded: bool
) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]) if padded else None
    whole = generate(model, _prompt(), GREEDY, attention_mask_BS=mask)
    pieces = generate(model, _prompt(), GREEDY, attention_mask_BS=mask, prefill_chunk=chunk)
    assert torch.equal(pieces, whole)


def test_a_cache_goes_on_where_it_stopped(model: MoELanguageModel) -> None:
    cache = KVCache(model.config, batch_size=2)
    first = generate(model, _prompt(), Sampling(max_new_tokens=2, temperature=0), cache=cache)
    assert cache.length == 6  # the last token was not read
    second = generate(model, first[:, -1:], Sampling(max_new_tokens=4, temperature=0), cache=cache)
    assert torch.equal(torch.cat((first, second), dim=1), generate(model, _prompt(), GREEDY))


@pytest.mark.parametrize("eviction", [SinksAndRecent(sinks=2, recent=6), HeavyHitters(heavy=4, recent=4)])
def test_a_forgetting_cache_writes_past_the_trained_length(model: MoELanguageModel, eviction: Any) -> None:
    cache = KVCache(model.config, batch_size=2, eviction=eviction)
    before = cache.num_bytes
    prompt = _prompt(2, 30)  # longer than max_seq_len=16: read in pieces of 8
    text = generate(model, prompt, Sampling(max_new_tokens=20, temperature=0), cache=cache)
    assert text.shape == (2, 20)
    assert cache.length == 49 > 3 * model.config.max_seq_len
    assert cache.layers[0].num_held == 8
    assert cache.num_bytes <= before + 2 * 2 * 2 * 8 * 12


@pytest.mark.parametrize("storage", ["int8", "mapped"])
def test_other_storage_writes_the_same_text(model: MoELanguageModel, storage: Any, tmp_path: Any) -> None:
    folder = tmp_path if storage == "mapped" else None
    cache = KVCache(model.config, batch_size=2, storage=storage, folder=folder)
    assert torch.equal(generate(model, _prompt(), GREEDY, cache=cache), generate(model, _prompt(), GREEDY))


@pytest.mark.parametrize(
    "attention",
    [
        {"attention": "latent", "latents": LatentConfig(num_latents=2, latent_chunk=4)},
        {"reach": ReachConfig(window=4, sink_tokens=1)},
        {"reach": ReachConfig(sparsity="blocks", sparse_block=2)},
    ],
)
def test_padding_is_refused_where_it_would_change_the_text(attention: dict[str, Any]) -> None:
    config = ModelConfig(
        vocab_size=23, dim=16, num_layers=1, num_heads=2, num_experts=2, expert_dim=4, **attention
    )
    other = MoELanguageModel(config)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"padding on the left moves .*generate prompts of one length"):
        generate(other, _prompt(), GREEDY, attention_mask_BS=mask)
    assert generate(other, _prompt(), GREEDY, attention_mask_BS=torch.ones(2, 5)).shape == (2, 6)


def test_a_cache_without_room_says_so(model: MoELanguageModel) -> None:
    with pytest.raises(ValueError, match=r"5 tokens and the cache's max_length=5 leaves no room"):
        generate(model, _prompt(), cache=KVCache(model.config, batch_size=2, max_length=5))
    with pytest.raises(ValueError, match="prefill_chunk=0 is below 1"):
        generate(model, _prompt(), prefill_chunk=0)


def test_a_model_that_looks_ahead_says_so(model: MoELanguageModel) -> None:
    config = ModelConfig(
        vocab_size=23, dim=16, num_layers=1, num_heads=2, num_experts=2, expert_dim=4,
        router=RouterConfig(chooser="expert"),
    )  # fmt: skip
    assert not config.is_causal()
    with pytest.warns(NonCausalWarning, match="not causal"):
        generate(MoELanguageModel(config), _prompt(), GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, _prompt(), GREEDY)


def test_one_long_text_equals_full_passes() -> None:
    """A single sequence on a CPU has ways of its own: expert by expert, and logits by columns."""
    torch.manual_seed(2)
    config = ModelConfig(
        vocab_size=23, dim=16, num_layers=2, num_heads=2, num_experts=5, top_k=3, expert_dim=8, max_seq_len=40,
        init_std=0.4,
    )  # fmt: skip
    model, long = MoELanguageModel(config), Sampling(max_new_tokens=30, temperature=0)
    assert torch.equal(generate(model, _prompt(1), long), _greedy_without_cache(model, _prompt(1), 30))


def test_logits_are_read_from_the_weight_again_after_a_text(model: MoELanguageModel) -> None:
    """Also between two tokens of one, where a training step may change it."""
    ids_BS = _prompt(1)
    text = stream(model, ids_BS, Sampling(max_new_tokens=18, temperature=0), cache=_roomy(model))
    next(text)
    next(text)
    logits = model(ids_BS).logits_BSV
    assert logits is not None
    logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


def _roomy(model: MoELanguageModel) -> KVCache:
    """A cache that forgets, so that a text may be longer than the context."""
    return KVCache(model.config, batch_size=1, eviction=SinksAndRecent(sinks=1, recent=12))


def test_only_the_logits_asked_for(model: MoELanguageModel) -> None:
    every, last = model(_prompt()).logits_BSV, model(_prompt(), logits_to_keep=2).logits_BSV
    assert every is not None
    torch.testing.assert_close(last, every[:, -2:])
