"""Loss and accuracy on held-out text, domain by domain, on the same sequences every time.

Nothing here touches training: no gradient, no count for the balance bias, and the model is in evaluation
mode, in which probes sleep. Bits per byte do not depend on the tokenizer, so runs with different ones can be
compared; the token that ends a document costs bits and spells no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from model.lm import ModelOutput, MoELanguageModel
from trainer.data_batches import IGNORE, Batch, TokenBatches


class DomainLoss(NamedTuple):
    """What one domain's held-out sequences cost."""

    loss_nats: float
    """Mean over tokens."""
    bits_per_byte: float
    """NaN where the tokenizer is not known."""
    num_tokens: int
    accuracy: float = math.nan
    """Share of the tokens that were the most probable one."""

    @property
    def perplexity(self) -> float:
        """exp(loss): as many equally likely tokens would be as hard to tell."""
        return math.exp(self.loss_nats)


class Judged(Protocol):
    """What is evaluated: an engine in the middle of training, or a finished model."""

    @property
    def module(self) -> MoELanguageModel: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, input_ids_BS: Tensor, labels_BS: Tensor) -> ModelOutput: ...


@torch.no_grad()
def evaluate(
    engine: Judged, batches: TokenBatches, token_bytes_V: np.ndarray | None, sequences: int
) -> dict[str, DomainLoss]:
    """Loss of each domain that has held-out text. Every rank computes all of it, and must call it.

    Args:
        batches: the run's batches; their fixed validation windows are read.
        token_bytes_V: length of each token in bytes, from its tokenizer; None: no bits per byte.
        sequences: windows of each domain at most.
    """
    was_training = engine.module.training
    engine.module.eval()
    try:
        losses = {}
        for domain in batches.shards.domains:
            parts = [
                _cost(engine, batch, token_bytes_V)
                for batch in batches.validation(domain, num_tokens=sequences * batches.seq_len)
            ]
            if parts:
                losses[domain] = _mean(np.array(parts).sum(axis=0), token_bytes_V is not None)
        return losses
    finally:
        engine.module.train(was_training)


def _cost(engine: Judged, batch: Batch, token_bytes_V: np.ndarray | None) -> tuple[float, int, int, int]:
    """Nats, tokens, bytes and right guesses of one batch."""
    labels_BS = torch.from_numpy(batch.labels_BS).to(engine.device)
    output = engine.forward(torch.from_numpy(batch.input_ids_BS).to(engine.device), labels_BS)
    assert output.token_loss_BS is not None
    assert output.correct_BS is not None
    targets = batch.labels_BS[batch.labels_BS != IGNORE]
    num_bytes = int(token_bytes_V[targets].sum()) if token_bytes_V is not None else 0
    nats = float(output.token_loss_BS.double().sum())
    return nats, len(targets), num_bytes, int(output.correct_BS.sum())


def _mean(total: np.ndarray, has_bytes: bool) -> DomainLoss:
    nats, tokens, num_bytes, correct = total
    bits = nats / math.log(2) / num_bytes if has_bytes and num_bytes else math.nan
    return DomainLoss(float(nats / tokens), float(bits), int(tokens), float(correct / tokens))


def evaluation_scalars(losses: Mapping[str, DomainLoss]) -> dict[str, float]:
    """What is recorded of an evaluation: `val_loss`, the mean over all tokens, and three values a domain."""
    if not losses:
        return {}
    tokens = sum(each.num_tokens for each in losses.values())
    scalars = {"val_loss": sum(each.loss_nats * each.num_tokens for each in losses.values()) / tokens}
    for domain, each in losses.items():
        scalars[f"val_loss/{domain}"] = each.loss_nats
        if not math.isnan(each.bits_per_byte):
            scalars[f"val_bits_per_byte/{domain}"] = each.bits_per_byte
        if not math.isnan(each.accuracy):
            scalars[f"val_accuracy/{domain}"] = each.accuracy
    return scalars
