"""An error in any stage between the probe and the disk leaves training as it is, bit by bit."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from capture_models import Trained, batches, small_model, train

import moeviz
import moeviz.store.background
from moeviz.capture.probe import Probe
from moeviz.policy import SamplingPolicy
from moeviz.store.queries import events

STEPS = 5
OFTEN = SamplingPolicy(route_every=1, attention_every=1)


class Broken(RuntimeError):
    """What the stages raise."""


def raising(error: BaseException) -> Callable[..., Any]:
    def instead(*args: Any, **kwargs: Any) -> Any:
        raise error

    return instead


def dead_at_once(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
    """A sidecar that leaves before it did anything."""
    return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])


FULL = OSError(errno.ENOSPC, "No space left on device")
STAGES: dict[str, tuple[str, Callable[..., Any]]] = {
    "queue": ("queue of the probe", raising(Broken("queue"))),
    "queue's thread dies": ("moeviz.store.background.BackgroundSink._deliver", raising(SystemExit())),
    "flush of the queue": ("moeviz.store.background.BackgroundSink.flush", raising(Broken("flush"))),
    "making records": ("moeviz.capture.load_batch.LoadBatch.materialize", raising(Broken("records"))),
    "metrics": ("moeviz.derive.DeriveSink._from_loads", raising(Broken("metrics"))),
    "encoding samples": ("moeviz.store.writer.encode_samples", raising(Broken("encoding"))),
    "encoding steps": ("moeviz.store.writer.encode_steps", raising(Broken("encoding"))),
    "disk": ("moeviz.store.writer.write_segment", raising(FULL)),
    "sidecar does not start": ("moeviz.store.writer.start_compactor", raising(FULL)),
    "sidecar dies": ("moeviz.store.writer.start_compactor", dead_at_once),
    "packing": ("moeviz.session.finish_run", raising(Broken("packing"))),
}
LOADS_SURVIVE = (
    "metrics",
    "flush of the queue",
    "encoding samples",
    "sidecar does not start",
    "sidecar dies",
    "packing",
)


class BrokenQueue(deque[Any]):
    """Takes nothing more."""

    def append(self, item: Any) -> None:
        raise Broken("queue")


def watched(path: Path, break_it: Callable[[Probe], None], pack: bool) -> tuple[Trained, Probe]:
    """Train with a probe; what is to break breaks after the first step."""
    model = small_model()
    probe = moeviz.watch(model, path, policy=OFTEN, name="faults", pack=pack)

    def after(loss: float) -> None:
        probe.step(loss=loss)
        if probe.next_step == 1:
            probe.flush()
            break_it(probe)
        elif probe.next_step % 2:
            probe.flush()

    return train(model, list(batches(STEPS, 2)), after), probe


@pytest.fixture(scope="module")
def unwatched() -> Trained:
    return train(small_model(), list(batches(STEPS, 2)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_stage_costs_training_nothing(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unwatched: Trained
) -> None:
    target, instead = STAGES[stage]
    monkeypatch.setattr("moeviz.store.writer._SIDECAR_SEGMENTS", 1)
    monkeypatch.setattr("moeviz.store.background.BackgroundSink.close", short_close)

    def break_it(probe: Probe) -> None:
        if stage == "queue":
            probe._sink._inner._queue = BrokenQueue()  # type: ignore[attr-defined]
        else:
            monkeypatch.setattr(target, instead)

    trained, probe = watched(tmp_path / "run", break_it, pack=stage == "packing")
    probe.close()
    assert trained.same_bits(unwatched)
    with moeviz.open_run(tmp_path / "run") as store:
        loads = store.sql("SELECT DISTINCT step FROM expert_load ORDER BY step")["step"].tolist()
        kinds = set(events(store)["kind"])
    assert loads == (list(range(STEPS)) if stage in LOADS_SURVIVE else [0])
    assert "started" in kinds


_CLOSE = moeviz.store.background.BackgroundSink.close


def short_close(sink: Any, timeout: float = 30.0) -> Any:
    return _CLOSE(sink, 1.0)
