"""Questions about whole runs: how one fares, and which there are."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moeviz.errors import MoevizError
from moeviz.live import RunState
from moeviz.metrics.load import load_entropy, load_share
from moeviz.store.catalog import find_runs
from moeviz.store.queries_loads import clock_table, last_step, load_matrix
from moeviz.store.queries_series import alerts
from moeviz.store.reader import Store, open_run

STALE_SECONDS = 30.0
DEAD_SECONDS = 120.0
UNBORN_SECONDS = 3600.0
"""A run without a step for so long is presumed dead: loading and compiling a large model take minutes."""
RHYTHM = 10.0
"""A run is late when it waits this many times its own median interval between steps."""

_RUN_COLUMNS = [
    "name",
    "path",
    "state",
    "last_step",
    "planned_steps",
    "loss",
    "worst_entropy",
    "open_alerts",
    "created",
]


def run_state(last_ts: float | None, interval: float, ended: bool, now: float) -> RunState:
    """The word for how a run fares.

    Args:
        last_ts: when training finished the newest step, seconds since the epoch; None before the first.
        interval: median seconds between steps.
        ended: whether the newest attempt said that it ended.
        now: seconds since the epoch.
    """
    if ended:
        return "ended"
    if last_ts is None:
        return "waiting"
    late = max(RHYTHM * interval, STALE_SECONDS)
    silent = now - last_ts
    if silent <= late:
        return "live"
    return "stale" if silent <= max(DEAD_SECONDS, 2 * late) else "dead"


def step_rhythm(store: Store, steps: int = 50) -> tuple[float | None, float]:
    """When the newest step finished (None without one), and the median seconds between the last `steps`."""
    newest = last_step(store)
    if newest is None:
        return None, 0.0
    times = store.frame(
        lambda: (
            f"""SELECT step, max(ts) AS ts FROM {store.source(clock_table(store), newest - steps, newest)}
        WHERE step BETWEEN ? AND ? GROUP BY step ORDER BY step"""
        ),
        [newest - steps, newest],
    )["ts"].to_numpy()
    return float(times[-1]), float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def has_ended(store: Store) -> bool:
    """Whether the last thing that the run said about itself is that it ended."""
    return end_status(store) is not None


def end_status(store: Store) -> str | None:
    """How the run ended by its own words (`finished`, `failed`, `interrupted`, or empty); None while it did not."""
    said = store.frame(
        lambda: (
            f"""SELECT kind, coalesce(detail->>'status', '') AS status FROM {store.source("events")}
        WHERE kind IN ('started', 'resumed', 'ended') ORDER BY ts DESC LIMIT 1"""
        )
    )
    return str(said["status"].iloc[0]) if len(said) and said["kind"].iloc[0] == "ended" else None


def state_of(store: Store, now: float) -> RunState:
    """How a run fares; a run that fell silent is `dead` at once when its process is seen to be gone from this machine.

    A run that never began a step is presumed dead as well, in the end.

    Args:
        now: seconds since the epoch.
    """
    gone = _process_gone(
        store
    )  # before the question whether it ended: what a process said is there when it is gone
    last_ts, interval = step_rhythm(store)
    state = run_state(last_ts, interval, has_ended(store), now)
    silent = now - store.info.created
    if state == "waiting" and silent > (STALE_SECONDS if gone else UNBORN_SECONDS):
        return "dead"
    return "dead" if gone and state == "stale" else state


def _process_gone(store: Store) -> bool:
    """Whether the process of the newest attempt ran on this machine and does so no more."""
    said = store.frame(
        lambda: (
            f"""SELECT detail->>'host' AS host, (detail->>'pid')::BIGINT AS pid FROM {store.source("events")}
        WHERE kind IN ('started', 'resumed') ORDER BY ts DESC LIMIT 1"""
        )
    )
    if said.empty or said["host"].iloc[0] != platform.node() or not said["pid"].iloc[0] > 0:
        return False
    try:
        os.kill(int(said["pid"].iloc[0]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def list_runs(folder: str | Path) -> pd.DataFrame:
    """The runs directly in `folder`, newest first.

    Returns: name, path, state, last_step, planned_steps, loss (newest), worst_entropy (lowest entropy of the
    load / ln E over the layers, newest step), open_alerts, created (seconds since the epoch). A run that
    cannot be read is listed with state `unreadable`.
    """
    rows = [_summary(path) for path, _ in find_runs(folder)]
    return pd.DataFrame(rows, columns=_RUN_COLUMNS)


def _summary(path: Path) -> dict[str, Any]:
    try:
        with open_run(path) as store:
            last_ts, interval = step_rhythm(store)
            loss = store.frame(
                lambda: (
                    f"""SELECT value FROM {store.source("scalars")} WHERE name = 'loss'
                ORDER BY step DESC LIMIT 1"""
                )
            )["value"]
            return {
                "name": store.info.name,
                "path": str(path),
                "state": run_state(last_ts, interval, has_ended(store), time.time()),
                "last_step": last_step(store),
                "planned_steps": store.info.planned_steps,
                "loss": float(loss.iloc[0]) if len(loss) else np.nan,
                "worst_entropy": _worst_entropy(load_matrix(store)),
                "open_alerts": len(alerts(store, open_only=True)),
                "created": store.info.created,
            }
    except MoevizError:
        return {"name": path.name, "path": str(path), "state": "unreadable"}


def _worst_entropy(loads: pd.DataFrame) -> float:
    """Smallest normalised entropy of the load over layers, 0 to 1; NaN without loads."""
    by_layer = [load_entropy(load_share(counts.to_numpy())) for _, counts in loads.groupby("layer")["count"]]
    return float(np.nanmin(by_layer)) if by_layer else float("nan")
