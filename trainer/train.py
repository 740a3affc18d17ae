"""The training loop: batches in, steps taken, everything worth knowing reported.

Step s starts from weights W_s: its training loss and the evaluation recorded under s are both of W_s, and
checkpoint `step-s` holds W_s. Nothing that is recorded flows back into training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moeviz.errors import MoevizError
from trainer.assembly import Assembly, assemble
from trainer.balance import move_bias, training_loss
from trainer.checkpoint import SaveError, save_checkpoint
from trainer.checkpoint_folder import keep_newest, step_of
from trainer.config import TrainConfig
from trainer.evaluate import DomainLoss, evaluate, evaluation_scalars
from trainer.interrupt import Interrupt
from trainer.progress import Progress, Silent, StepReport

Stop = Literal["interrupted", "time"]
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


def train(
    config: TrainConfig, *, progress: Progress | None = None, interrupt: Interrupt | None = None
) -> TrainResult:
    """Train a model from scratch, or go on where `config.resume` says.

    Args:
        config: the run; `trainer.presets.train_preset` makes one.
        progress: where to report to; None: only the log.
        interrupt: tells between steps whether to stop; None: Ctrl-C and SIGTERM.

    Raises:
        MoevizError: a bad value, missing data, an existing run folder, a damaged checkpoint, a loss that is
            not a number, or a last checkpoint that could not be written.
    """
    started = time.monotonic()
    progress = progress or Silent()
    parts = assemble(config, progress)
    losses: list[float] = []
    evaluations: dict[int, Mapping[str, DomainLoss]] = {}
    step, saved = parts.first_step, None
    error: BaseException | None = None
    loop_started = time.monotonic()
    stop: Stop | None = None
    try:
        with interrupt or Interrupt() as interrupt:
            while step < config.max_steps and not (
                stop := _asked_to_stop(parts, interrupt, loop_started if losses else None)
            ):
                if _is_due(step, config.evaluation.eval_every):
                    evaluations[step] = _evaluate(parts, step, progress)
                taken = take_step(parts, step)
                losses.append(taken.loss)
                pace = (time.monotonic() - loop_started) / len(losses)
                _report(parts, step, taken, pace * (config.max_steps - step - 1), progress)
                step += 1
                if _is_due(step, config.checkpoint.save_every):
                    saved = _save_or_warn(parts, step, progress) or saved
            if stop == "interrupted":
                error = KeyboardInterrupt()
            elif stop == "time":
                progress.note(
                    f"time is up: {step} of {config.max_steps} steps in {config.max_minutes:g} minutes"
                )
            if stop != "interrupted" and config.evaluation.eval_every:
                evaluations[step] = _evaluate(parts, step, progress)
            if saved is None or step_of(saved) != step:
                saved = _save(parts, step)
    except BaseException as failure:
        error = failure
        raise
    finally:
        parts.close(error)
        progress.close()
    return TrainResult(
        run=parts.run,
        steps_done=step,
        losses=tuple(losses),
        evaluations=evaluations,
        checkpoint=saved,
        interrupted=error is not None,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True, kw_only=True)
class StepTaken:
    """The outcome of one optimizer step."""

    loss: float
    """Cross-entropy, nats per token, mean over micro-batches and ranks."""
    grad_norm: float
    learning_rate: float
    counts_LE: Tensor
    """Assignments of all micro-batches and ranks."""
    seconds: float


def take_step(parts: Assembly, step: int) -> StepTaken:
    """One optimizer step: all its micro-batches, the update, then the balance bias.

    Raises:
        MoevizError: the loss or the gradient is not a number.
    """
    begin = time.perf_counter()
    engine, config = parts.engine, parts.config
    ce, counts_LE = (
        torch.zeros((), device=engine.device),
        torch.zeros((), dtype=torch.int64, device=engine.device),
    )
    for micro_batch in range(config.data.gradient_accumulation_steps):
        batch = parts.text.batches.batch(step, micro_batch, engine.rank, engine.world_size)
        parts.recorder.label(batch.domains)
        output = engine.forward(
            torch.from_numpy(batch.input_ids_BS).to(engine.device),
            torch.from_numpy(batch.labels_BS).to(engine.device),
        )
        engine.backward(training_loss(output, config.balance))
        assert output.ce is not None
        assert output.token_loss_BS is not None
        parts.recorder.token_loss(output.token_loss_BS)
        ce = ce + output.ce.detach()
        counts_LE = counts_LE + output.expert_counts_LE
    learning_rate = parts.learning_rate((step + 1) * parts.tokens_per_step)
    grad_norm = engine.step(learning_rate)
    counts_LE = engine.sum_ranks(counts_LE)
    move_bias(engine.module, counts_LE, config.balance)
    loss = float(engine.sum_ranks(ce)) / config.data.gradient_accumulation_steps / engine.world_size
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise MoevizError(
            f"step {step} has loss={loss} and gradient norm={grad_norm}; lower "
            f"learning_rate={config.optim.learning_rate} or lengthen the warm-up, and resume from a checkpoint"
        )
    return StepTaken(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        counts_LE=counts_LE,
        seconds=time.perf_counter() - begin,
    )


def _report(parts: Assembly, step: int, taken: StepTaken, seconds_left: float, progress: Progress) -> None:
    tokens_per_second = parts.tokens_per_step / taken.seconds
    parts.recorder.step(
        step,
        loss=taken.loss,
        lr=taken.learning_rate,
        grad_norm=taken.grad_norm,
        tokens_per_second=tokens_per_second,
        step_seconds=taken.seconds,
    )
    worst_load, worst_expert = _worst(taken.counts_LE)
    progress.step(
        StepReport(
            step=step,
            max_steps=parts.config.max_steps,
            loss=taken.loss,
            learning_rate=taken.learning_rate,
            grad_norm=taken.grad_norm,
            tokens_per_second=tokens_per_second,
            seconds_left=seconds_left,
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


def _evaluate(parts: Assembly, step: int, progress: Progress) -> dict[str, DomainLoss]:
    losses = evaluate(
        parts.engine, parts.text.batches, parts.text.token_bytes_V, parts.config.evaluation.eval_sequences
    )
    parts.recorder.scalars(step, evaluation_scalars(losses))
    progress.evaluation(step, losses)
    return losses


def _save(parts: Assembly, step: int) -> Path:
    path = save_checkpoint(
        parts.checkpoints, step=step, config=parts.config, engine=parts.engine, text=parts.text
    )
    if parts.engine.rank == 0:
        keep_newest(parts.checkpoints, parts.config.checkpoint.keep_checkpoints)
    parts.recorder.event("checkpoint", step=step, path=str(path.relative_to(parts.run)))
    return path


def _save_or_warn(parts: Assembly, step: int, progress: Progress) -> Path | None:
    """A checkpoint on the way: training goes on without it if the disk is full."""
    try:
        return _save(parts, step)
    except SaveError as error:
        progress.note(f"{error}. Training goes on")
        parts.recorder.event("checkpoint_failed", step=step, error=str(error))
        return None


def _asked_to_stop(parts: Assembly, interrupt: Interrupt, since: float | None) -> Stop | None:
    """Whether any rank was asked to, or is out of time: all of them stop after the same step."""
    minutes = parts.config.max_minutes
    over = minutes is not None and since is not None and time.monotonic() - since >= 60 * minutes
    wishes = torch.tensor([float(interrupt.requested), float(over)], device=parts.engine.device)
    interrupted, out_of_time = parts.engine.sum_ranks(wishes).tolist()
    return "interrupted" if interrupted else "time" if out_of_time else None
