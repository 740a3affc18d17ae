"""A step whose loss or gradient is not a number is not taken, and the run goes on unless that happens often.

One bad batch or one overflow is survived at the price of a step; a run that has diverged is stopped while its
checkpoints are still good.
"""

from __future__ import annotations

import math

from moeviz.errors import MoevizError
from trainer.assembly import Assembly
from trainer.progress import Progress
from trainer.step import StepTaken


def note_bad_step(parts: Assembly, step: int, taken: StepTaken, progress: Progress) -> None:
    """Record a step that was skipped.

    Raises:
        MoevizError: too many in a row.
    """
    standing, config = parts.standing, parts.config
    if taken.update.taken:
        standing.bad_steps = 0
        return
    numbers = {"loss": str(taken.loss), "grad_norm": str(taken.update.grad_norm)}
    if taken.update.scale_lowered and math.isfinite(taken.loss):
        parts.recorder.event("loss_scale_lowered", step=step, **numbers)
        return
    standing.bad_steps += 1
    parts.recorder.event("step_skipped", step=step, in_a_row=standing.bad_steps, **numbers)
    said = f"step {step} has loss={taken.loss} and gradient norm={taken.update.grad_norm}"
    if standing.bad_steps > config.guard.max_bad_steps:
        raise MoevizError(
            f"{said}, after {standing.bad_steps - 1} skipped steps; lower "
            f"learning_rate={config.optim.learning_rate} or lengthen the warm-up, and resume from a checkpoint"
        )
    progress.note(f"{said}; it is skipped ({standing.bad_steps} in a row)")
