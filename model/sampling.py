"""Which token comes next: filters on the logits of one position, and a draw from what they leave.

The order is that of transformers: repetition penalty, temperature, top_k, top_p, min_p. Every filter keeps
the most likely token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.sampling_config import Sampling

__all__ = ["Sampling", "draw", "probabilities", "sample"]


def sample(
    logits_BV: Tensor, sampling: Sampling, generator: torch.Generator, seen_BV: Tensor | None = None
) -> Tensor:
    """Draw one token id per row, int64 [B]. `seen_BV` is True for tokens that are in the text already."""
    if sampling.temperature == 0:
        return _penalised(logits_BV, sampling, seen_BV).argmax(dim=-1)
    return draw(probabilities(logits_BV, sampling, seen_BV), generator)


def probabilities(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None = None) -> Tensor:
    """What `sample` draws from, float32 [B, V]; all on the most likely token where temperature is 0."""
    logits_BV = _penalised(logits_BV, sampling, seen_BV)
    if sampling.temperature == 0:
        best_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits_BV, dtype=torch.float32).scatter_(-1, best_B1, 1.0)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None:
        logits_BV = _keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = _keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        logits_BV = _keep_min_p(logits_BV, sampling.min_p)
    return logits_BV.softmax(dim=-1)


def draw(probs_BV: Tensor, generator: torch.Generator) -> Tensor:
    """One id per row, int64 [B]; rows need not sum to 1."""
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(1)


def _penalised(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None) -> Tensor:
    """Towards minus infinity where a token was seen: a positive logit is divided, a negative one multiplied."""
    if seen_BV is None or sampling.repetition_penalty == 1:
        return logits_BV
    penalty = sampling.repetition_penalty
    lower_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, lower_BV, logits_BV)


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


def _keep_min_p(logits_BV: Tensor, p: float) -> Tensor:
    probs = logits_BV.softmax(dim=-1)
    return logits_BV.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), float("-inf"))
