"""Follow texts through a checkpoint and keep what its routers did as an ordinary run folder.

The same probe that watches training watches the forward passes here, with everything recorded, so that every view of
a run (terminal, dashboards, SQL) also shows an inspected checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeviz.errors import MoevizError
from moeviz.inspection.checkpoint import OpenedCheckpoint
from moeviz.policy import SamplingPolicy
from moeviz.session import watch


class Passage(NamedTuple):
    """A stretch of text that fits the model: one sequence of the traced run."""

    token_ids: tuple[int, ...]
    label: str


def passages(checkpoint: OpenedCheckpoint, texts: Sequence[str]) -> list[Passage]:
    """Tokenise texts and cut them to the model's longest sequence; each piece is labelled `text N` (or `N.M`).

    Raises:
        MoevizError: a text has no tokens, or one that the model does not know.
    """
    found: list[Passage] = []
    for number, text in enumerate(texts, start=1):
        ids = tuple(checkpoint.encode(text))
        if not ids:
            raise MoevizError(f"text {number} is empty: it has no tokens; give at least one word")
        pieces = [ids[at : at + checkpoint.max_seq_len] for at in range(0, len(ids), checkpoint.max_seq_len)]
        single = len(pieces) == 1
        found += [
            Passage(piece, f"text {number}" if single else f"text {number}.{part}")
            for part, piece in enumerate(pieces, start=1)
        ]
    return found


def trace(checkpoint: OpenedCheckpoint, texts: Sequence[str], run: Path) -> list[Passage]:
    """Run the texts through the checkpoint and record every decision, every map and every loss as step 0 of `run`.

    Args:
        checkpoint: what to look into.
        texts: one or more; each becomes a sequence, or several when it is longer than the model's longest.
        run: folder of the new run.

    Raises:
        MoevizError: an empty text, a model without experts, or a folder that already holds a run.
    """
    found = passages(checkpoint, texts)
    policy = SamplingPolicy(
        route_every=1,
        route_sequences="all",
        attention_every=1,
        attention_heads=10_000,
        attention_size=256,
        latent_every=1,
        latent_layers="all",
        latent_tokens=8192,
    )
    probe = watch(
        checkpoint.model,
        run,
        policy=policy,
        when="always",
        name=f"inspect {checkpoint.name}",
        config={"inspected": str(checkpoint.path), "trained_steps": checkpoint.step, **checkpoint.config},
        vocab=list(checkpoint.token_texts),
        planned_steps=1,
        alerts=False,
    )
    device = next(checkpoint.model.parameters()).device
    with probe, torch.no_grad():
        losses = []
        for passage in found:
            ids_BS = torch.tensor([passage.token_ids], device=device)
            probe.label([passage.label])
            logits_BSV = logits_of(checkpoint.model(ids_BS))
            loss_BS = next_token_loss(logits_BSV, ids_BS)
            probe.token_loss(loss_BS)
            losses.append(loss_BS.flatten())
        loss = torch.cat(losses)
        probe.step(0, **({"loss": float(loss.mean())} if loss.numel() else {}))
    return found


def logits_of(output: Any) -> Tensor:
    """Logits [B, S, V] of a model's output: a field called `logits` or `logits_BSV`, or the tensor itself."""
    for name in ("logits", "logits_BSV"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, Tensor):
        return output
    raise MoevizError(f"the model returned {type(output).__name__} without logits; inspect a language model")


def next_token_loss(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token, [B, S-1]."""
    return F.cross_entropy(logits_BSV[:, :-1].float().transpose(1, 2), ids_BS[:, 1:], reduction="none")
