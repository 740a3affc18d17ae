"""Screen 6: the runs of the folder; enter opens one in place of the current."""

from __future__ import annotations

from collections.abc import Hashable

from textual.app import ComposeResult
from textual.containers import Horizontal

from tui.archive import RunRow
from tui.drawings.run_table import draw_run_table
from tui.ink import Ink
from tui.lines import Panel
from tui.scene import Scene
from tui.screens.base import RunScreen, screen_bindings
from tui.widgets.pane import Pane

REFRESH_SECONDS = 2.0
Subject = tuple[list[RunRow], int, str, str]


def _table(subject: Subject, ink: Ink, width: int, height: int) -> Panel:
    return draw_run_table(*subject, ink, width, height)


class RunsScreen(RunScreen):
    NAME = "runs"
    FRONT = "runs"
    NEEDS_STEP = False
    BINDINGS = screen_bindings("runs")

    def __init__(self) -> None:
        super().__init__()
        self._runs: list[RunRow] = []
        self._selected = ""
        self._message = "looking for runs"
        self._version = 0

    def compose_body(self) -> ComposeResult:
        with Horizontal(classes="column body"):
            yield Pane(_table, id="runs")

    def on_mount(self) -> None:
        super().on_mount()
        self.set_interval(REFRESH_SECONDS, self._read_if_shown)

    def on_screen_resume(self) -> None:
        super().on_screen_resume()
        self._read_if_shown()

    def _read_if_shown(self) -> None:
        if self.is_current:
            self.moeviz.errands.ask("runs", self.moeviz.library.runs, self._take)

    def _take(self, runs: list[RunRow]) -> None:
        self._runs, self._version = runs, self._version + 1
        self._message = "No runs here. `moeviz demo` makes one."
        if self._selected not in {str(run.path) for run in runs} and runs:
            current = self.moeviz.observed.run_path
            self._selected = current if current in {str(run.path) for run in runs} else str(runs[0].path)
        self.moeviz.refresh_view()

    def subjects(self, scene: Scene) -> dict[str, tuple[object, Hashable]]:
        return {"runs": self._subject()}

    def show(self, scene: Scene | None, message: str = "") -> None:
        """Needs no snapshot: a run that does not open can be left for another."""
        self.scene = scene
        subject, key = self._subject()
        self.query_one("#runs", Pane).show(subject, key)

    def _subject(self) -> tuple[Subject, Hashable]:
        subject = (self._runs, self._at, self.moeviz.observed.run_path, self._message)
        return subject, (self._version, self._selected, self.moeviz.observed.run_path, self._message)

    @property
    def _at(self) -> int:
        paths = [str(run.path) for run in self._runs]
        return paths.index(self._selected) if self._selected in paths else 0

    def action_select(self, direction: int) -> None:
        if self._runs:
            self._selected = str(self._runs[min(max(self._at + direction, 0), len(self._runs) - 1)].path)
            self.moeviz.refresh_view()

    def action_enter(self) -> None:
        if self._runs:
            self.moeviz.open_run(self._runs[self._at].path)

    def hit(self, pane: str, row: int, column: int) -> None:
        if row < len(self._runs):
            self._selected = str(self._runs[row].path)
            self.moeviz.refresh_view()
