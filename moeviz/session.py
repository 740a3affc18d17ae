"""`watch`: attach a probe to a model and keep what it sees in a run folder.

The only place where capture and store meet:

    probe -> BackgroundSink (queue, thread) -> DeriveSink (metrics, alerts) -> SegmentWriter -> run folder
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from moeviz.alerts import RULES, AlertConfig, RunPlan
from moeviz.bridges import Tracking, bridged, check_trackers
from moeviz.capture.probe import Probe, attach
from moeviz.capture.reading import Adapter
from moeviz.capture.sites import find_sites
from moeviz.capture.stages import share_of
from moeviz.capture.tap import When
from moeviz.derive import TOGETHER, DeriveSink
from moeviz.errors import MoevizError
from moeviz.policy import SamplingPolicy
from moeviz.ranks import Ranks
from moeviz.records import AlertRecord, EventRecord, ModelInfo, Record, Sink
from moeviz.store.past import read_past
from moeviz.store.presence import Presence
from moeviz.store.run import RunInfo, create_run, finish_run, read_info, resume_run, write_info, write_vocab
from moeviz.store.segments import sampled_bytes
from moeviz.store.writer import BackgroundSink, SegmentWriter
from moeviz.vocabulary import describe_tokenizer, token_texts

_log = logging.getLogger("moeviz")

_RULES = "alert_rules"
"""Where run.json's config keeps the thresholds of the alerts."""


def watch(
    model: nn.Module,
    run: str | os.PathLike[str] | None = None,
    *,
    sink: Sink | None = None,
    policy: SamplingPolicy | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    vocab: Sequence[str] | None = None,
    planned_steps: int | None = None,
    plan: RunPlan | None = None,
    resume_from: int | None = None,
    alerts: bool | AlertConfig = True,
    on_alert: Callable[[AlertRecord], None] | None = None,
    info: ModelInfo | None = None,
    rank: int | None = None,
    across_ranks: bool = True,
    when: When = "training",
    adapters: Sequence[Adapter] = (),
    pack: bool = True,
    probe_batch: Any = None,
    probe_every: int = 100,
    trackers: Sequence[str] | Tracking = (),
) -> Probe:
    """Watch a Mixture-of-Experts model from here on. Call it before torch.compile, and on every rank.

        with moeviz.watch(model, "runs/mine") as probe:
            for batch in batches:
                loss = model(**batch).loss
                ...
                probe.step(loss=loss)

    Args:
        model: any model that an adapter knows, also wrapped in DistributedDataParallel or a DeepSpeed engine.
        run: folder of the run, made here.
        sink: write records to this instead of a run folder; called from the training thread.
        policy: how much token-level routing and attention is sampled.
        name: of the run; by default that of its folder.
        config: the run's own configuration, kept as it is; the thresholds of the alerts are added as `alert_rules`.
        tokenizer: a tiktoken or transformers tokenizer, or a note which one it was.
        vocab: the text of each token id, where `tokenizer` cannot tell.
        planned_steps: for progress displays and alert rules.
        plan: more of what alert rules should know (warm-up, clipping); by default the planned steps.
        resume_from: go on in an existing run folder, with this step as the first one.
        alerts: thresholds; False raises none. Metrics are derived either way. True means the defaults, or in a
            resumed run those that it had.
        on_alert: called in the writer thread with every transition of an alert; a `moeviz.alerts.Notifier` hands
            it on to a command or a web hook in a thread of its own.
        info: replaces the description of the model found by moeviz.
        rank: of this process; by default that of torch.distributed, or 0.
        across_ranks: sum loads over all ranks of torch.distributed. Every rank must call `watch` then.
        when: "training" measures forwards in train mode with gradients on, "always" every forward.
        adapters: for routers that moeviz does not know.
        pack: turn the run into one DuckDB file when it ends without an error.
        probe_batch: a fixed probe, run in evaluation mode beside training to see decisions settle and experts
            specialise: token ids [N, S], or the model's keyword arguments as a mapping, in which `domains` may name
            each sequence. The same on every rank, and again after a resume.
        probe_every: run the probe after every n-th step; 0: only when `Probe.run_probe` is called.
        trackers: also log scalars, metrics, load pictures and alerts to "wandb", "tensorboard" or "trackio"; a
            `moeviz.bridges.Tracking` says how often, and to which project.

    Raises:
        ProbeError: a dense or compiled model, or routers that no adapter reads.
        MoevizError: neither or both of `run` and `sink`; a folder that holds a run, without `resume_from`.
        RunNotFoundError, CorruptRunError: nothing to resume.
        MissingExtraError: a tracker's package is not installed.
    """
    tracking = trackers if isinstance(trackers, Tracking) else Tracking(names=tuple(trackers))
    check_trackers(tracking.names)
    policy = policy or SamplingPolicy()
    if (run is None) == (sink is None):
        raise MoevizError("watch needs either a run folder or a sink; call watch(model, 'runs/NAME')")
    sites = find_sites(model, adapters)
    found = sites.info
    ranks = Ranks.of_process(rank, across_ranks)
    share = share_of(sites.root, sites.routers, ranks.group)
    first_step = resume_from or 0
    options: dict[str, Any] = {
        "policy": policy,
        "info": info,
        "rank": ranks.rank,
        "first_step": first_step,
        "when": when,
        "adapters": adapters,
        "process_group": ranks.group,
        "share": share,
        "probe_batch": probe_batch,
        "probe_every": probe_every,
    }
    if sink is not None:
        return attach(model, sink, **options)
    assert run is not None
    path = Path(run)
    if alerts is True:
        alerts = AlertConfig() if resume_from is None else stored_rules(path)
    description = RunInfo(
        name=name or path.resolve().name,
        model=info or found,
        policy=asdict(policy),
        config=with_rules(config or {}, alerts),
        planned_steps=planned_steps,
        ranks=ranks.size,
        tokenizer=describe_tokenizer(tokenizer),
    )
    if resume_from is not None and policy.has_budget:
        options["spent_bytes"] = sampled_bytes(path, ranks.rank)
    ranks.first_then_all(lambda: _open(path, description, resume_from, token_texts(tokenizer, vocab)))
    inner: Sink = SegmentWriter(path, ranks.rank, flush_seconds=math.inf)  # the queue says when
    first = ranks.rank == 0 or ranks.group is None
    if first or share.replica == 0:  # what later stages alone see has alerts too
        inner = deriving(
            bridged(inner, path, tracking, resume_from) if first else inner,
            path,
            description.model,
            resume_from=resume_from,
            rank=ranks.rank,
            alerts=alerts,
            plan=plan or RunPlan(planned_steps=planned_steps),
            on_alert=on_alert,
        )
    closing = _RunSink(inner, path, ranks, pack)
    try:
        probe = attach(model, closing, defer=True, **options)
    except BaseException:
        closing.close()
        raise
    probe.on_close = lambda error: closing.end(probe, error)
    kind = "started" if resume_from is None else "resumed"
    probe.event(kind, host=platform.node(), pid=os.getpid(), ranks=ranks.size)
    return probe


