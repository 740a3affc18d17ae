"""Several tokens for one pass of the model: its own modules for further tokens draft them, the model judges all.

Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192) with the drafts of multi-token prediction
(DeepSeek-V3, arXiv:2412.19437). Behind the newest token each module drafts one more from what it makes likely, q;
the model reads them in one pass and has p for each. A draft is kept with probability min(1, p/q), and the first that
is not is replaced by a draw from max(0, p - q): what is written follows p whatever was drafted. At temperature 0 it
is the text that the model writes alone, up to ties within rounding: several positions are read in one pass.

A batch goes on together: a draft is kept where every sequence that has not ended keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.endings import Endings
from model.kv_cache import KVCache
from model.lm import MoELanguageModel
from model.sampling import Sampling, draw, probabilities


@dataclass(kw_only=True)
class Drafts:
    """Hand one to `generate` or `stream` to have tokens drafted, and read from it what became of them."""

    at_once: int | None = None
    """Tokens drafted at once at most. None: one for each module of the model."""
    proposed: int = 0
    """Tokens drafted, in sequences that had not ended."""
    accepted: int = 0
    """Of those, kept."""
    passes: int = 0
    """Passes of the model behind the prompt."""
    tokens: int = 0
    """Tokens of a sequence that those passes gave."""

    def __post_init__(self) -> None:
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(f"at_once={self.at_once} is below 1; leave the drafts out to write without")

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were kept; 0 without any."""
        return self.accepted / max(self.proposed, 1)

    @property
    def tokens_per_pass(self) -> float:
        """1 without drafts, 1 + the number of modules at best."""
        return self.tokens / max(self.passes, 1)


@dataclass
class Text:
    """What has been written, and what is known of it."""

    ids_BT: Tensor
    mask_BT: Tensor | None
    """0 at padding."""
    seen_BV: Tensor
    endings: Endings

    def add(self, ids_B: Tensor) -> Tensor:
        """Write one token of every sequence; returns it, with ended sequences marked."""
        ids_B = self.endings.mark(ids_B)
        self.ids_BT = torch.cat((self.ids_BT, ids_B[:, None]), dim=1)
        if self.mask_BT is not None:
            self.mask_BT = torch.cat((self.mask_BT, self.mask_BT.new_ones(len(ids_B), 1)), dim=1)
        self.seen_BV.scatter_(1, ids_B[:, None], True)
        return ids_B

    def mask_of(self, length: int) -> Tensor | None:
        """The mask of the first `length` positions; drafts behind the text are no padding."""
        if self.mask_BT is None:
            return None
        missing = max(0, length - self.mask_BT.shape[1])
        ones = self.mask_BT.new_ones(len(self.mask_BT), missing)
        return torch.cat((self.mask_BT, ones), dim=1)[:, :length].bool()


def check_drafts(model: MoELanguageModel, cache: KVCache | None) -> None:
    """Raise ValueError where drafts cannot be had, or could not be taken back."""
    if model.mtp is None:
        raise ValueError(
            "this model has no modules for further tokens that could draft; train one with mtp_depth=1, or write "
            "without drafts"
        )
    if not model.config.is_causal():
        raise ValueError(
            "drafts do not fit a model whose experts depend on later tokens: reading several at once, it would "
            "choose others; write without drafts"
        )
    if cache is not None and not cache.goes_back:
        raise ValueError(
            "drafts need a cache that can go back to what was kept; make it with bounded=False and no eviction"
        )
    if cache is not None and cache.length:
        raise ValueError(
            f"the cache holds {cache.length} tokens that the drafting modules have not read; give the whole prompt"
        )


class Draft(NamedTuple):
    """One drafted token of every sequence."""

    ids_B: Tensor
    probs_BV: Tensor
    """What it was drawn from, q."""


