"""One run being watched: what the feed said last, the moment that is looked at, and where the eye is.

Knows no terminal. Another run is another `ObservedRun`, so nothing of the one before can stay behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeviz.live import Snapshot
from tui.archive import Source
from tui.drawings.status_line import Status
from tui.playhead import Playhead
from tui.scene import CHANGE_STEPS, Eye, Reference, Scene, highest_load

SILENT_SECONDS = 30.0
"""A feed that hands out the same snapshot for this long is late, whatever the snapshot says."""


class ObservedRun:
    """State of one run on the screen."""

    def __init__(self, run_path: str, clock: Callable[[], float], source: Source | None = None) -> None:
        self.run_path, self.source = run_path, source
        self.eye = Eye()
        self.playhead = Playhead()
        self.trouble = ""
        """Why no new snapshot could be had, if so."""
        self._clock = clock
        self._seen_at = clock()
        self._ended_at: float | None = None

    def start(self) -> None:
        if self.source is not None:
            self.source.feed.start()

    def stop(self) -> None:
        if self.source is not None:
            self.source.feed.stop()
            self.source.archive.close()

    @property
    def latest(self) -> Snapshot | None:
        return self.playhead.latest

    def take(self) -> None:
        """Look at the feed. What it raises becomes `trouble`; the next look may do better."""
        if self.source is None:
            return
        try:
            latest, self.trouble = self.source.feed.latest, ""
        except Exception as error:
            latest, self.trouble = None, str(error) or type(error).__name__
        if latest is not None and latest is not self.latest:
            if self.latest is None or self.latest.step < 0 <= latest.step:
                self._meet(latest)
            self._seen_at = self._clock()
            self.playhead.offer(latest)
        ended = self.latest is not None and self.latest.state in ("ended", "dead")
        if not ended:
            self._ended_at = None
        elif self._ended_at is None:
            self._ended_at = self._clock()

    def _meet(self, snapshot: Snapshot) -> None:
        """The first step that is seen: put the cursor on the first alert, or on the busiest expert."""
        alert = next((alert for alert in snapshot.open_alerts if alert.layer is not None), None)
        place = highest_load(snapshot)
        if alert is not None and alert.layer is not None:
            self.look(layer=alert.layer, expert=alert.experts[0] if alert.experts else 0)
        elif place is not None:
            self.look(layer=place.layer, expert=place.expert)

    @property
    def ended_for(self) -> float | None:
        """Seconds since the run was first seen to have ended, or to be dead."""
        return None if self._ended_at is None else self._clock() - self._ended_at

    def look(self, **changes: Any) -> None:
        """Change where the eye is: fields of `Eye`."""
        self.eye = replace(self.eye, **changes)
        if self.latest is not None:
            self.eye = self.eye.inside(self.latest.info)

    def scene(self, frame: Snapshot, *, with_history: bool) -> Scene:
        """What to draw of `frame`, the playhead's; with the history of the layer for the screen that shows one."""
        self.eye = self.eye.inside(frame.info)
        return Scene(
            snapshot=frame,
            eye=self.eye,
            reference=self._reference(frame) if self.eye.scale == "change" else None,
            history=self.playhead.history(self.eye.layer) if with_history else None,
            version=self.playhead.version,
        )

    def _reference(self, frame: Snapshot) -> Reference | None:
        """The step to compare with, or the oldest known one of a run that is younger."""
        if not len(frame.history_steps_T):
            return None
        known = self.playhead.loads_at(max(frame.step - CHANGE_STEPS, int(frame.history_steps_T[0])))
        return Reference(*known) if known else None

    def status(self, leaving_in: float | None = None) -> Status:
        """What the top line says now."""
        latest = self.latest
        since = self._clock() - self._seen_at
        if latest is not None and latest.state == "live" and since > SILENT_SECONDS:
            latest = replace(latest, state="stale")
        return Status(
            run_name=latest.run_name if latest else Path(self.run_path).name,
            latest=latest,
            behind_seconds=latest.behind_seconds + since if latest else 0.0,
            held_step=self.playhead.held_step,
            replay=self.playhead.replay_speed,
            trouble=self.trouble,
            leaving_in=leaving_in,
            muted=self.eye.muted,
        )
