"""What a live view shows: one immutable `Snapshot`, made by a `Feed` thread and read by every widget and fragment.

Widgets never touch the store. They read `feed.latest` and return at once when its `revision` did not move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from moeviz.records import AlertRecord, ModelInfo

RunState = Literal["waiting", "live", "stale", "ended", "dead"]
"""waiting: no step yet; live; stale: late against its own rhythm; ended: said so; dead: no write for 120 s."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One scalar over steps, oldest first, ready to draw."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """The newest complete step of a run with as much history as a screen can show.

    T history ticks (oldest first, at most the feed's `history`), L MoE layers, E = the largest number of experts;
    columns past a layer's own number are NaN.
    """

    run_name: str
    run_path: str
    info: ModelInfo
    state: RunState
    revision: int
    """Grows by one whenever anything below changed."""
    behind_seconds: float
    """Age of the newest step: now minus the time at which training finished it."""
    step: int
    """Newest step, -1 while waiting."""
    planned_steps: int | None
    tokens: int
    """Valid tokens of the newest step."""
    load_rel_LE: np.ndarray
    """float32. Relative load r = E x share of the newest step; 1 is even, E/K the most possible."""
    load_rel_ema_LE: np.ndarray
    """float32. Exponential moving average of `load_rel_LE` over about 20 steps."""
    history_steps_T: np.ndarray
    load_entropy_TL: np.ndarray
    """float32. Entropy of the load / ln E, 0 to 1."""
    route_entropy_TL: np.ndarray
    """float32. Mean entropy of a token's scores / ln E, 0 to 1; NaN where it was not recorded."""
    max_load_TL: np.ndarray
    """float32. Largest relative load."""
    n_eff_L: np.ndarray
    """float32. Effective experts exp(H) of the newest step."""
    drop_rate_L: np.ndarray
    """float32. Share of assignments dropped; 0 for a dropless model."""
    scalars: Mapping[str, Series]
    """loss, lr, grad_norm, tokens_per_second, ... over steps."""
    alerts: tuple[AlertRecord, ...] = ()
    """Latest state of every episode: open ones first, worst first, then cleared ones, newest first."""
    dropped_samples: int = 0
    """Token-level samples that the recorder had to drop so far."""
    notes: tuple[str, ...] = field(default=())
    """What is missing or damaged in the run folder, one sentence each."""

    @property
    def open_alerts(self) -> tuple[AlertRecord, ...]:
        return tuple(alert for alert in self.alerts if alert.cleared_step is None)


class Feed(Protocol):
    """A source of snapshots. `moeviz.store.feed.RunFeed` polls a run folder; tests inject a list."""

    @property
    def latest(self) -> Snapshot | None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...
