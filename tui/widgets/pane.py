"""A framed rectangle that shows a drawing. All panels of all screens are this one widget with another function.

The Line API: a drawing is made once per change and size, its rows are handed out as strips.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from textual import events
from textual.geometry import Region
from textual.markup import escape
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from tui.ink import Ink
from tui.lines import Panel, Row, message_rows

if TYPE_CHECKING:
    from tui.app import MoevizApp

Draw = Callable[[Any, Ink, int, int], Panel]
_NOTHING = object()


class Said(NamedTuple):
    """A few words in place of a drawing."""

    text: str


class Pane(Widget, can_focus=False):
    """Shows `draw(subject, ink, width, height)`; `show` with an equal key does nothing."""

    class Hit(Message):
        """A click landed on something drawn."""

        def __init__(self, pane: Pane, row: int, column: int) -> None:
            super().__init__()
            self.pane, self.row, self.column = pane, row, column

    def __init__(self, draw: Draw, *, id: str, classes: str = "pane") -> None:
        super().__init__(id=id, classes=classes)
        self._draw = draw
        self._subject: Any = _NOTHING
        self._key: Hashable = _NOTHING
        self.panel: Panel | None = None
        self._words = ("", "")
        self._strips: list[Strip] = []
        self._drawn_width = 0
        self.repaints = 0

    @property
    def ink(self) -> Ink:
        return cast("MoevizApp", self.app).ink

    def show(self, subject: Any, key: Hashable) -> None:
        """Draw `subject` unless `key` says that it looks the same as before."""
        if key == self._key:
            return
        self._subject, self._key = subject, key
        self.repaint()

    def say(self, text: str) -> None:
        """Show a few words in place of a drawing."""
        self.show(Said(text), ("said", text))

    def repaint(self) -> None:
        """Draw again: another subject, size or theme."""
        width, height = self.content_size
        if self._subject is _NOTHING or not width or not height:
            return
        self.repaints += 1
        if isinstance(self._subject, Said):
            panel = Panel("", message_rows(self._subject.text, self.ink, width, height))
        else:
            panel = self._draw(self._subject, self.ink, width, height)
        old, self.panel = self.panel, panel
        self._refresh_lines([] if old is None else old.rows, panel.rows, width)
        words = (self.ink.say(panel.title), self.ink.say(panel.note))
        if words != self._words:
            self._words = words
            self.border_title, self.border_subtitle = map(escape, words)

    def _refresh_lines(self, old: list[Row], new: list[Row], width: int) -> None:
        """Mark what changed: every line costs a millisecond's tenth in styling, and healthy layers rarely change."""
        if len(old) != len(new) or width != self._drawn_width:
            self._strips = [Strip(row, width) for row in new]
            self._drawn_width = width
            self.refresh()
            return
        changed = [y for y, (before, after) in enumerate(zip(old, new, strict=True)) if before != after]
        for y in changed:
            self._strips[y] = Strip(new[y], width)
        if changed:
            self.refresh(*(Region(0, y, width, 1) for y in changed))

    def render_line(self, y: int) -> Strip:
        if y >= len(self._strips):
            return Strip.blank(self.content_size.width, self.ink.style("text"))
        return self._strips[y]

    def on_resize(self, _event: events.Resize) -> None:
        self.repaint()

    def on_click(self, event: events.Click) -> None:
        at = event.get_content_offset(self)
        spot = self.panel.spot if self.panel is not None else None
        found = spot(at.x, at.y) if spot is not None and at is not None else None
        if found is not None:
            self.post_message(self.Hit(self, *found))
