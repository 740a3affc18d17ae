"""The runs of a study side by side, as tables: kept in its folder, where pages and notebooks read them.

comparison.parquet   a row for each run: varied values, losses, loads, sizes, open alerts
curves.parquet       run, step, name, value: validation loss and MaxVio over training
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from moeviz.errors import MoevizError
from moeviz.store import queries
from moeviz.store.reader import open_run
from trainer.studies.outcome import Outcome

COMPARISON_FILE = "comparison.parquet"
CURVES_FILE = "curves.parquet"


def comparison(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A row for each run, the least validation loss first; runs without one last."""
    frame = pd.DataFrame([outcome.row() for outcome in outcomes])
    return frame.sort_values("val_loss", na_position="last", kind="stable").reset_index(drop=True)


def curves(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Validation loss, and MaxVio of the recent loads as mean over layers, over training.

    Returns: run, step, name (val_loss, maxvio_global), value; ordered by them.
    """
    found = []
    for outcome in outcomes:
        try:
            with open_run(outcome.path) as store:
                losses = queries.scalars(store, ["val_loss"])
                loads = queries.metric_over_time(store, "maxvio_global")
        except MoevizError:
            continue
        loads = loads.groupby("step", as_index=False)["value"].mean().assign(name="maxvio_global")
        found += [table.assign(run=outcome.run) for table in (losses, loads) if len(table)]
    if not found:
        return pd.DataFrame({"run": [], "step": [], "name": [], "value": []})
    rows = pd.concat(found, ignore_index=True)[["run", "step", "name", "value"]]
    return rows.sort_values(["run", "name", "step"], ignore_index=True)


def save(outcomes: Sequence[Outcome], folder: Path) -> pd.DataFrame:
    """Write both tables into `folder`. Returns the comparison."""
    frame = comparison(outcomes)
    frame.to_parquet(folder / COMPARISON_FILE)
    curves(outcomes).to_parquet(folder / CURVES_FILE)
    return frame
