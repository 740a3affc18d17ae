"""When a run's state is written, and what of it is kept: the newest checkpoints, and the best one.

A full disk on the way costs a checkpoint and no training; at the end it is an error.
"""

from __future__ import annotations

from pathlib import Path

from trainer.assembly import Assembly
from trainer.checkpoint import SaveError, save_checkpoint
from trainer.checkpoint_folder import keep_newest, mark_best, step_of
from trainer.judge import JUDGE_FILE
from trainer.progress import Progress


def save(parts: Assembly, step: int) -> Path:
    """Write checkpoint `step` and remove those that are too old. Every rank must call it.

    The steps before it are recorded first: a process that dies later, and goes on from it, would never tell of them.

    Raises:
        SaveError: it could not be written.
    """
    parts.recorder.flush()
    path = save_checkpoint(
        parts.checkpoints,
        step=step,
        config=parts.config,
        engine=parts.engine,
        text=parts.text,
        standing=parts.standing,
        more={JUDGE_FILE: parts.judge.dump()} if parts.judge else {},
    )
    if parts.engine.rank == 0:
        keep_newest(parts.checkpoints, parts.config.checkpoint.keep_checkpoints)
    parts.recorder.event("checkpoint", step=step, path=str(path.relative_to(parts.run)))
    return path


def save_or_warn(parts: Assembly, step: int, progress: Progress) -> Path | None:
    """A checkpoint on the way: training goes on without it if the disk is full."""
    try:
        return save(parts, step)
    except SaveError as error:
        progress.note(f"{error}. Training goes on")
        parts.recorder.event("checkpoint_failed", step=step, error=str(error))
        return None


def save_if_best(
    parts: Assembly, step: int, val_loss: float, saved: Path | None, progress: Progress
) -> Path | None:
    """Keep weights whose validation loss is the least so far, where the run asks for it.

    Args:
        val_loss: of the weights with which `step` begins.
        saved: the newest checkpoint of this call.

    Returns:
        The checkpoint, if one was written.
    """
    standing = parts.standing
    least = standing.best_loss is None or val_loss < standing.best_loss
    # An untrained model is the best so far, and nobody wants to keep it.
    if not (parts.config.checkpoint.keep_best and least and step > 0):
        return None
    standing.best_loss, standing.best_step = val_loss, step
    there = saved is not None and step_of(saved) == step
    path = saved if there else save_or_warn(parts, step, progress)
    if path is not None and parts.engine.rank == 0:
        mark_best(path)
        keep_newest(parts.checkpoints, parts.config.checkpoint.keep_checkpoints)
    return path