def speculate(
    model: MoELanguageModel,
    text: Text,
    sampling: Sampling,
    generator: torch.Generator,
    cache: KVCache,
    drafts: Drafts,
    steps: int,
    prefill_chunk: int | None = None,
) -> Iterator[Tensor]:
    """`model.generate.stream` with drafts; `steps` tokens of every sequence at most.

    `text` holds the prompts, `cache` is empty, and `check_drafts` found nothing wrong.
    """
    drafter = Drafter(model, cache, len(text.ids_BT))
    logits_BV = drafter.read_prompt(text, cache.prefill_chunk if prefill_chunk is None else prefill_chunk)
    yield text.add(draw(probabilities(logits_BV, sampling, text.seen_BV), generator))
    done = 1
    while done < steps and not text.endings.all_ended:
        at_most = min(steps - done - 1, drafts.at_once or steps)
        drafted = drafter.propose(text, sampling, generator, at_most)
        logits_BSV = drafter.read(text, drafted)
        drafts.proposed += int((~text.endings.ended_B).sum()) * len(drafted)
        written, accepted = _judged(text, drafted, logits_BSV, sampling, generator)
        drafter.settle(len(written))
        drafts.accepted += accepted
        drafts.passes += 1
        drafts.tokens += len(written)
        done += len(written)
        yield from written


