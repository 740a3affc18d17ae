"""Screen 5: every alert episode of the run, with what it means and what to do."""

from __future__ import annotations

from collections.abc import Hashable

from textual.app import ComposeResult
from textual.containers import Horizontal

from moeviz.records import AlertRecord
from tui.drawings.alert_list import draw_alert_detail, draw_alert_table
from tui.ink import Ink
from tui.lines import Panel
from tui.scene import Scene
from tui.screens.base import RunScreen, screen_bindings
from tui.widgets.pane import Pane

Subject = tuple[Scene, tuple[AlertRecord, ...], int]


def _table(subject: Subject, ink: Ink, width: int, height: int) -> Panel:
    scene, alerts, selected = subject
    return draw_alert_table(scene, ink, width, height, alerts, selected)


def _detail(subject: Subject, ink: Ink, width: int, height: int) -> Panel:
    scene, alerts, selected = subject
    return draw_alert_detail(scene, ink, width, height, alerts[selected] if selected < len(alerts) else None)


class AlertsScreen(RunScreen):
    NAME = "alerts"
    FRONT = "table"
    NEEDS_STEP = False
    BINDINGS = screen_bindings("alerts")

    def __init__(self) -> None:
        super().__init__()
        self._episode: str | None = None

    def compose_body(self) -> ComposeResult:
        with Horizontal(classes="column body"):
            yield Pane(_table, id="table")
            yield Pane(_detail, id="detail", classes="pane")

    def subjects(self, scene: Scene) -> dict[str, tuple[object, Hashable]]:
        subject = (scene, scene.snapshot.alerts, self._selected(scene))
        return dict.fromkeys(("table", "detail"), (subject, (scene.key, subject[2])))

    def _selected(self, scene: Scene) -> int:
        """The selection follows its episode when the list moves."""
        episodes = [alert.episode for alert in scene.snapshot.alerts]
        return episodes.index(self._episode) if self._episode in episodes else 0

    @property
    def alert(self) -> AlertRecord | None:
        if self.scene is None or not self.scene.snapshot.alerts:
            return None
        return self.scene.snapshot.alerts[self._selected(self.scene)]

    def select(self, episode: str) -> None:
        self._episode = episode

    def action_select(self, direction: int) -> None:
        if self.scene is None or not self.scene.snapshot.alerts:
            return
        alerts = self.scene.snapshot.alerts
        at = min(max(self._selected(self.scene) + direction, 0), len(alerts) - 1)
        self._episode = alerts[at].episode
        self.moeviz.refresh_view()

    def action_acknowledge(self) -> None:
        if self.alert is not None:
            self.moeviz.look(acknowledged=self.moeviz.eye.acknowledged ^ {self.alert.episode})

    def action_mute(self) -> None:
        if self.alert is not None:
            self.moeviz.look(muted=self.moeviz.eye.muted ^ {self.alert.episode})

    def action_enter(self) -> None:
        if self.alert is not None and self.alert.layer is not None:
            self.moeviz.look(
                layer=self.alert.layer, expert=self.alert.experts[0] if self.alert.experts else 0
            )
            self.moeviz.action_show_screen("layer")

    def hit(self, pane: str, row: int, column: int) -> None:
        if self.scene is not None and row < len(self.scene.snapshot.alerts):
            self._episode = self.scene.snapshot.alerts[row].episode
            self.moeviz.refresh_view()
