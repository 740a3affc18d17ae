"""Which moment is on the screen: the newest, one that is held, or an older one that is looked back at.

A look back is an ordinary snapshot cut to that step, so every drawing works on the past without knowing it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeviz.live import Series, Snapshot
from moeviz.records import AlertRecord
from tui.scene import LayerHistory, LoadHistory

REPLAY_SPEEDS = (0, 1, 4, 16)
_MEAN_STEPS = 20


class Playhead:
    """Holds the newest snapshot, a position in its history, and the loads of older steps as far as they are known."""

    def __init__(self) -> None:
        self.latest: Snapshot | None = None
        self.replay_speed = 0
        self._base: Snapshot | None = None
        self._step: int | None = None
        self._loads: dict[int, np.ndarray] = {}
        self._content = 0

    @property
    def version(self) -> tuple[int, int | None, bool]:
        """Moves when `frame` looks different."""
        return (self._content, self._step, self._step is not None and self._step in self._loads)

    @property
    def held_step(self) -> int | None:
        """The step that is held, None while the newest is shown."""
        return self._step

    def offer(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot of the feed."""
        if self.latest is not None and snapshot.run_path != self.latest.run_path:
            self._base, self._step, self._loads, self.replay_speed = None, None, {}, 0
        if self._step is None and not _looks_like(snapshot, self.latest):
            self._content += 1
        self.latest = snapshot
        if snapshot.step >= 0:
            self._loads[snapshot.step] = snapshot.load_rel_LE
        if len(snapshot.history_steps_T) and self._base is None:
            oldest = int(snapshot.history_steps_T[0])
            for step in [step for step in self._loads if step < oldest]:
                del self._loads[step]

    def frame(self) -> Snapshot | None:
        """The snapshot to draw."""
        if self._step is None or self._base is None:
            return self.latest
        return self._base if self._step == self._base.step else rewind(self._base, self._step, self._loads)

    def pause(self) -> None:
        """Hold what is on the screen, or go back to the newest step."""
        if self._step is None:
            self._hold(self.latest.step if self.latest else -1)
        else:
            self.newest()

    def move(self, ticks: int) -> None:
        """Go back or forward by history ticks; past the newest one time runs on by itself again."""
        if self.latest is None or self.latest.step < 0:
            return
        if self._step is None:
            if ticks > 0:
                return
            self._hold(self.latest.step)
        assert self._base is not None
        assert self._step is not None
        if ticks > 0 and self._step >= self._base.step:
            self._base = self.latest
            self._content += 1
        steps = self._base.history_steps_T
        at = int(np.searchsorted(steps, self._step)) + ticks
        if at >= len(steps):
            self.newest()
        else:
            self._step = int(steps[max(at, 0)])

    def first(self) -> None:
        """Go to the oldest step of the history."""
        if self.latest is not None and len(self.latest.history_steps_T):
            self._hold(int(self.latest.history_steps_T[0]))

    def newest(self) -> None:
        """Follow the run again."""
        self._content += 1
        self._base, self._step, self.replay_speed = None, None, 0

    def replay(self) -> None:
        """Next replay speed; from the oldest step if the newest was on the screen."""
        at = (REPLAY_SPEEDS.index(self.replay_speed) + 1) % len(REPLAY_SPEEDS)
        if self._step is None and at:
            self.first()
        if self._step is not None:
            self.replay_speed = REPLAY_SPEEDS[at]

    def tick(self) -> None:
        """Advance a replay by one refresh."""
        if self.replay_speed:
            self.move(self.replay_speed)

    def fill(self, history: LoadHistory, asked: tuple[int, int] | None = None) -> None:
        """Learn the loads of older steps; steps in `asked` (first, last) without any stay unknown for good."""
        for step, loads_LE in zip(history.steps.tolist(), history.load_rel_TLE, strict=True):
            self._loads.setdefault(step, loads_LE)
        if asked is not None and self.latest is not None:
            unknown_LE = np.full_like(self.latest.load_rel_LE, np.nan)
            for step in self.latest.history_steps_T.tolist():
                if asked[0] <= step <= asked[1]:
                    self._loads.setdefault(step, unknown_LE)

    def missing(self) -> tuple[int, int] | None:
        """First and last step of the shown history whose loads are not known yet."""
        shot = self._base or self.latest
        if shot is None:
            return None
        unknown = [step for step in shot.history_steps_T.tolist() if step not in self._loads]
        return (unknown[0], unknown[-1]) if unknown else None

    def history(self, layer: int) -> LayerHistory | None:
        """Known loads of a layer up to the moment on the screen, oldest first; None when there is only that one."""
        frame = self.frame()
        if frame is None or layer >= frame.info.num_layers:
            return None
        steps = [step for step in frame.history_steps_T.tolist() if step in self._loads]
        if len(steps) < 2:
            return None
        return LayerHistory(np.array(steps), np.stack([self._loads[step][layer] for step in steps]))

    def loads_at(self, step: int) -> tuple[int, np.ndarray] | None:
        """The known loads nearest to `step`, within a tenth of the way to the moment on the screen."""
        frame = self.frame()
        if frame is None or not self._loads:
            return None
        nearest = min(self._loads, key=lambda known: abs(known - step))
        if nearest >= frame.step or abs(nearest - step) > max((frame.step - step) // 10, 1):
            return None
        return nearest, self._loads[nearest]

    def _hold(self, step: int) -> None:
        self._base = self.latest
        self._step = step if step >= 0 else None
        self._content += 1


def _looks_like(new: Snapshot, old: Snapshot | None) -> bool:
    """Whether only the age differs: a feed hands on the arrays that did not change."""
    return old is not None and (
        new.step == old.step
        and new.load_rel_LE is old.load_rel_LE
        and new.scalars is old.scalars
        and new.alerts == old.alerts
        and new.notes == old.notes
        and new.dropped_samples == old.dropped_samples
    )


def rewind(shot: Snapshot, step: int, loads: dict[int, np.ndarray]) -> Snapshot:
    """`shot` as it was at `step` of its history. What was not kept is NaN: drops, and loads that are not in `loads`."""
    upto = int(np.searchsorted(shot.history_steps_T, step, side="right"))
    recent = [
        loads[at] for at in shot.history_steps_T[max(upto - _MEAN_STEPS, 0) : upto].tolist() if at in loads
    ]
    unknown_LE = np.full_like(shot.load_rel_LE, np.nan)
    entropy_TL = shot.load_entropy_TL[:upto]
    num_experts_L = np.array([layer.num_experts for layer in shot.info.layers])
    return replace(
        shot,
        step=step,
        load_rel_LE=loads.get(step, unknown_LE),
        load_rel_ema_LE=np.mean(recent, axis=0) if recent else unknown_LE,
        history_steps_T=shot.history_steps_T[:upto],
        load_entropy_TL=entropy_TL,
        route_entropy_TL=shot.route_entropy_TL[:upto],
        max_load_TL=shot.max_load_TL[:upto],
        n_eff_L=np.exp(entropy_TL[-1] * np.log(num_experts_L)),
        drop_rate_L=np.full_like(shot.drop_rate_L, np.nan),
        scalars={name: _upto(series, step) for name, series in shot.scalars.items()},
        alerts=_alerts_at(shot.alerts, step),
    )


def _upto(series: Series, step: int) -> Series:
    end = int(np.searchsorted(series.steps, step, side="right"))
    return Series(steps=series.steps[:end], values=series.values[:end])


def _alerts_at(alerts: tuple[AlertRecord, ...], step: int) -> tuple[AlertRecord, ...]:
    """The episodes that had been raised by `step`, those cleared later still open."""
    raised = [alert for alert in alerts if alert.raised_step <= step]
    return tuple(
        replace(alert, cleared_step=None)
        if alert.cleared_step is not None and alert.cleared_step > step
        else alert
        for alert in raised
    )
