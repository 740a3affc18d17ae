"""Screen 1: all experts of all layers at once, the numbers of this moment, entropy over time, what is wrong."""

from __future__ import annotations

from collections.abc import Hashable

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical

from tui.drawings.alert_list import draw_alert_list
from tui.drawings.entropy_rows import draw_entropy_rows
from tui.drawings.load_map import draw_load_map
from tui.drawings.now_panel import draw_now_panel
from tui.scene import Scene
from tui.screens.base import RunScreen, screen_bindings
from tui.widgets.pane import Pane

_FRAME = 2
"""Lines of a pane's border."""
_RULER_AND_READING = 2
_AXIS = 1


class OverviewScreen(RunScreen):
    NAME = "overview"
    FRONT = "map"
    BINDINGS = screen_bindings("overview")

    def compose_body(self) -> ComposeResult:
        with Horizontal(classes="body"):
            with Vertical(classes="column wide"):
                yield Pane(draw_load_map, id="map")
                yield Pane(draw_entropy_rows, id="entropy")
            with Vertical(classes="column side"):
                yield Pane(draw_now_panel, id="now")
                yield Pane(draw_alert_list, id="alerts")

    def subjects(self, scene: Scene) -> dict[str, tuple[object, Hashable]]:
        """Alerts change far less often than loads: their list has a key of its own."""
        alerts = (scene.snapshot.run_path, scene.snapshot.alerts, scene.eye.acknowledged, scene.eye.muted)
        return {**super().subjects(scene), "alerts": (scene, alerts)}

    def place_panes(self) -> None:
        super().place_panes()
        body = self.size.height - 3
        num_layers = self.scene.num_layers if self.scene else 0
        map_height, _ = split_heights(body, num_layers, marks=self.moeviz.ink.marks)
        self.query_one("#map").styles.height = "1fr" if self.narrow or not num_layers else map_height

    def action_enter(self) -> None:
        self.moeviz.action_show_screen("alerts" if self.front == "alerts" else "layer")

    def action_entropy_kind(self) -> None:
        self.moeviz.look(entropy="token" if self.moeviz.eye.entropy == "load" else "load")


def split_heights(height: int, num_layers: int, *, marks: bool = False) -> tuple[int, int]:
    """Lines for the map and for the entropy rows, frames included.

    Whole lines per layer where both fit, else half lines; the map comes first, the rows get at least a few lines.
    """
    frames = _FRAME + _RULER_AND_READING, _FRAME + _AXIS
    half = num_layers if marks else (num_layers + 1) // 2
    for map_lines, rows_lines in (
        (3 * num_layers, num_layers),
        (2 * num_layers, num_layers),
        (num_layers, num_layers),
        (num_layers, half),
        (half, half),
    ):
        if map_lines + rows_lines + sum(frames) <= height:
            return map_lines + frames[0], height - map_lines - frames[0]
    least = min(max(height // 4, frames[1] + 2), frames[1] + half)
    map_height = min(half + frames[0], height - least)
    return map_height, height - map_height
