"""The probe: attached to a model, it turns each optimizer step into records and hands them to a sink.

    probe = attach(model, sink)            # before torch.compile
    for batch in batches:
        ...                                # forward and backward of one or more micro-batches, optimizer step
        probe.step(loss=loss, lr=lr)
    probe.close()

It never steers: loss, gradients and weights are the same bits with and without it. It never raises into
training once its first step was recorded: errors are logged once, counted, written as events, and end it
when they persist.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from moeviz.capture.backlog import Backlog
from moeviz.capture.budget import Budget, volume
from moeviz.capture.failures import PATIENCE, Failures, ProbeError
from moeviz.capture.fixed_probe import FixedProbe, ProbePass, probe_inputs
from moeviz.capture.load_batch import LoadBatch, LoadSource, split_scalars
from moeviz.capture.rank_sum import RankSum
from moeviz.capture.reading import Adapter
from moeviz.capture.sample_batch import SampleBatch
from moeviz.capture.samples import StepSamples
from moeviz.capture.sites import find_sites
from moeviz.capture.stages import Share, share_of
from moeviz.capture.step_checks import check_counts, no_router_seen
from moeviz.capture.step_sums import RoutingPiece, StepSums
from moeviz.capture.tap import Tap, When
from moeviz.errors import MoevizError
from moeviz.policy import SamplingPolicy
from moeviz.records import EventRecord, LayerInfo, ModelInfo, Record, ScalarRecord, Sink


def attach(
    model: nn.Module,
    sink: Sink,
    *,
    policy: SamplingPolicy | None = None,
    info: ModelInfo | None = None,
    rank: int = 0,
    first_step: int = 0,
    when: When = "training",
    adapters: Sequence[Adapter] = (),
    defer: bool = False,
    process_group: Any = None,
    probe_batch: Any = None,
    probe_every: int = 0,
    spent_bytes: float = 0.0,
    share: Share | None = None,
) -> Probe:
    """Watch a model, before it is compiled.

    Args:
        model: any Mixture-of-Experts model, also wrapped in DistributedDataParallel or a DeepSpeed engine.
        sink: where records go; closed with the probe.
        policy: how much is sampled; loads and scalars are always complete.
        info: replaces the description found (family, names); must have the same layers.
        rank: of this process; token-level rows carry it.
        first_step: number of the first step that `Probe.step` will end.
        when: "training" measures forwards in train mode with gradients on, "always" every forward.
        adapters: for routers that moeviz does not know; asked first.
        defer: the sink takes deferred work (objects with `materialize()`) into a thread of its own.
        process_group: sum loads over its ranks (a gloo group that nobody else uses); rank 0 writes them.
        probe_batch: fixed tokens that are run again and again, see `fixed_probe.probe_inputs`; on every rank.
        probe_every: run them at the end of every n-th step; 0: only when `Probe.run_probe` is called.
        share: what of the model is here; None: found out, which every process of the group must do.
        spent_bytes: samples of the run that are on disk already, for the policy's `max_run_megabytes`.

    Raises:
        ProbeError: a dense or compiled model, routers that no adapter reads, or an info of another model.
        MoevizError: a probe_batch without token ids, or a negative probe_every.
    """
    sites = find_sites(model, adapters)
    if info is not None and _shape(info) != _shape(sites.info):
        raise ProbeError(
            f"info has layers of (experts, top-k) {_shape(info)} but the model has {_shape(sites.info)}; "
            "leave info out, or describe this model"
        )
    if probe_every < 0:
        raise MoevizError(f"probe_every={probe_every} is negative; give 0 for never, or a positive number")
    share = share or share_of(sites.root, sites.routers, process_group)
    probe = Probe(info or sites.info, sink, rank, first_step, defer, process_group, share)
    if probe_batch is not None:
        inputs = probe_inputs(probe_batch, sites.root)
        kept = process_group is None or rank == 0 or share.replica == 0
        probe._fixed = FixedProbe(sites, inputs, rank=rank, record=kept, share=share)
        probe._probe_every = probe_every
    probe._tap = Tap(sites, policy or SamplingPolicy(), when, probe._failed)
    probe._budget = Budget(probe._tap.sampler.policy, spent_bytes)
    probe._tap.step = first_step
    layers = tuple(group.layers for group in probe._tap.collector.groups)
    probe._source = replace(probe._source, layers=layers, backlog=probe._tap.collector.backlog)
    probe._tap.attach()
    return probe


def _shape(info: ModelInfo) -> list[tuple[int, int]]:
    return [(layer.num_experts, layer.top_k) for layer in info.layers]


class Probe:
    """Watches one model; made by `attach` or `moeviz.watch`. Use as a context manager, or call `close`."""

    _tap: Tap
    _budget: Budget

    def __init__(
        self,
        info: ModelInfo,
        sink: Sink,
        rank: int,
        first_step: int,
        defer: bool,
        process_group: Any,
        share: Share,
    ) -> None:
        self.info, self._share = info, share
        self.rank = rank
        self.failures = Failures()
        self.on_close: Callable[[BaseException | None], None] | None = None
        """Called once when the probe closes, before the sink does, with the error that ended training."""
        self._sink, self._defer = sink, defer
        rank_sum = None if process_group is None else RankSum(process_group)
        self._source = LoadSource(
            rank=rank, info=info, layers=(), share=share, backlog=Backlog(()), rank_sum=rank_sum
        )
        self._step = first_step
        self._recorded = False
        self._in_order = False
        """Whether no failure is on the account, and `_finish_plain_step` may be tried, for work can be deferred."""
        self._num_layers = len(share.layers)
        self._closed = False
        self._seconds = 0.0
        self._fixed: FixedProbe | None = None
        self._probe_every = 0

    def step(self, step: int | None = None, **scalars: float | Tensor) -> None:
        """End an optimizer step: everything since the last call belongs to it.

        Args:
            step: its number; by default one more than the last.
            **scalars: numbers of the step (loss, lr, grad_norm). Tensors stay on the device until written.

        Raises:
            ProbeError: at the first step only: nothing, or something inconsistent, was captured.
            MoevizError: the probe is closed.
        """
        if self._closed:
            raise MoevizError("this probe is closed; call moeviz.watch again to go on recording")
        began = time.perf_counter()
        number = self._step if step is None else step
        try:
            if not (self._in_order and self._finish_plain_step(number, scalars)):
                self._finish_step(number, scalars)
        except ProbeError as error:
            if not self._recorded:
                self._tap.detach()
                raise
            self._failed("the end of a step", error)
        except Exception as error:
            self._failed("the end of a step", error)
        if not self._in_order:
            self._settle_failures()
        self._step = self._tap.step = number + 1
        self._seconds += time.perf_counter() - began
        if self._probe_every and (number + 1) % self._probe_every == 0:
            self.run_probe()

    def run_probe(self, step: int | None = None) -> None:
        """Run the fixed probe once, in evaluation mode and without a trace in training; nothing without one.

        `step` does so by itself every `probe_every` steps; call this before the first step for the untrained model.
        With several ranks all of them must call it.

        Args:
            step: optimizer steps that the weights have seen; by default the number of the step in progress.
        """
        if self._fixed is None or self._closed or not self._tap.attached:
            return
        began = time.perf_counter()
        self._tap.paused = True
        try:
            seen = self._fixed.run(self._step if step is None else step)
            if seen is not None:
                self._hand_on(seen)
        except Exception as error:
            self._failed("the fixed probe", error)
        finally:
            self._tap.paused = False
        self._seconds += time.perf_counter() - began

    def discard(self) -> None:
        """Forget what was captured since the last `step`: the step in progress begins anew."""
        self._tap.take()

    def label(self, domains: Sequence[str | None] | str | None) -> None:
        """Name the domains of the next sequences in order, one per row, before their forward.

        A single string names every sequence until the step ends.
        """
        self._tap.sampler.label(domains)

    def token_loss(self, loss_BS: Tensor) -> None:
        """Loss of predicting the *next* token, at each position of the last micro-batch: nats, [B, S] or [B, S-1].

        Raises:
            MoevizError: at the first step only: the shape is not that of the micro-batch.
        """
        if self._tap.micro_batch is None:
            return
        try:
            self._tap.sampler.add_loss(self._tap.micro_batch, loss_BS)
        except Exception as error:
            if not self._recorded and isinstance(error, MoevizError):
                raise
            self._failed("token_loss", error)

    def scalars(
        self, step: int, values: Mapping[str, float | Tensor] | None = None, **more: float | Tensor
    ) -> None:
        """Record numbers of a step besides those given to `step`, for example `{"val_loss/code": 1.2}`."""
        if not self._share.tells_scalars:
            return
        try:
            numbers = {name: float(value) for name, value in {**(values or {}), **more}.items()}
        except Exception as error:
            self._failed("scalars", error)
            return
        self._write(ScalarRecord(step=step, rank=self.rank, ts=time.time(), values=numbers))

    def event(self, kind: str, step: int | None = None, **detail: Any) -> None:
        """Record that something happened to the run, by default at the step in progress."""
        number = self._step if step is None else step
        self._write(EventRecord(step=number, rank=self.rank, ts=time.time(), kind=kind, detail=detail))

    def flush(self) -> None:
        """Make everything so far visible to readers."""
        try:
            self._sink.flush()
        except Exception as error:
            self._failed("flush", error)

    def detach(self) -> None:
        """Remove every hook: the model is as it was. `step` goes on recording scalars."""
        self._tap.detach()

    def close(self, error: BaseException | None = None) -> None:
        """Detach and finish the records. Closing twice is allowed.

        Args:
            error: what ended training, if something did; a `with` block hands it over.
        """
        if self._closed:
            return
        self._closed = True
        self._tap.detach()
        try:
            if self.on_close is not None:
                self.on_close(error)
        except Exception as failure:
            self._failed("close", failure)
        try:
            self._sink.close()
        except Exception as failure:
            self._failed("close of the sink", failure)

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    @property
    def attached(self) -> bool:
        """Whether hooks are in place: False after `detach`, `close`, or too many failing steps."""
        return self._tap.attached

    @property
    def next_step(self) -> int:
        """Number of the step in progress."""
        return self._step

    @property
    def seconds(self) -> float:
        """What watching cost so far: time in the training thread at the ends of forwards and steps."""
        return self._seconds + self._tap.seconds

    def _finish_plain_step(self, number: int, scalars: dict[str, Any]) -> bool:
        """Hand on a step in which nothing was out of the ordinary: sums of every layer, no samples, plain numbers.

        Between two steps the caches are training's: every call here costs microseconds, so there are few.

        Returns:
            False where `_finish_step` must do it; nothing was changed then, but that a tensor became its number.
        """
        for name, value in scalars.items():
            if type(value) is not float:
                if not (isinstance(value, Tensor) and value.is_cpu and value.numel() == 1):
                    return False
                scalars[name] = value.item()
        sums = self._tap.take_sums(self._num_layers)
        if sums is None:
            return False
        collector = self._tap.collector
        bias = collector.biases() if collector.biased else {}
        self._sink.write(LoadBatch(self._source, number, time.time(), sums, bias, scalars, {}))  # type: ignore[arg-type]
        return True

    def _finish_step(self, number: int, scalars: Mapping[str, float | Tensor]) -> None:
        tap = self._tap
        sums, samples = tap.take()
        routing = sums.routing
        whole = not self.failures.spoiled and len(sums.layers_seen) == len(self._share.layers)
        if not whole and tap.attached:
            self._explain_empty(sums)
        bias = tap.collector.biases() if whole and tap.collector.biased else {}
        on_host, on_device = split_scalars(scalars if self._share.tells_scalars else {})
        load = LoadBatch(self._source, number, time.time(), sums, bias, on_host, on_device, whole)
        if on_device or tap.on_accelerator:
            load.send()
        if whole and not self._recorded:
            first = load.load()
            assert first is not None
            check_counts(self._expected, first, tap.experts_choose)
        if self._defer:
            self._sink.write(load)  # type: ignore[arg-type]  # a sink with defer=True takes deferred work
        else:
            self._hand_on(load)
        if samples.sequences:
            sums.routing = []
            if whole:
                self._hand_on(samples.batch(number, self.rank, self.info, routing, tap.map_size, self._share))
        if self._budget.limited:
            self._keep_within_budget(number, routing, samples)

    def _settle_failures(self) -> None:
        """Close the account of a step that was the first one, or had errors, or followed one that had."""
        self._recorded = True
        if self.failures.last is not None or self.failures.failing_steps:
            self.failures.end_step()
            if self.failures.exhausted and self._tap.attached:
                self._give_up()
        can_defer = self._defer and self._share.tells_scalars and not self._tap.on_accelerator
        self._in_order = can_defer and not self._budget.limited and self.failures.failing_steps == 0

    def _keep_within_budget(self, number: int, routing: Sequence[RoutingPiece], samples: StepSamples) -> None:
        """Count what the step's samples amount to; move the sampling where a limit asks for it, and say so."""
        count = sum(len(piece.seqs) for piece in samples.sequences)
        recorded = (
            volume(count, [piece.experts_LNSK for piece in routing], samples.tensors) if count else None
        )
        change = self._budget.end_step(self._tap.sampler.sequences, recorded)
        if change is not None:
            self._tap.sampler.policy = change.policy
            self.event("sampling", number, **change.detail())
            self.failures.say("sampling", f"sampling from step {number + 1} on: {change.message()}")

    def _explain_empty(self, sums: StepSums) -> None:
        """A step that missed routers: an error with a remedy at first, a warning and an event later."""
        cause = self.failures.last if self.failures.spoiled else None
        if not self._recorded:
            message = (
                f"recording failed: {type(cause).__name__}: {cause}"
                if cause
                else no_router_seen(self._expected, sums)
            )
            raise ProbeError(message) from cause
        if cause is None:
            message = no_router_seen(self._expected, sums)
            if self.failures.say("empty step", f"{message}; training goes on, such steps have no loads"):
                self.event("empty_step", message=message)

    @property
    def _expected(self) -> list[LayerInfo]:
        """Layers that are here."""
        return [layer for layer in self.info.layers if layer.layer in self._share.layers]

    def _hand_on(self, batch: LoadBatch | SampleBatch | ProbePass) -> None:
        if self._defer:
            self._sink.write(batch)  # type: ignore[arg-type]  # a sink with defer=True takes deferred work
            return
        for record in batch.materialize():
            self._sink.write(record)

    def _write(self, record: Record) -> None:
        try:
            self._sink.write(record)
        except Exception as error:
            self._failed(f"writing {type(record).__name__}", error)

    def _failed(self, where: str, error: Exception, *, name: str = "", spoils: bool = False) -> None:
        """Count an error; write an event the first time. Never raises."""
        self._in_order = False
        if not self.failures.note(where, error, name=name, spoils=spoils):
            return
        detail = {"where": f"{where} {name}".strip(), "error": f"{type(error).__name__}: {error}"}
        try:
            self._sink.write(
                EventRecord(
                    step=self._step, rank=self.rank, ts=time.time(), kind="recording_failed", detail=detail
                )
            )
        except Exception as again:
            self.failures.note("writing an event", again)

    def _give_up(self) -> None:
        self._tap.detach()
        message = (
            f"recording failed in {PATIENCE} steps in a row: the probe detached itself; training goes on"
        )
        self.failures.say("give up", message)
        self.event("detached", message=message)
