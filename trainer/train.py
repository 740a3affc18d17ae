"""The training loop: batches in, steps taken, everything worth knowing reported.

Step s starts from weights W_s: its training loss and the evaluation recorded under s are both of W_s, and
checkpoint `step-s` holds W_s. Nothing that is recorded flows back into training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainer.assembly import Assembly, assemble
from trainer.checkpoint_folder import step_of
from trainer.config import TrainConfig
from trainer.evaluate import DomainLoss, evaluate, evaluation_scalars
from trainer.guards import note_bad_step
from trainer.interrupt import Interrupt
from trainer.interventions import respond
from trainer.process_group import lost_ranks_told
from trainer.progress import Progress, Silent, StepReport
from trainer.pruning import count_usage, prune_if_due
from trainer.restart import Restart
from trainer.saving import save, save_if_best, save_or_warn
from trainer.spikes import go_back_at_a_spike
from trainer.step import StepTaken, take_step

Stop = Literal["interrupted", "time", "alert"]
"""Why a run ends before its last step."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    run: Path
    steps_done: int
    """Steps of the whole run, those before a resume included."""
    losses: tuple[float, ...]
    """Cross-entropy of each step of this call, nats per token."""
    evaluations: Mapping[int, Mapping[str, DomainLoss]]
    """Held-out losses by the step whose weights they are of."""
    checkpoint: Path | None
    """The newest checkpoint written by this call."""
    interrupted: bool
    seconds: float
    stopped_by: str | None = None
    """The alert that ended the run, where it was told to stop at one."""


@dataclass(kw_only=True)
class Course:
    """What a call of `train` has done so far."""

    progress: Progress
    began: float = 0.0
    """When the first step of the call began, seconds of the monotonic clock."""
    step: int = 0
    """Steps of the run that are done."""
    losses: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, Mapping[str, DomainLoss]] = field(default_factory=dict)
    saved: Path | None = None
    stopped_by: str | None = None

    @property
    def seconds(self) -> float:
        """Since the first step began."""
        return time.monotonic() - self.began

    def forget_from(self, step: int) -> None:
        """Training goes back before this step."""
        for told in (self.losses, self.evaluations):
            for later in [each for each in told if each >= step]:
                del told[later]  # type: ignore[attr-defined]


def train(
    config: TrainConfig, *, progress: Progress | None = None, interrupt: Interrupt | None = None
) -> TrainResult:
    """Train a model from scratch, or go on where `config.resume` says.

    Args:
        config: the run; `trainer.presets.train_preset` makes one.
        progress: where to report to; None: only the log.
        interrupt: tells between steps whether to stop; None: Ctrl-C and SIGTERM.

    Raises:
        MoevizError: a bad value, missing data, an existing run folder, a damaged checkpoint, losses that are
            not numbers, or a last checkpoint that could not be written.
        LostRankError: another rank is gone or does not answer.
    """
    started = time.monotonic()
    course = Course(progress=progress or Silent())
    interrupt = interrupt or Interrupt()
    restart: Restart | None = None
    try:
        while True:
            try:
                with lost_ranks_told():
                    run, interrupted = _attempt(config, course, interrupt, restart)
                break
            except Restart as wish:
                restart, config = wish, replace(config, resume=str(wish.checkpoint), run=None)
    finally:
        course.progress.close()
    return TrainResult(
        run=run,
        steps_done=course.step,
        losses=tuple(course.losses[step] for step in sorted(course.losses)),
        evaluations=course.evaluations,
        checkpoint=course.saved,
        interrupted=interrupted,
        stopped_by=course.stopped_by,
        seconds=time.monotonic() - started,
    )


def _attempt(
    config: TrainConfig, course: Course, interrupt: Interrupt, restart: Restart | None
) -> tuple[Path, bool]:
    """From where `config` begins to the end, unless it restarts. Returns the folder and whether a person ended it."""
    parts = assemble(config, course.progress)
    error: BaseException | None = None
    try:
        if restart is not None:
            restart.carry_on(parts.standing)
            parts.recorder.event(step=parts.first_step, **restart.event)
            course.forget_from(parts.first_step)
        with interrupt:
            error = _run(parts, course, interrupt)
    except Restart as wish:
        error = None if wish.ends_run else wish
        raise
    except BaseException as failure:
        error = failure
        raise
    finally:
        parts.close(error)
    return parts.run, error is not None


