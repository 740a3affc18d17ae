"""Drafts change how many passes a text takes and nothing about the text: the same tokens, or the same distribution."""

from __future__ import annotations

import itertools
from functools import cache as memoised
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.speculative
from model.attention_config import LatentConfig, MLAConfig, ReachConfig, RopeConfig
from model.block_config import BlockConfig
from model.config import ModelConfig, RouterConfig
from model.generate import Drafts, Sampling, generate, stream
from model.head_config import HeadConfig
from model.kv_cache import KVCache
from model.kv_eviction import SinksAndRecent
from model.lm import MoELanguageModel
from model.sampling import probabilities
from model.speculative import Draft, Drafter, Text, judge

VOCAB, LENGTH = 11, 5
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "dim": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 40}
SMALL |= {"num_experts": 4, "expert_dim": 6, "init_std": 0.2}
MLA = MLAConfig(q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2, "qk_norm": "head", "rope": RopeConfig(rotary_share=0.5)},
    "windowed": {"reach": ReachConfig(window=3, global_every=2, sink_tokens=1), "tie_embeddings": True},
    "pattern": {"reach": ReachConfig(sparsity="fixed", sparse_block=3, head_sinks=True), "first_dense_layers": 1},
    "mla": {"attention": "mla", "mla": MLA},
    "latent": {"attention": "latent", "latents": LatentConfig(num_latents=3, latent_chunk=4)},
    "gpt2": {"block": BlockConfig(norm="layer", positions="learned", dense_layer="gelu")},
}  # fmt: skip
GREEDY = Sampling(max_new_tokens=30, temperature=0)


@memoised
def _trained(name: str, depth: int, steps: int = 40, **more: Any) -> MoELanguageModel:
    """Knows a little of a text in which a token is mostly followed by the one 3 places on: some drafts are right."""
    torch.manual_seed(0)
    heads = HeadConfig(mtp_depth=depth)
    lm = MoELanguageModel(ModelConfig(**{**SMALL, **CONFIGS[name], **more}, heads=heads)).double()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    vocab = lm.config.vocab_size
    for _ in range(steps):
        jumps = torch.where(torch.rand(4, 13) < 0.75, 3, torch.randint(vocab, (4, 13)))
        text_BS = jumps.cumsum(dim=1) % vocab
        out = lm(text_BS[:, :-1], text_BS[:, 1:])
        optimizer.zero_grad()
        (out.ce + out.aux["mtp"]).backward()
        optimizer.step()
    return lm.eval().requires_grad_(False)


