"""When a run's state is written, and what of it is kept: the newest checkpoints, and the best one.

A full disk on the way costs a checkpoint and no training; at the end it is an error.
"""

from __future__ import annotations

from pathlib import Path

from trainer.assembly import Assembly
from trainer.checkpoint import SaveError, save_checkpoint
from trainer.checkpoint_folder import keep_newest
from trainer.progress import Progress


def save(parts: Assembly, step: int) -> Path:
    """Write checkpoint `step` and remove those that are too old. Every rank must call it.

    Raises:
        SaveError: it could not be written.
    """
    path = save_checkpoint(
        parts.checkpoints,
        step=step,
        config=parts.config,
        engine=parts.engine,
        text=parts.text,
        standing=parts.standing,
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