def _run(parts: Assembly, course: Course, interrupt: Interrupt) -> BaseException | None:
    """All steps that are left, and what follows the last one. Returns KeyboardInterrupt where a person ended it."""
    config = parts.config
    course.step = parts.first_step
    course.began = course.began or time.monotonic()
    stop: Stop | None = None
    while course.step < config.max_steps and not (stop := _asked_to_stop(parts, course, interrupt)):
        _step(parts, course)
    if course.stopped_by:
        course.progress.note(f"stopped by {course.stopped_by}")
    if stop == "time":
        course.progress.note(
            f"time is up: {course.step} of {config.max_steps} steps in {config.max_minutes:g} minutes"
        )
    if stop != "interrupted" and config.evaluation.eval_every:
        _evaluate(parts, course)
    if stop != "interrupted":
        parts.recorder.run_probe(course.step)
    if course.saved is None or step_of(course.saved) != course.step:
        course.saved = save(parts, course.step)
    return KeyboardInterrupt() if stop == "interrupted" else None


def _step(parts: Assembly, course: Course) -> None:
    """One step with what is due before and after it."""
    config, step = parts.config, course.step
    prune_if_due(parts, step, course.progress)
    if _is_due(step, config.evaluation.eval_every):
        _evaluate(parts, course)
    if _is_due(step, config.evaluation.probe_every):
        parts.recorder.run_probe(step)
    taken = take_step(parts, step)
    course.losses[step] = taken.loss
    note_bad_step(parts, step, taken, course.progress)
    count_usage(parts, step, taken)
    course.stopped_by = respond(parts, step, taken, course.progress)
    if taken.update.taken:
        go_back_at_a_spike(parts, step, taken.loss, course.progress)
    _report(parts, course, taken)
    course.step += 1
    if _is_due(course.step, config.checkpoint.save_every):
        course.saved = save_or_warn(parts, course.step, course.progress) or course.saved


def _report(parts: Assembly, course: Course, taken: StepTaken) -> None:
    step, max_steps = course.step, parts.config.max_steps
    tokens_per_second = parts.tokens_per_step / taken.seconds
    parts.recorder.step(
        step,
        loss=taken.loss,
        lr=taken.learning_rate,
        grad_norm=taken.update.grad_norm,
        tokens_per_second=tokens_per_second,
        step_seconds=taken.seconds,
    )
    if more := {**taken.expert_grads, **taken.side_losses}:
        parts.recorder.scalars(step, more)
    worst_load, worst_expert = _worst(taken.counts_LE)
    course.progress.step(
        StepReport(
            step=step,
            max_steps=max_steps,
            loss=taken.loss,
            learning_rate=taken.learning_rate,
            grad_norm=taken.update.grad_norm,
            tokens_per_second=tokens_per_second,
            seconds_left=course.seconds / len(course.losses) * (max_steps - step - 1),
            worst_load=worst_load,
            worst_expert=worst_expert,
        )
    )


def _worst(counts_LE: Tensor) -> tuple[float, tuple[int, int]]:
    """The largest relative load E * share, and the layer and expert that have it."""
    if not counts_LE.numel():
        return math.nan, (0, 0)
    load_LE = counts_LE * (counts_LE.shape[1] / counts_LE.sum(dim=1, keepdim=True))
    layer, expert = divmod(int(load_LE.argmax()), counts_LE.shape[1])
    return float(load_LE[layer, expert]), (layer, expert)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate(parts: Assembly, course: Course) -> None:
    with parts.engine.evaluating():
        losses = evaluate(
            parts.engine,
            parts.text.batches,
            parts.text.token_bytes_V,
            parts.config.evaluation.eval_sequences,
        )
    scalars = evaluation_scalars(losses)
    parts.recorder.scalars(course.step, scalars)
    course.progress.evaluation(course.step, losses)
    course.evaluations[course.step] = losses
    if "val_loss" in scalars:
        saved = save_if_best(parts, course.step, scalars["val_loss"], course.saved, course.progress)
        course.saved = saved or course.saved


def _asked_to_stop(parts: Assembly, course: Course, interrupt: Interrupt) -> Stop | None:
    """Whether an alert or any rank was asked to, or is out of time: all of them stop after the same step."""
    if course.stopped_by:
        return "alert"
    minutes = parts.config.max_minutes
    over = minutes is not None and bool(course.losses) and course.seconds >= 60 * minutes
    wishes = torch.tensor([float(interrupt.requested), float(over)], device=parts.engine.device)
    interrupted, out_of_time = parts.engine.sum_ranks(wishes).tolist()
    return "interrupted" if interrupted else "time" if out_of_time else None