def _prompt(batch: int = 1, length: int = LENGTH, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_most_likely_text_is_the_same(name: str, depth: int) -> None:
    lm, accepted = _trained(name, depth), 0
    for batch, length in ((1, LENGTH), (3, LENGTH), (1, 1), (2, 8)):
        prompt, drafts = _prompt(batch, length), Drafts()
        text = generate(lm, prompt, GREEDY, drafts=drafts)
        assert torch.equal(text, generate(lm, prompt, GREEDY))
        assert drafts.tokens == text.shape[1] - 1
        if batch == 1:
            assert drafts.tokens == drafts.passes + drafts.accepted
        accepted += drafts.accepted
        assert 0 <= drafts.acceptance <= 1
    assert accepted > 0


def test_drafts_that_are_right_save_their_passes() -> None:
    lm, drafts = _trained("grouped", 2, steps=150), Drafts()
    prompt = (torch.arange(LENGTH) * 3 % VOCAB)[None]
    text = generate(lm, prompt, Sampling(max_new_tokens=31, temperature=0), drafts=drafts)
    assert text[0].tolist() == [(3 * i) % VOCAB for i in range(LENGTH, LENGTH + 31)]
    assert (drafts.acceptance, drafts.passes, drafts.tokens_per_pass) == (1.0, 10, 3.0)
    fewer = Drafts(at_once=1)
    generate(lm, prompt, Sampling(max_new_tokens=31, temperature=0), drafts=fewer)
    assert fewer.tokens_per_pass == 2.0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_draft_is_what_whole_modules_without_a_cache_make_likely(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where drafts before it were not kept, and their traces had to go."""
    lm, depth = _trained(name, 3), 3
    modules = lm.mtp
    assert modules is not None
    sampling, seen = Sampling(max_new_tokens=25, seed=2), 0
    propose = Drafter.propose

    def checked(self: Drafter, text: Text, *args: Any) -> list[Draft]:
        nonlocal seen
        drafted = propose(self, text, *args)
        ids_BT = torch.cat((text.ids_BT, *(each.ids_B[:, None] for each in drafted)), dim=1)
        hidden_BSD = lm.model(text.ids_BT[:, :-1]).hidden_BSD
        for k, draft in enumerate(drafted, start=1):
            ahead_BS = ids_BT[:, k : hidden_BSD.shape[1] + k]
            hidden_BSD = modules[k - 1](hidden_BSD, lm.model.embed_tokens(ahead_BS))
            expected = probabilities(lm.lm_head(hidden_BSD).logits_BSV[:, -1], sampling)
            torch.testing.assert_close(draft.probs_BV, expected, rtol=1e-4, atol=1e-6)
            seen += 1
        return drafted

    monkeypatch.setattr(Drafter, "propose", checked)
    drafts = Drafts()
    generate(lm, _prompt(2), sampling, drafts=drafts)
    assert 0 < drafts.accepted < drafts.proposed
    assert seen == drafts.proposed // 2 > depth


def test_a_judged_token_follows_p_whatever_was_drafted() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.2, 0.0, 0.7])
    rows = 60_000
    draft = Draft(torch.multinomial(q, rows, replacement=True, generator=generator), q.expand(rows, 4))
    ids_B, kept_B = judge(p.expand(rows, 4), draft, generator)
    torch.testing.assert_close(ids_B.bincount(minlength=4) / rows, p, rtol=0, atol=0.008)
    # Kept: the sum of min(p, q).
    assert kept_B.double().mean().item() == pytest.approx(0.3, abs=0.008)
    assert torch.equal(ids_B[kept_B], draft.ids_B[kept_B])
    same, kept_B = judge(q.expand(rows, 4), draft, generator)
    assert bool(kept_B.all())
    assert same is draft.ids_B


NEW, TINY = 4, 3


def _exact(lm: MoELanguageModel, sampling: Sampling) -> Tensor:
    """Probability of each text of four tokens behind the prompt, from full passes: [TINY ** 3]."""
    texts = torch.tensor(list(itertools.product(range(TINY), repeat=NEW)))
    ids = torch.cat((_prompt(1, 2, TINY).expand(len(texts), -1), texts), dim=1)
    logits_BSV, result = lm(ids).logits_BSV, torch.ones(len(texts), dtype=torch.float64)
    for place in range(NEW):
        seen_BV = torch.zeros(len(texts), TINY, dtype=torch.bool).scatter_(1, ids[:, : 2 + place], True)
        probs_BV = probabilities(logits_BSV[:, 1 + place], sampling, seen_BV).double()
        result *= probs_BV.gather(1, texts[:, place : place + 1]).squeeze(1)
    return result


def _chi_square(texts_BS: Tensor, expected: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; texts seen less than five times on average are put together."""
    numbers = (texts_BS * torch.tensor([TINY**place for place in reversed(range(NEW))])).sum(dim=1)
    counts, means = numbers.bincount(minlength=TINY**NEW).double(), expected * len(texts_BS)
    rare = means < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    means = torch.cat((means[~rare], means[rare].sum()[None]))
    if means[-1] < 1e-9:
        assert counts[-1] == 0
        counts, means = counts[:-1], means[:-1]
    return float(((counts - means) ** 2 / means).sum()), len(means) - 1


def _many(lm: MoELanguageModel, sampling: dict[str, Any], runs: int, drafts: Drafts) -> Tensor:
    """Two sequences at a time: their texts must not depend on one another."""
    prompt = _prompt(1, 2, TINY).expand(2, -1)
    return torch.cat(
        [generate(lm, prompt, Sampling(**sampling, seed=seed), drafts=drafts) for seed in range(runs)]
    )


@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 1.4, "top_k": 2, "repetition_penalty": 1.6}], ids=["plain", "filtered"]
)
def test_drawn_texts_follow_the_distribution_of_plain_sampling(
    filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = _trained("grouped", 2, steps=0, vocab_size=TINY, init_std=0.5, num_layers=1)
    sampling = {"max_new_tokens": NEW, **filters}
    expected = _exact(lm, Sampling(**sampling))
    assert float(expected.sum()) == pytest.approx(1)

    def far(texts_BS: Tensor) -> bool:
        """Beyond what one of ten thousand right samplers reaches (Wilson and Hilferty's approximation)."""
        statistic, freedom = _chi_square(texts_BS, expected)
        limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
        return statistic > limit

    plain = generate(lm, _prompt(1, 2, TINY).expand(3000, -1), Sampling(**sampling))
    assert not far(plain)
    drafts = Drafts()
    assert not far(_many(lm, sampling, 350, drafts))
    assert 0.1 < drafts.acceptance < 0.95
    # The same test finds out a judge that keeps every draft.
    keep = lambda p, draft, g: (judge(p, draft, g)[0] if draft is None else draft.ids_B, torch.ones(2) > 0)  # noqa: E731
    monkeypatch.setattr(model.speculative, "judge", keep)
    assert far(_many(lm, sampling, 350, Drafts()))


@pytest.mark.parametrize("name", ["grouped", "mla"])
def test_left_padding_changes_no_text(name: str) -> None:
    lm = _trained(name, 3)
    short, long = _prompt(1, 3), _prompt(1, 5)
    batch = torch.cat((torch.cat((torch.zeros(1, 2, dtype=torch.int64), short), dim=1), long))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    together = generate(lm, batch, GREEDY, attention_mask_BS=mask, drafts=Drafts())
    assert torch.equal(together, torch.cat([generate(lm, prompt, GREEDY) for prompt in (short, long)]))


def test_texts_end_where_they_would_without() -> None:
    lm, prompt = _trained("grouped", 2), _prompt(3)
    free = generate(lm, prompt, GREEDY)
    letters = lambda ids: "".join(chr(97 + i) for i in ids)  # noqa: E731
    for ends in ({"eos_id": int(free[0, 3])}, {"stop": (letters(free[1, 2:4].tolist()),)}):
        sampling = Sampling(max_new_tokens=30, temperature=0, **ends)
        plain = generate(lm, prompt, sampling, decode=letters)
        drafted = generate(lm, prompt, sampling, decode=letters, drafts=Drafts())
        assert torch.equal(drafted, plain)


@pytest.mark.parametrize("chunk", [1, 2, 7])
@pytest.mark.parametrize("name", ["windowed", "latent"])
def test_reading_the_prompt_in_pieces_changes_no_text(name: str, chunk: int) -> None:
    lm, prompt = _trained(name, 3), _prompt(2, 7)
    pieces = generate(lm, prompt, GREEDY, prefill_chunk=chunk, drafts=Drafts())
    assert torch.equal(pieces, generate(lm, prompt, GREEDY))
    with pytest.raises(ValueError, match="prefill_chunk=0 is below 1"):
        generate(lm, prompt, GREEDY, prefill_chunk=0, drafts=Drafts())


def test_tokens_are_told_one_at_a_time_and_nothing_else_is_touched() -> None:
    lm, prompt = _trained("grouped", 2), _prompt(2)
    before = torch.random.get_rng_state()
    lm.train()
    columns = list(stream(lm, prompt, GREEDY, drafts=Drafts()))
    assert lm.training
    lm.eval()
    assert torch.equal(torch.stack(columns, dim=1), generate(lm, prompt, GREEDY))
    texts = [generate(lm, prompt, Sampling(seed=seed), drafts=Drafts()) for seed in (3, 3, 4)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_text_ends_with_the_context_also_in_the_middle_of_a_draft() -> None:
    lm = _trained("grouped", 3)
    for length in range(33, 40):
        text = generate(lm, _prompt(1, length), Sampling(max_new_tokens=99, temperature=0), drafts=Drafts())
        assert torch.equal(text, generate(lm, _prompt(1, length), Sampling(max_new_tokens=99, temperature=0)))
        assert length + text.shape[1] == 40
    for new in (1, 2, 3):
        drafts = Drafts()
        assert generate(lm, _prompt(), Sampling(max_new_tokens=new), drafts=drafts).shape == (1, new)
        assert drafts.tokens == new - 1


@pytest.mark.parametrize("storage", ["dense", "mapped"])
def test_a_cache_that_can_go_back_ends_with_what_was_kept(storage: Any, tmp_path: Path) -> None:
    lm, prompt = _trained("grouped", 3), _prompt(2)
    folder = tmp_path if storage == "mapped" else None
    cache = KVCache(lm.config, batch_size=2, storage=storage, folder=folder, dtype=torch.float64)
    assert torch.equal(
        generate(lm, prompt, GREEDY, cache=cache, drafts=Drafts()), generate(lm, prompt, GREEDY)
    )
    assert cache.length == LENGTH + 30 - 1


def test_what_cannot_be_drafted_or_taken_back_is_refused() -> None:
    lm = _trained("grouped", 2)
    plain = MoELanguageModel(ModelConfig(**SMALL))
    with pytest.raises(ValueError, match=r"no modules for further tokens .* mtp_depth=1"):
        generate(plain, _prompt(), drafts=Drafts())
    forgetful = KVCache(lm.config, batch_size=1, eviction=SinksAndRecent(recent=8), dtype=torch.float64)
    ring = KVCache(_trained("windowed", 3).config, batch_size=1, dtype=torch.float64)
    for model_, cache in ((lm, forgetful), (_trained("windowed", 3), ring)):
        with pytest.raises(ValueError, match=r"can go back .* bounded=False and no eviction"):
            generate(model_, _prompt(), cache=cache, drafts=Drafts())
    used = KVCache(lm.config, batch_size=1, dtype=torch.float64)
    generate(lm, _prompt(), Sampling(max_new_tokens=2), cache=used)
    with pytest.raises(ValueError, match="holds 6 tokens that the drafting modules have not read"):
        generate(lm, _prompt(), cache=used, drafts=Drafts())
    ahead = ModelConfig(**SMALL, router=RouterConfig(chooser="expert"), heads=HeadConfig(mtp_depth=1))
    with (
        pytest.warns(UserWarning, match="not causal"),
        pytest.raises(ValueError, match="experts depend on later tokens"),
    ):
        generate(MoELanguageModel(ahead), _prompt(), drafts=Drafts())
    with pytest.raises(ValueError, match="at_once=0 is below 1"):
        Drafts(at_once=0)
