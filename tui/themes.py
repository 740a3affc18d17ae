"""Our two themes for Textual: borders, notices and scroll bars in the colours of the drawings."""

from __future__ import annotations

from textual.theme import Theme as TextualTheme

from moeviz.colors import Theme
from tui.ink import Ink


def textual_theme(theme: Theme) -> TextualTheme:
    """`moeviz-dark` or `moeviz-light`."""
    ink = Ink(theme=theme)
    return TextualTheme(
        name=f"moeviz-{theme}",
        dark=theme == "dark",
        primary=ink.color_of("accent"),
        accent=ink.color_of("accent"),
        warning=ink.color_of("warning"),
        error=ink.color_of("critical"),
        success=ink.color_of("good"),
        foreground=ink.color_of("text"),
        background=ink.background,
        surface=ink.background,
        panel=ink.color_of("bar"),
        variables={
            "moeviz-line": ink.color_of("line"),
            "moeviz-muted": ink.color_of("muted"),
            "moeviz-faint": ink.color_of("faint"),
            "moeviz-strong": ink.color_of("strong"),
        },
    )
