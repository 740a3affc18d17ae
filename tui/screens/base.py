"""What all screens share: the two lines at the top, the footer, panes one of which is in front, narrow terminals."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar, cast

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen

from tui.drawings.status_line import Status, draw_keys, draw_status, draw_tabs
from tui.keymap import TABS, Key, ScreenName, footer_keys, keys_of
from tui.lines import Panel
from tui.scene import Scene
from tui.widgets.pane import Pane

if TYPE_CHECKING:
    from tui.app import MoevizApp

NARROW_COLUMNS, NARROW_ROWS = 100, 30
SIDE_COLUMNS, MAX_SIDE_COLUMNS = 41, 60
"""Width of a side column; the smallest leaves 64 experts their columns on a terminal of 120."""


def textual_bindings(keys: tuple[Key, ...]) -> list[BindingType]:
    """Keymap entries as Textual bindings."""
    return [
        Binding(names, action, key.label, show=False, priority=names.endswith("tab"))
        for key in keys
        for names, action in key.bindings
        if action != "app.command_palette"  # Textual binds it itself
    ]


class RunScreen(Screen[None]):
    """A screen of one run. Subclasses compose panes and say in `subjects` what each of them shows."""

    NAME: ClassVar[ScreenName]
    FRONT: ClassVar[str]
    """Id of the pane that is in front at first."""
    NEEDS_STEP: ClassVar[bool] = True
    """Whether there is nothing to show before the first step."""
    SHOWS_HISTORY: ClassVar[bool] = False
    """Whether it draws the loads of a layer over time."""

    def __init__(self) -> None:
        super().__init__()
        self.scene: Scene | None = None
        self.front = self.FRONT

    @property
    def moeviz(self) -> MoevizApp:
        return cast("MoevizApp", self.app)

    def compose(self) -> ComposeResult:
        yield Pane(
            lambda status, ink, width, _h: Panel("", [draw_status(status, ink, width)]),
            id="status",
            classes="bar",
        )
        tabs = tuple((tab.name, tab.key, tab.label) for tab in TABS)
        yield Pane(
            lambda name, ink, width, _h: Panel("", [draw_tabs(tabs, name, ink, width)]),
            id="tabs",
            classes="bar",
        )
        yield from self.compose_body()
        yield Pane(
            lambda keys, ink, width, _h: Panel("", [draw_keys(keys, ink, width)]), id="keys", classes="bar"
        )

    def compose_body(self) -> ComposeResult:
        """The panes between tabs and footer."""
        raise NotImplementedError

    def subjects(self, scene: Scene) -> dict[str, tuple[object, Hashable]]:
        """Pane id -> (subject, key) for a scene."""
        return {pane.id or "": (scene, scene.key) for pane in self.panes}

    @property
    def panes(self) -> list[Pane]:
        return list(self.query(Pane).filter(".pane"))

    @property
    def narrow(self) -> bool:
        return self.size.width < NARROW_COLUMNS or self.size.height < NARROW_ROWS

    @property
    def side_width(self) -> int:
        """Width of a side column."""
        return min(max(SIDE_COLUMNS, self.size.width * 28 // 100), MAX_SIDE_COLUMNS)

    def on_mount(self) -> None:
        self.moeviz.run_screens.append(self)
        self.query_one("#tabs", Pane).show(self.NAME, self.NAME)
        self.place_panes()

    def on_screen_resume(self) -> None:
        self.moeviz.refresh_view()

    def on_resize(self, _event: events.Resize) -> None:
        self.place_panes()

    def place_panes(self) -> None:
        """Show all panes, or on a narrow terminal the one in front; mark it."""
        narrow = self.narrow
        self.set_class(narrow, "-narrow")
        keys = footer_keys(self.NAME, narrow=narrow and len(self.panes) > 1)
        self.query_one("#keys", Pane).show([(key.shown, key.label) for key in keys], keys)
        for pane in self.panes:
            pane.display = not narrow or pane.id == self.front
            pane.set_class(pane.id == self.front, "-front")
        for column in self.query(".column"):
            column.display = any(pane.display for pane in column.query(Pane))
        for widget in self.query(".side"):
            widget.styles.width = "1fr" if narrow else self.side_width

    def show_status(self, status: Status) -> None:
        self.query_one("#status", Pane).show(status, (id(status),))

    def show(self, scene: Scene | None, message: str = "") -> None:
        """Hand a scene to the panes; without one, or before the first step, say `message`."""
        num_layers = self.scene.num_layers if self.scene is not None else 0
        self.scene = scene
        if scene is not None and scene.num_layers != num_layers:
            self.place_panes()
        if message or scene is None:
            for pane in self.panes:
                pane.say(message if pane.id == self.front else "")
            return
        for name, (subject, key) in self.subjects(scene).items():
            self.query_one(f"#{name}", Pane).show(subject, key)

    def repaint(self) -> None:
        """After a change of theme."""
        for pane in self.query(Pane):
            pane.repaint()

    def action_pane(self, direction: int) -> None:
        names = [pane.id or "" for pane in self.panes]
        self.front = names[(names.index(self.front) + direction) % len(names)]
        self.place_panes()
        self.moeviz.refresh_view()

    def action_cell(self, layers: int, experts: int) -> None:
        self.moeviz.move_cell(layers, experts)

    def on_pane_hit(self, hit: Pane.Hit) -> None:
        self.front = hit.pane.id or self.front
        self.place_panes()
        self.hit(hit.pane.id or "", hit.row, hit.column)

    def hit(self, pane: str, row: int, column: int) -> None:
        """A click on something drawn; most panes draw layers and experts."""
        self.moeviz.look(layer=row, expert=column)


def screen_bindings(name: ScreenName) -> list[BindingType]:
    """Bindings of one screen: its own keys and those of the base."""
    shared = tuple(
        key for key in keys_of(None) if any(not action.startswith("app.") for _, action in key.bindings)
    )
    return textual_bindings(keys_of(name) + shared)


def app_bindings() -> list[BindingType]:
    """Bindings that the app answers, on every screen."""
    return textual_bindings(
        tuple(key for key in keys_of(None) if all(action.startswith("app.") for _, action in key.bindings))
    )
