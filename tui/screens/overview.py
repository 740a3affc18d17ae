"""Screen 1: all experts of all layers at once, the numbers of this moment, entropy over time, what is wrong."""

from __future__ import annotations

from collections.abc import Hashable

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical

from tui.drawings.alert_list import draw_alert_list
from tui.drawings.entropy_rows import draw_entropy_rows
from tui.drawings.load_map import draw_load_map, map_grid
from tui.drawings.now_panel import draw_now_panel
from tui.ink import Ink
from tui.scene import Scene
from tui.screens.base import RunScreen, screen_bindings
from tui.widgets.pane import Pane

_AROUND_MAP, _AROUND_ROWS = 4, 3
"""Lines of a pane that are not cells: its frame, and ruler and reading of the map, the axis of the entropy rows."""
_LEAST_ROWS = 4


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
        height: str | int = "1fr"
        if self.scene is not None and self.scene.num_layers and not self.narrow:
            width = self.size.width - self.side_width - 4
            height = map_height(self.scene, self.moeviz.ink, width, self.size.height - 3)
        self.query_one("#map").styles.height = height

    def action_enter(self) -> None:
        self.moeviz.action_show_screen("alerts" if self.front == "alerts" else "layer")

    def action_entropy_kind(self) -> None:
        self.moeviz.look(entropy="token" if self.moeviz.eye.entropy == "load" else "load")


def map_height(scene: Scene, ink: Ink, width: int, height: int) -> int:
    """Lines for the pane of the map, of `height` for it and the entropy rows below it; `width` is inside its frame.

    The map comes first, with half a line a layer at least (a line where a cell is a glyph), then the rows, with half
    a line a layer at most; what is left makes the cells of the map taller.
    """
    room = height - _AROUND_MAP - _AROUND_ROWS
    half = (scene.num_layers + 1) // 2
    least = scene.num_layers if ink.marks else half
    rows = max(min(room - least, half), _LEAST_ROWS)
    grid, _ = map_grid(scene, ink, width, room - rows + 2)
    return grid.lines + _AROUND_MAP
