"""A sudden rise of the loss, answered by going back to the last checkpoint and passing over the data in between.

What PaLM's authors did by hand (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, section 5.1): spikes came
of certain data at a certain state, so the same steps with other data do not repeat them. Off by default.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from trainer.assembly import Assembly
from trainer.checkpoint_folder import list_checkpoints, step_of
from trainer.progress import Progress
from trainer.restart import Restart
from trainer.standing import Standing

_SHARE = 0.02
"""A spike is this share above the median too: where a loss hardly varies, six deviations are little."""


def is_spike(loss: float, recent: Sequence[float], deviations: float) -> bool:
    """Whether a loss stands out above those before it."""
    line = statistics.fmean(recent) + deviations * statistics.pstdev(recent)
    return loss > max(line, (1 + _SHARE) * statistics.median(recent))


def go_back_at_a_spike(parts: Assembly, step: int, loss: float, progress: Progress) -> None:
    """Remember the loss of a step; after a spike leave the step by an exception.

    Raises:
        Restart: training goes on from the newest checkpoint.
    """
    guard, standing = parts.config.guard, parts.standing
    if not guard.spike_rewind:
        return
    recent = standing.recent_losses
    if len(recent) == guard.spike_window and is_spike(loss, recent, guard.spike_sd):
        _go_back(parts, step, loss, progress)
    recent.append(loss)
    del recent[: -guard.spike_window]


def _go_back(parts: Assembly, step: int, loss: float, progress: Progress) -> None:
    saved = list_checkpoints(parts.checkpoints)
    allowed = parts.config.guard.max_rewinds
    if not saved or parts.standing.rewinds >= allowed:
        why = "there is no checkpoint yet" if not saved else f"the run went back {allowed} times already"
        progress.note(f"step {step} has a spike, loss={loss:.3f}; {why}, so it goes on")
        parts.recorder.event("spike", step=step, loss=loss, went_back=False)
        return
    first = step_of(saved[-1])
    offset = parts.standing.data_offset + step + 1 - first
    rewinds = parts.standing.rewinds + 1

    def carry_on(standing: Standing) -> None:
        standing.data_offset, standing.rewinds = offset, rewinds

    progress.note(
        f"step {step} has a spike, loss={loss:.3f}; going back to {saved[-1].name}, past the data of "
        f"{step + 1 - first} steps"
    )
    raise Restart(
        saved[-1],
        carry_on,
        {"kind": "rewind", "spike_step": step, "loss": loss, "steps_of_data_passed_over": step + 1 - first},
    )
