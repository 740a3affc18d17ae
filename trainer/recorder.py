"""Where a run's facts go: with --log-routing to a probe on the model, else scalars and events alone.

The loop calls the same verbs either way, and `moeviz.Probe` is one of the two implementations. Both write the same
kind of run folder, so every view opens either, and a run may be resumed with the other.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moeviz.alerts import AlertConfig, RunPlan
from moeviz.bridges import Tracking, bridged
from moeviz.capture.sites import find_sites
from moeviz.records import AlertRecord, EventRecord, ModelInfo, ScalarRecord, Sink
from moeviz.session import deriving, keep_rules, watch, with_rules
from moeviz.store.presence import Presence
from moeviz.store.run import RunInfo, create_run, finish_run, resume_run
from moeviz.store.writer import BackgroundSink, SegmentWriter
from trainer.config import TrainConfig
from trainer.engine import Engine
from trainer.probe import held_out_probe
from trainer.text import Text

_DENSE = ModelInfo(family="moeviz", layers=())


class Recorder(Protocol):
    """What the training loop tells about itself."""

    def label(self, domains: Sequence[str]) -> None:
        """The domain of each sequence of the coming micro-batch."""

    def token_loss(self, loss_BS: Tensor) -> None:
        """Nats of predicting each next token of the last micro-batch."""

    def discard(self) -> None:
        """The step in progress begins anew."""

    def step(self, step: int | None = None, **scalars: float) -> None:
        """An optimizer step is done."""

    def run_probe(self, step: int | None = None) -> None:
        """Route the fixed probe with the weights as they are after `step` steps. Every rank must call it."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that belong to a step but are not known at its end."""

    def event(self, kind: str, step: int | None = None, **detail: Any) -> None:
        """Something happened to the run."""

    def flush(self) -> None:
        """Put on the disk what is known so far. Every rank must call it, at the same step."""

    def close(self, error: BaseException | None = None) -> None:
        """Finish the records; `error` is what ended training, if something did."""


def open_recorder(
    config: TrainConfig,
    run: Path,
    engine: Engine,
    text: Text,
    resume_from: int | None,
    on_alert: Callable[[AlertRecord], None],
) -> Recorder:
    """Make the run folder, or begin a new attempt in it, and watch the model if the config says so.

    Args:
        resume_from: first step that is trained again; None for a new run.
        on_alert: called with every transition of an alert, from the thread that writes.

    A model without experts has nothing to route: of it scalars and events are recorded, whatever the config says.

    Raises:
        MoevizError: the folder holds a run already, or the one to resume cannot be read.
    """
    plan = run_plan(config)
    rules = config.alerting.rules
    if config.log_routing and config.architecture.num_moe_layers > 0:
        return watch(
            engine.module,
            run,
            policy=config.sampling,
            config=config.to_dict(),
            tokenizer=text.tokenizer.name if text.tokenizer else None,
            vocab=text.tokenizer.token_texts() if text.tokenizer else None,
            planned_steps=config.max_steps,
            plan=plan,
            resume_from=resume_from,
            alerts=rules,
            on_alert=on_alert,
            probe_batch=held_out_probe(text, config, engine.module.config),
            probe_every=0,  # the loop asks for it, between steps
            trackers=config.tracking.trackers,
        )
    if engine.rank > 0:
        return Nowhere()
    description = RunInfo(
        name=run.resolve().name,
        model=model_info(engine),
        policy=asdict(config.sampling),
        config=with_rules(config.to_dict(), rules),
        planned_steps=config.max_steps,
        ranks=engine.world_size,
    )
    return ScalarRecorder.open(run, description, resume_from, plan, rules, on_alert, config.tracking.trackers)


def run_plan(config: TrainConfig) -> RunPlan:
    """What the alert rules must know about a run."""
    return RunPlan(
        planned_steps=config.max_steps,
        warmup_steps=config.schedule.warmup_steps,
        grad_clip=config.optim.grad_clip or None,
        bias_step=config.balance.bias_step if config.balance.balance == "bias" else None,
        z_coef=config.balance.z_coef or None,
    )


def model_info(engine: Engine) -> ModelInfo:
    """The description of the model, as a probe would find it."""
    return find_sites(engine.module).info if engine.module.config.num_moe_layers else _DENSE


class Nowhere:
    """Records nothing: ranks after the first, where no routing is recorded."""

    def label(self, domains: Sequence[str]) -> None: ...

    def token_loss(self, loss_BS: Tensor) -> None: ...

    def discard(self) -> None: ...

    def step(self, step: int | None = None, **scalars: float) -> None: ...

    def run_probe(self, step: int | None = None) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def event(self, kind: str, step: int | None = None, **detail: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self, error: BaseException | None = None) -> None: ...


class ScalarRecorder(Nowhere):
    """Losses, rates, events and the alerts that follow from them, without a hook on the model."""

    def __init__(self, inner: Sink, run: Path, first_step: int) -> None:
        self._presence = Presence(run)
        self._sink = BackgroundSink(inner, is_read=self._presence.is_read)
        self._run, self._step = run, first_step

    @classmethod
    def open(
        cls,
        run: Path,
        description: RunInfo,
        resume_from: int | None,
        plan: RunPlan,
        rules: AlertConfig,
        on_alert: Callable[[AlertRecord], None],
        tracking: Tracking,
    ) -> ScalarRecorder:
        """Make or resume a run folder."""
        if resume_from is None:
            create_run(run, description)
        else:
            resume_run(run, resume_from)
            keep_rules(run, description.config)
        sink = deriving(
            bridged(SegmentWriter(run), run, tracking, resume_from),
            run,
            description.model,
            resume_from=resume_from,
            alerts=rules,
            plan=plan,
            on_alert=on_alert,
        )
        recorder = cls(sink, run, resume_from or 0)
        recorder.event("started" if resume_from is None else "resumed", host=platform.node(), pid=os.getpid())
        return recorder

    def step(self, step: int | None = None, **scalars: float) -> None:
        number = self._step if step is None else step
        self.scalars(number, scalars)
        self._step = number + 1

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._sink.write(ScalarRecord(step=step, rank=0, ts=time.time(), values=dict(values)))

    def event(self, kind: str, step: int | None = None, **detail: Any) -> None:
        number = self._step if step is None else step
        self._sink.write(EventRecord(step=number, rank=0, ts=time.time(), kind=kind, detail=detail))

    def flush(self) -> None:
        self._sink.flush()

    def close(self, error: BaseException | None = None) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)
        self.event(
            "ended", status="finished" if error is None else "interrupted" if interrupted else "failed"
        )
        stats = self._sink.close()
        self._presence.close()
        if not stats.lost and error is None:
            finish_run(self._run)
