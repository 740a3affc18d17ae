"""Sampling from a model, one token for each sequence of a batch at a time, with a key/value cache.

`stream` is the whole algorithm, an iterator; `generate` collects it. Random numbers come from a generator of
their own, so that sampling in the middle of a training run changes nothing in that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.lm import MoELanguageModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Filters apply in the order temperature, top_k, top_p."""

    max_new_tokens: int = 64
    """Tokens to add at most; the model's max_seq_len is a limit as well."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Choose among the k most likely tokens only."""
    top_p: float | None = None
    """Choose among the fewest most likely tokens whose probabilities reach this sum (Holtzman et al.

    2020).
    """
    seed: int = 0
    """Same seed, same text."""
    eos_id: int | None = None
    """Token that ends a sequence. None: never ends early."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is below 1; ask for at least one token")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is below 1; give 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 1 or None keeps all tokens")


def stream(
    model: MoELanguageModel,
    prompt_ids_BS: Tensor,
    sampling: Sampling | None = None,
    *,
    attention_mask_BS: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, int64 [B], until all have ended or nothing more is allowed.

    Prompts of different lengths are padded on the left, with 0 in `attention_mask_BS`. A sequence that has
    ended goes on yielding `eos_id`. The model is put into evaluation mode for each step and back afterwards.

    Raises ValueError when the prompt is empty or leaves no room below max_seq_len.
    """
    sampling = sampling or Sampling()
    batch, length = prompt_ids_BS.shape
    steps = min(sampling.max_new_tokens, _room_after(model, length))
    device = prompt_ids_BS.device
    cache = KVCache(
        model.config, batch_size=batch, max_length=length + steps, device=device, dtype=model.dtype
    )
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    ended_B = torch.zeros(batch, dtype=torch.bool, device=device)
    ids_BS, mask_BC = prompt_ids_BS, attention_mask_BS
    for _ in range(steps):
        ids_B = sample(_next_logits(model, ids_BS, mask_BC, cache), sampling, generator)
        if sampling.eos_id is not None:
            ids_B = ids_B.masked_fill(ended_B, sampling.eos_id)
            ended_B = ended_B | (ids_B == sampling.eos_id)
        yield ids_B
        if bool(ended_B.all()):
            return
        ids_BS = ids_B[:, None]
        if mask_BC is not None:
            mask_BC = torch.cat((mask_BC, mask_BC.new_ones(batch, 1)), dim=1)


def generate(
    model: MoELanguageModel,
    prompt_ids_BS: Tensor,
    sampling: Sampling | None = None,
    *,
    attention_mask_BS: Tensor | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The new tokens of every sequence, int64 [B, new]; `on_token` sees each step's [B] as it is made."""
    columns = []
    for ids_B in stream(model, prompt_ids_BS, sampling, attention_mask_BS=attention_mask_BS):
        if on_token is not None:
            on_token(ids_B)
        columns.append(ids_B)
    return torch.stack(columns, dim=1)


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token id per row, int64 [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = _keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = _keep_top_p(logits_BV, sampling.top_p)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator).squeeze(1)


def _keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    values, ids = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1)
    return torch.full_like(logits_BV, float("-inf")).scatter(-1, ids, values)


def _keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    values, ids = logits_BV.sort(dim=-1, descending=True)
    probs = values.softmax(dim=-1)
    # A token stays while the sum of the more likely ones is below p: the one that crosses it is last.
    before = probs.cumsum(dim=-1) - probs
    kept = values.masked_fill(before >= p, float("-inf"))
    return torch.full_like(logits_BV, float("-inf")).scatter(-1, ids, kept)


def _room_after(model: MoELanguageModel, length: int) -> int:
    """Tokens that fit behind a prompt of `length`, at least 1."""
    longest = model.config.max_seq_len
    if length == 0:
        raise ValueError("the prompt has 0 tokens; give at least one, for example the end-of-text token")
    if length >= longest:
        raise ValueError(
            f"the prompt has {length} tokens and max_seq_len={longest} leaves no room; shorten the prompt"
        )
    return longest - length


@torch.no_grad()
def _next_logits(model: MoELanguageModel, ids_BS: Tensor, mask_BC: Tensor | None, cache: KVCache) -> Tensor:
    training = model.training
    model.eval()
    try:
        logits_BSV = model(ids_BS, attention_mask_BS=mask_BC, cache=cache).logits_BSV
    finally:
        model.train(training)
    assert logits_BSV is not None
    return logits_BSV[:, -1]
