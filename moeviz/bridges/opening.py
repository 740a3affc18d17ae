"""The trackers by name, opened for a run. Each comes with an extra of its own; a missing one says so at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moeviz.bridges.bridge import Bridge, Bridged
from moeviz.bridges.tracker import Tracker
from moeviz.errors import MoevizError, require
from moeviz.records import Sink


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Which trackers are told, and how often."""

    names: tuple[str, ...] = ()
    """Of TRACKERS."""
    project: str = "moeviz"
    """Project of the run in W&B and trackio."""
    every: int = 10
    """Steps between two that metrics and loads are told of; scalars are told always."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise MoevizError(f"tracker_every={self.every} is below 1; 10 is usual")


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told about the run as a whole."""

    path: Path
    name: str
    run_id: str
    project: str = "moeviz"
    config: Mapping[str, Any] = field(default_factory=dict)
    resumed_at: int | None = None
    """First step that is trained again; None for a new run."""


def _tensorboard(run: TrackedRun) -> Tracker:
    from moeviz.bridges.tensorboard import TensorBoardTracker

    return TensorBoardTracker(run)


def _wandb(run: TrackedRun) -> Tracker:
    from moeviz.bridges.wandb import WandbTracker

    return WandbTracker(run)


def _trackio(run: TrackedRun) -> Tracker:
    from moeviz.bridges.trackio import TrackioTracker

    return TrackioTracker(run)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
}
"""By the name of their package, which is also that of their extra."""


def check_trackers(names: Iterable[str]) -> None:
    """Refuse what cannot be opened, before anything is built.

    Raises:
        MoevizError: no such tracker.
        MissingExtraError: its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise MoevizError(f"no tracker {name!r}; there are {', '.join(TRACKERS)}")
        require(name, name, f"logging to {name}")


def bridged(inner: Sink, path: Path, tracking: Tracking, resumed_at: int | None = None) -> Sink:
    """A sink that also tells the trackers what goes into the run at `path`; `inner` itself if there are none.

    Args:
        inner: where all records go.
        path: an open run; its run.json names the run, and the trackers that write files put them there.
        tracking: which trackers.
        resumed_at: first step that is trained again; None for a new run.

    Raises:
        As `check_trackers`. What fails later is logged once and counted.
    """
    names = list(dict.fromkeys(tracking.names))
    if not names:
        return inner
    check_trackers(names)
    from moeviz.store.run import read_info  # late: a command line is parsed without pyarrow

    info = read_info(path)
    run = TrackedRun(
        path=path,
        name=info.name,
        run_id=info.run_id,
        project=tracking.project,
        config=info.config,
        resumed_at=resumed_at,
    )
    bridges = [Bridge(name, partial(TRACKERS[name], run)) for name in names]
    return Bridged(inner, bridges, info.model, tracking.every)
