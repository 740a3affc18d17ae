"""Weights & Biases. Offline where WANDB_MODE says so, and where there is no API key: nothing ever asks for one.

An offline run lies in RUN/wandb; `wandb sync RUN/wandb/offline-run-*` uploads it.
"""

from __future__ import annotations

import os

import numpy as np
import wandb

from moeviz.bridges.digest import Digest, alert_text, alert_title, load_picture, load_values
from moeviz.bridges.opening import TrackedRun
from moeviz.records import AlertRecord

_BINS = 64
_LEVELS = {"info": wandb.AlertLevel.INFO, "warning": wandb.AlertLevel.WARN}


class WandbTracker:
    """One W&B run, beside any that the process has of its own. A resumed run goes on under its id."""

    def __init__(self, run: TrackedRun) -> None:
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.project),
            name=run.name,
            id=run.run_id,
            dir=str(run.path),
            config=dict(run.config),
            mode=mode,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Rows of one step come apart and late ones after others: the step is a column, not the row's number.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.place = str(self._run.dir) if mode == "offline" else str(self._run.url)

    def log(self, digest: Digest) -> None:
        row: dict[str, object] = {"step": digest.step, **digest.values}
        if digest.load_LE is not None:
            row["load"] = wandb.Image(load_picture(digest.load_LE))
            row["load_values"] = wandb.Histogram(
                np_histogram=np.histogram(load_values(digest.load_LE), _BINS)
            )
        self._run.log(row)

    def alert(self, alert: AlertRecord) -> None:
        level = _LEVELS.get(alert.severity, wandb.AlertLevel.ERROR)
        self._run.alert(alert_title(alert), alert_text(alert), level=level)

    def close(self) -> None:
        self._run.finish()