def _open(path: Path, description: RunInfo, resume_from: int | None, texts: Sequence[str]) -> None:
    """Make the run folder, or begin a new attempt in it."""
    if resume_from is None:
        create_run(path, description)
    else:
        _same_model(read_info(path).model, description.model, path)
        resume_run(path, resume_from)
        keep_rules(path, description.config)
    if texts:
        write_vocab(path, texts)


def _same_model(before: ModelInfo, now: ModelInfo, path: Path) -> None:
    shape = [[(layer.num_experts, layer.top_k) for layer in info.layers] for info in (before, now)]
    if shape[0] != shape[1]:
        raise MoevizError(
            f"{path} holds a run with layers of (experts, top-k) {shape[0]}, this model has {shape[1]}; "
            "give the run another name, or resume with the same model"
        )


def with_rules(config: Mapping[str, Any], alerts: bool | AlertConfig) -> dict[str, Any]:
    """The configuration of a run with the thresholds of its alerts, for run.json."""
    return {**config, _RULES: asdict(alerts)} if isinstance(alerts, AlertConfig) else dict(config)


def stored_rules(path: Path) -> AlertConfig:
    """The thresholds that a run was judged by so far; the defaults where it does not say."""
    return AlertConfig.from_dict(read_info(path).config.get(_RULES) or {})


def keep_rules(path: Path, config: Mapping[str, Any]) -> None:
    """Note the thresholds of a resumed run, where they changed."""
    info = read_info(path)
    if _RULES in config and info.config.get(_RULES) != config[_RULES]:
        write_info(path, replace(info, config={**info.config, _RULES: config[_RULES]}))


def deriving(
    inner: Sink,
    path: Path,
    model: ModelInfo,
    *,
    resume_from: int | None = None,
    rank: int = 0,
    alerts: bool | AlertConfig = True,
    plan: RunPlan | None = None,
    on_alert: Callable[[AlertRecord], None] | None = None,
) -> DeriveSink:
    """A sink that adds metrics and alerts to what `inner` writes into the run folder `path`.

    After a resume it goes on with the statistics and the open alerts of the steps before. Parameters as of `watch`.
    """
    config = alerts if isinstance(alerts, AlertConfig) else None
    if alerts is False:
        inner, on_alert = _WithoutAlerts(inner), None
    sink = DeriveSink(inner, model, plan=plan, config=config, on_alert=on_alert, together=TOGETHER)
    if resume_from is not None:
        try:
            past = read_past(path, resume_from, rank)
            known = {row.id for row in RULES}
            sink.replay(past.records, [alert for alert in past.open_alerts if alert.rule in known])
        except Exception:
            _log.exception("the alerts of %s start anew: what was recorded before could not be read", path)
    return sink


class _WithoutAlerts:
    """A sink that leaves alerts out."""

    def __init__(self, inner: Sink) -> None:
        self._inner = inner
        self.flush, self.close = inner.flush, inner.close

    def write(self, record: Record) -> None:
        if not isinstance(record, AlertRecord):
            self._inner.write(record)


class _RunSink:
    """The end of a run: its last event, the last flush on every rank, and then packing on the first."""

    def __init__(self, inner: Sink, path: Path, ranks: Ranks, pack: bool) -> None:
        self._presence = Presence(path)
        self._inner = BackgroundSink(inner, is_read=self._presence.is_read)
        self._path, self._ranks, self._pack = path, ranks, pack
        self._clean = False
        self.write = self._inner.write

    def flush(self) -> None:
        self._inner.flush()

    def end(self, probe: Probe, error: BaseException | None) -> None:
        """Say how the run ended; whether it is packed follows from it."""
        self._clean = error is None
        interrupted = isinstance(error, KeyboardInterrupt)
        detail: dict[str, Any] = {
            "status": "finished" if error is None else "interrupted" if interrupted else "failed"
        }
        if error is not None and not interrupted:
            detail["error"] = f"{type(error).__name__}: {error}"
        detail["probe_seconds"] = round(probe.seconds, 3)
        if probe.failures.count:
            detail["recording_errors"] = probe.failures.count
        self._inner.write(
            EventRecord(step=probe.next_step, rank=probe.rank, ts=time.time(), kind="ended", detail=detail)
        )

    def close(self) -> None:
        stats = self._inner.close()
        self._presence.close()
        if not (self._clean and self._pack):
            return
        if self._ranks.wait() and self._ranks.rank == 0 and not stats.lost:
            finish_run(self._path)
