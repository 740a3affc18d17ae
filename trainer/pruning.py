"""Removing experts that a run hardly uses, or doubling those that it uses most, while it trains.

What remains, and what is a copy, keeps its weights and its optimizer state. A run's records are of one shape, so the
other model goes on in a folder of its own, RUN-N-experts, with the steps counted on; both folders say what was removed
or copied, and why.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from model.prune import Sources, least_used_removed, most_used_doubled
from moeviz.errors import MoevizError
from trainer.assembly import Assembly
from trainer.checkpoint import save_checkpoint
from trainer.config import TrainConfig
from trainer.engine import Engine
from trainer.progress import Progress
from trainer.restart import Restart
from trainer.resume import CHECKPOINTS
from trainer.saving import save
from trainer.standing import Standing
from trainer.step import StepTaken


@runtime_checkable
class Prunable(Protocol):
    """An engine that can go on with fewer experts, or more."""

    def with_experts(self, sources: Sources, config: TrainConfig) -> Engine:
        """An engine whose experts are copies of these, with their optimizer state. Every rank must call it."""


def count_usage(parts: Assembly, step: int, taken: StepTaken) -> None:
    """Add a step's assignments to the usage that the next pruning goes by."""
    prune, standing = parts.config.prune, parts.standing
    if not any(step < due <= step + prune.prune_window for due in prune.plan):
        return
    counts = taken.counts_LE.cpu()
    standing.usage = (counts + torch.tensor(standing.usage or 0)).tolist()


def prune_if_due(parts: Assembly, step: int, progress: Progress) -> None:
    """Before step `step`: leave for a model of fewer experts, or more, where the plan says so.

    Raises:
        Restart: training goes on with it.
        MoevizError: the other model is not possible, or its folder holds a run.
    """
    wanted = parts.config.prune.plan.get(step)
    grows, present = parts.config.prune.grows_at(step), parts.engine.module.config.num_experts
    done = wanted is not None and (present >= wanted if grows else present <= wanted)
    if wanted is None or done or not parts.standing.usage:
        return
    usage_LE = torch.tensor(parts.standing.usage)
    sources = (most_used_doubled if grows else least_used_removed)(usage_LE, wanted)
    run = parts.run.with_name(f"{parts.run.name}-{wanted}-experts")
    if (run / CHECKPOINTS).exists():
        raise MoevizError(
            f"{run} already holds a run, and step {step} {'grows' if grows else 'prunes'} into it; move it away"
        )
    told = _told(sources, usage_LE)
    save(parts, step)
    kind = "grown" if grows else "pruned"
    parts.recorder.event(kind, step=step, goes_on_in=str(run), **told)
    what = f"{present} experts become {wanted}" if grows else f"{wanted} of {present} experts are kept"
    progress.note(f"step {step}: {what}; the run goes on in {run}")
    event = {"kind": kind, "came_from": str(parts.run), **told}
    raise Restart(_first_checkpoint(parts, step, sources, run), _nothing, event, ends_run=True)


def _first_checkpoint(parts: Assembly, step: int, sources: Sources, run: Path) -> Path:
    """The first checkpoint of the run that goes on."""
    assert isinstance(parts.engine, Prunable)
    config = replace(parts.config, run=run)
    try:
        engine = parts.engine.with_experts(sources, config)
    except ValueError as error:
        raise MoevizError(
            f"experts cannot be {'doubled' if parts.config.prune.grows_at(step) else 'pruned'} at step {step}: {error}"
        ) from error
    standing = replace(parts.standing, usage=[], responded={}, best_loss=None, best_step=None)
    saved = save_checkpoint(
        run / CHECKPOINTS, step=step, config=config, engine=engine, text=parts.text, standing=standing
    )
    engine.destroy()
    return saved


def _told(sources: Sources, usage_LE: torch.Tensor) -> dict[str, object]:
    experts = range(usage_LE.shape[1])
    return {
        "kept": [list(dict.fromkeys(row)) for row in sources],
        "copied": [[expert for place, expert in enumerate(row) if expert in row[:place]] for row in sources],
        "removed": [[expert for expert in experts if expert not in row] for row in sources],
        "share_of_assignments": [
            [round(float(value), 5) for value in row] for row in usage_LE / usage_LE.sum(dim=1, keepdim=True)
        ],
    }


def _nothing(standing: Standing) -> None:
    """The checkpoint says all."""
