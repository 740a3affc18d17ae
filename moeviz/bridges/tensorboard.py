"""TensorBoard: event files in RUN/tensorboard. `tensorboard --logdir runs` shows all runs."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from moeviz.bridges.digest import Digest, alert_text, alert_title, flattened, load_picture, load_values
from moeviz.bridges.opening import TrackedRun
from moeviz.records import AlertRecord


class TensorBoardTracker:
    """Writes event files; a resumed run hides what was logged of the steps that are trained again."""

    def __init__(self, run: TrackedRun) -> None:
        folder = run.path / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=run.resumed_at)
        self.place = str(folder)
        if run.resumed_at is None:
            lines = [f"    {name} = {value}" for name, value in flattened(run.config).items()]
            self._writer.add_text("config", "\n".join(lines))

    def log(self, digest: Digest) -> None:
        for name, value in digest.values.items():
            self._writer.add_scalar(name, value, digest.step)
        if digest.load_LE is not None:
            self._writer.add_image("load", load_picture(digest.load_LE), digest.step, dataformats="HWC")
            self._writer.add_histogram("load_values", load_values(digest.load_LE), digest.step)

    def alert(self, alert: AlertRecord) -> None:
        self._writer.add_text("alerts", f"{alert_title(alert)}: {alert_text(alert)}", alert.updated_step)

    def close(self) -> None:
        self._writer.close()
