"""What the Compare page asks of many runs: each is opened, read and closed, and asked again when it was written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from dashboards.data import Answer
from moeviz.errors import MoevizError
from moeviz.store import queries
from moeviz.store.reader import open_run
from moeviz.store.run import DATABASE_FILE, RUN_FILE

_WRITTEN = (".", RUN_FILE, DATABASE_FILE, "scalars", "metrics", "alerts")
"""Parts of a run folder whose times tell that there is something new."""


def curves(paths: Mapping[str, Path], names: Sequence[str], kind: str, name: str) -> Answer:
    """One number of several runs over steps. Returns: run, step, value; runs without it are left out.

    Args:
        names: runs, by their names in `paths`.
        kind: scalar, or metric: the mean over layers.
    """
    found = [
        _curve(str(paths[run]), _stamp(paths[run]), kind, name).assign(run=run)[["run", "step", "value"]]
        for run in names
    ]
    asked = (
        f'queries.scalars(run, ["{name}"])'
        if kind == "scalar"
        else f'queries.metric_over_time(run, "{name}").groupby("step")["value"].mean()'
    )
    frame = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["run", "step", "value"])
    return Answer(frame, asked)


def table(paths: Mapping[str, Path], names: Sequence[str]) -> pd.DataFrame:
    """A row for each run: run, step, val_loss, maxvio_global (mean over layers), alerts, parameters."""
    return pd.DataFrame([{"run": run, **_summary(str(paths[run]), _stamp(paths[run]))} for run in names])


def _stamp(path: Path) -> float:
    """When the run was written to."""
    if path.is_file():
        return path.stat().st_mtime
    return max((part.stat().st_mtime for name in _WRITTEN if (part := path / name).exists()), default=0.0)


@st.cache_data(max_entries=512, show_spinner=False)
def _curve(path: str, stamp: float, kind: str, name: str) -> pd.DataFrame:
    try:
        with open_run(path) as store:
            if kind == "scalar":
                return queries.scalars(store, [name])[["step", "value"]]
            rows = queries.metric_over_time(store, name)
    except MoevizError:
        return pd.DataFrame({"step": [], "value": []})
    return rows.groupby("step", as_index=False)["value"].mean()


@st.cache_data(max_entries=256, show_spinner=False)
def _summary(path: str, stamp: float) -> dict[str, Any]:
    losses, loads = (
        _curve(path, stamp, kind, name)
        for kind, name in (("scalar", "val_loss"), ("metric", "maxvio_global"))
    )
    told: dict[str, Any] = {"step": None, "val_loss": None, "maxvio_global": None, "alerts": "unreadable"}
    if len(losses):
        told["val_loss"] = float(losses["value"].iloc[-1])
    if len(loads):
        told["maxvio_global"] = float(loads["value"].iloc[-1])
    try:
        with open_run(path) as store:
            open_alerts = queries.alerts(store, open_only=True)
            told["step"] = queries.last_step(store)
            told["alerts"] = ", ".join(sorted(set(open_alerts["rule"]))) or "none"
            told["parameters"] = store.info.model.num_parameters
    except MoevizError:
        told["parameters"] = None
    return told