def _judged(
    text: Text, drafted: list[Draft], logits_BSV: Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[list[Tensor], int]:
    """What is written after one pass, a token of every sequence each, and how many drafts are among it."""
    written, accepted = [], 0
    for place in range(len(drafted) + 1):
        live_B = ~text.endings.ended_B
        probs_BV = probabilities(logits_BSV[:, place], sampling, text.seen_BV)
        ids_B, kept_B = judge(probs_BV, drafted[place] if place < len(drafted) else None, generator)
        written.append(text.add(ids_B))
        accepted += int((kept_B & live_B).sum())
        if text.endings.all_ended or not bool((kept_B | ~live_B).all()):
            break
    return written, accepted


def judge(probs_BV: Tensor, draft: Draft | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A token distributed as `probs_BV` for every sequence, int64 [B], and whether it is the draft, bool [B].

    Without a draft it is drawn. With one, the draft is kept with probability min(1, p/q); if not, the token is
    drawn from max(0, p - q), so that over both cases it follows p.
    """
    if draft is None:
        ids_B = draw(probs_BV, generator)
        return ids_B, torch.zeros_like(ids_B, dtype=torch.bool)
    p_B, q_B = (x.gather(-1, draft.ids_B[:, None]).squeeze(1) for x in (probs_BV, draft.probs_BV))
    luck_B = torch.rand(len(p_B), generator=generator, device=p_B.device)
    kept_B = luck_B * q_B < p_B
    if bool(kept_B.all()):
        return draft.ids_B, kept_B
    rest_BV = (probs_BV - draft.probs_BV).clamp_min(0)
    # Where p is q nothing is left over, and the draft was kept; rounding may leave nothing elsewhere too.
    rest_BV = torch.where(rest_BV.sum(dim=-1, keepdim=True) > 0, rest_BV, probs_BV)
    return torch.where(kept_B, draft.ids_B, draw(rest_BV, generator)), kept_B


class Drafter:
    """The model, its drafting modules, and what each has read.

    Position i of module k stands for the tokens i, i + k and i + k + 1. What it read of drafts that were not kept is
    forgotten, and read again with what was written instead.
    """

    def __init__(self, model: MoELanguageModel, cache: KVCache, batch_size: int) -> None:
        assert model.mtp is not None
        self._model, self._modules, self._cache = model, model.mtp, cache
        latent = model.config.attention == "latent"
        self._chunk = model.config.latents.latent_chunk if latent else None
        like = model.model.embed_tokens.weight
        self._caches = self._modules.caches(batch_size, cache.max_length, like)
        self._states = [_States() for _ in self._modules]
        """What each module reads: states of the one before it, of the model for the first."""

    def read_prompt(self, text: Text, chunk: int) -> Tensor:
        """Logits behind the prompt, [B, V]."""
        if chunk < 1:
            raise ValueError(f"prefill_chunk={chunk} is below 1; None reads the prompt at once")
        for ids_BS in text.ids_BT.split(chunk, dim=1):
            logits_BSV = self._read(ids_BS, text, 1)
        return logits_BSV[:, -1]

    def propose(
        self, text: Text, sampling: Sampling, generator: torch.Generator, at_most: int
    ) -> list[Draft]:
        """Tokens behind the newest one, `at_most` and at most one for each module."""
        read, ids_BT, seen_BV = self._cache.length, text.ids_BT, text.seen_BV
        drafted: list[Draft] = []
        for depth in range(1, 1 + self._room(read, at_most)):
            module, cache = self._modules[depth - 1], self._caches[depth - 1]
            states = self._states[depth - 1]
            first = cache.length
            with _evaluating(self._model):
                hidden_BSD = module(
                    states.since(first),
                    self._model.model.embed_tokens(ids_BT[:, first + depth : read + depth]),
                    text.mask_of(read),
                    cache=cache,
                )
                logits_BSV = self._model.lm_head(hidden_BSD[:, -1:]).logits_BSV
            if depth < len(self._states):
                self._states[depth].put(first, hidden_BSD)
            probs_BV = probabilities(logits_BSV[:, -1], sampling, seen_BV)
            drafted.append(Draft(draw(probs_BV, generator), probs_BV))
            ids_B1 = drafted[-1].ids_B[:, None]
            ids_BT, seen_BV = torch.cat((ids_BT, ids_B1), dim=1), seen_BV.scatter(1, ids_B1, True)
        return drafted

    def read(self, text: Text, drafted: list[Draft]) -> Tensor:
        """Logits behind the newest token and behind every draft, [B, 1 + drafts, V]."""
        ids_BS = torch.stack([text.ids_BT[:, -1], *(each.ids_B for each in drafted)], dim=1)
        self._before = self._cache.length
        return self._read(ids_BS, text, ids_BS.shape[1])

    def settle(self, written: int) -> None:
        """Go back to where `written` tokens were added to what had been read: all of them but the last are read."""
        read = self._before + written
        self._cache.truncate(read)
        self._states[0].cut(read)
        for depth, cache in enumerate(self._caches, start=1):
            kept = max(0, min(cache.length, read - depth))
            cache.truncate(kept)
            if depth < len(self._states):
                self._states[depth].cut(kept)

    def _room(self, read: int, at_most: int) -> int:
        """Drafts that can be taken back. Two-stage latents do not give back what a closed chunk told them."""
        most = max(0, min(at_most, len(self._modules)))
        if self._chunk is None:
            return most
        most = min(most, self._chunk - 1 - (read + 1) % self._chunk)
        # Module k may go back from `read` positions to read + 1 - k.
        return min(most, read % self._chunk + 1)

    def _read(self, ids_BS: Tensor, text: Text, keep: int) -> Tensor:
        first, total = self._cache.length, self._cache.length + ids_BS.shape[1]
        with _evaluating(self._model):
            hidden_BSD = self._model.model(ids_BS, text.mask_of(total), self._cache).hidden_BSD
            logits_BSV = self._model.lm_head(hidden_BSD[:, -keep:]).logits_BSV
        self._states[0].put(first, hidden_BSD)
        return logits_BSV


class _States:
    """States of positions, [B, S, D], from the first that is still needed."""

    def __init__(self) -> None:
        self._first, self._states_BSD = 0, torch.zeros(0)

    def put(self, first: int, states_BSD: Tensor) -> None:
        """In place of those from `first` on."""
        if self._states_BSD.dim() == 3:
            states_BSD = torch.cat((self._states_BSD[:, : first - self._first], states_BSD), dim=1)
            first = self._first
        self._first, self._states_BSD = first, states_BSD

    def since(self, first: int) -> Tensor:
        """Those from `first` on; nothing before it is needed any more."""
        self._states_BSD = self._states_BSD[:, first - self._first :]
        self._first = first
        return self._states_BSD

    def cut(self, end: int) -> None:
        """Forget those from `end` on."""
        if self._states_BSD.dim() == 3:
            self._states_BSD = self._states_BSD[:, : max(0, end - self._first)]


@contextmanager
def _evaluating(model: MoELanguageModel) -> Iterator[None]:
    """Without gradients, in evaluation mode, and back."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.train()
