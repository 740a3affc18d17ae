"""trackio: a local SQLite file a project, under TRACKIO_DIR. `trackio show --project moeviz` shows it."""

from __future__ import annotations

import trackio

from moeviz.bridges.digest import Digest, alert_text, alert_title, flattened, load_picture, load_values
from moeviz.bridges.opening import TrackedRun
from moeviz.records import AlertRecord

_BINS = 64
_LEVELS = {"info": trackio.AlertLevel.INFO, "warning": trackio.AlertLevel.WARN}


class TrackioTracker:
    """One trackio run."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = trackio.init(
            project=run.project,
            name=run.name,
            config=flattened(run.config),
            resume="never" if run.resumed_at is None else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.place = f"{trackio.TRACKIO_DIR}, project {run.project}"

    def log(self, digest: Digest) -> None:
        row: dict[str, object] = dict(digest.values)
        if digest.load_LE is not None:
            row["load"] = trackio.Image(load_picture(digest.load_LE))
            row["load_values"] = trackio.Histogram(load_values(digest.load_LE), num_bins=_BINS)
        self._run.log(row, step=digest.step)

    def alert(self, alert: AlertRecord) -> None:
        level = _LEVELS.get(alert.severity, trackio.AlertLevel.ERROR)
        self._run.alert(alert_title(alert), alert_text(alert), level=level)

    def close(self) -> None:
        self._run.finish()
