"""What opens on top of a screen: the keys, and the prompt to go to a layer and an expert."""

from __future__ import annotations

import re
from textwrap import wrap
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from tui.ink import Ink
from tui.keymap import TABS, help_sections

_HELP_COLUMNS = 62


class HelpScreen(ModalScreen[None]):
    """All keys, from the same table that dispatches them."""

    BINDINGS: ClassVar = [
        Binding("escape,question_mark,q,enter", "dismiss", "Close", show=False),
        Binding("j", "scroll(1)", show=False),
        Binding("k", "scroll(-1)", show=False),
    ]

    def __init__(self, ink: Ink) -> None:
        super().__init__()
        self._ink = ink

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="help") as box:
            box.border_title = "keys"
            box.border_subtitle = self._ink.say("esc closes · ↑↓ scrolls")
            yield Static(help_text(self._ink))

    def action_scroll(self, direction: int) -> None:
        self.query_one("#help", VerticalScroll).scroll_relative(y=direction * 3, animate=False)


def help_text(ink: Ink) -> Text:
    """The help page."""
    text = Text()
    questions = {tab.label: tab.question for tab in TABS}
    for title, keys in help_sections():
        if text:
            text.append("\n")
        text.append(title, ink.style("strong", bold=True))
        text.append(f"  {questions[title]}\n" if title in questions else "\n", ink.style("faint"))
        for key in keys:
            for at, line in enumerate(wrap(key.help, _HELP_COLUMNS)):
                text.append(ink.say(f"  {key.shown if at == 0 else '':<10}"), ink.style("accent", bold=True))
                text.append(ink.say(line) + "\n", ink.style("text"))
    return text


class FindScreen(ModalScreen[tuple[int, int] | None]):
    """Asks for `LAYER.EXPERT`; gives the place, or None."""

    BINDINGS: ClassVar = [Binding("escape", "dismiss", "Close", show=False)]

    def __init__(self, num_experts_L: tuple[int, ...], ink: Ink) -> None:
        super().__init__()
        self._num_experts_L = num_experts_L
        self._ink = ink

    def compose(self) -> ComposeResult:
        with Vertical(id="find") as box:
            box.border_title = "go to"
            box.border_subtitle = self._ink.say("enter goes · esc closes")
            yield Input(placeholder="layer.expert, for example 11.17", compact=True)
            yield Static("", id="complaint")

    def on_input_changed(self, event: Input.Changed) -> None:
        self.query_one("#complaint", Static).update("")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        try:
            self.dismiss(parse_place(event.value, self._num_experts_L))
        except ValueError as error:
            self.query_one("#complaint", Static).update(Text(str(error), self._ink.style("warning")))


def parse_place(text: str, num_experts_L: tuple[int, ...]) -> tuple[int, int]:
    """`11.17`, `L11 E17`, `11 17` or `11` -> (layer, expert).

    Raises:
        ValueError: not a place, or one that this model does not have.
    """
    match = re.fullmatch(r"\s*[lL]?(\d+)(?:[\s.,:/]+[eE]?(\d+))?\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is no place; type LAYER.EXPERT, for example 11.17")
    layer, expert = int(match[1]), int(match[2] or 0)
    if layer >= len(num_experts_L):
        raise ValueError(f"layer {layer} does not exist; the last one is {len(num_experts_L) - 1}")
    if expert >= num_experts_L[layer]:
        raise ValueError(
            f"expert {expert} does not exist; the last one of layer {layer} is {num_experts_L[layer] - 1}"
        )
    return layer, expert
