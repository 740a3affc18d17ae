"""One table: what is dispatched, shown at the foot, explained by the help and printed in the manual is the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tui.app import MoevizApp
from tui.ink import Ink
from tui.keymap import (
    HELP,
    KEYS,
    MAX_FOOTER,
    PANE,
    QUIT,
    TABS,
    Tab,
    footer_keys,
    help_sections,
    keys_of,
    markdown,
)
from tui.screens.overlays import help_text, parse_place

MANUAL = Path(__file__).parents[1] / "docs" / "terminal.md"


@pytest.mark.parametrize("tab", TABS, ids=lambda tab: tab.name)
def test_every_key_of_the_table_is_dispatched_and_nothing_else(tab: Tab) -> None:
    screen, app = MoevizApp.MODES[tab.name], MoevizApp
    bound = {(b.key, b.action) for b in (*screen.BINDINGS, *app.BINDINGS)}
    wanted = {
        (names, action)
        for key in (*keys_of(tab.name), *keys_of(None))
        for names, action in key.bindings
        if action != "app.command_palette"  # Textual's own
    }
    assert bound == wanted


@pytest.mark.parametrize("tab", TABS, ids=lambda tab: tab.name)
def test_every_action_exists_where_it_is_looked_up(tab: Tab) -> None:
    for key in (*keys_of(tab.name), *keys_of(None)):
        for _, action in key.bindings:
            name = action.split("(")[0]
            owner = MoevizApp if name.startswith("app.") else MoevizApp.MODES[tab.name]
            assert callable(getattr(owner, f"action_{name.removeprefix('app.')}", None)), action


@pytest.mark.parametrize("tab", TABS, ids=lambda tab: tab.name)
def test_no_key_means_two_things_on_a_screen(tab: Tab) -> None:
    names = Counter(
        name
        for key in (*keys_of(tab.name), *keys_of(None))
        for names, _ in key.bindings
        for name in names.split(",")
    )
    assert [name for name, times in names.items() if times > 1] == []


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("tab", TABS, ids=lambda tab: tab.name)
def test_the_footer_has_eight_keys_at_most_and_always_help_and_quit(tab: Tab, narrow: bool) -> None:
    keys = footer_keys(tab.name, narrow=narrow)
    assert len(keys) <= MAX_FOOTER
    assert {HELP, QUIT} <= set(keys) <= set(KEYS)
    assert (PANE in keys) == narrow
    assert {key for key in keys_of(tab.name) if key.footer} <= set(keys)
    actions = Counter(key.bindings for key in keys)
    assert max(actions.values()) == 1


def test_help_and_manual_list_every_key() -> None:
    listed = [key for _, keys in help_sections() for key in keys]
    assert Counter(listed) == Counter(KEYS)
    page = help_text(Ink()).plain
    for key in KEYS:
        assert key.shown in page
        assert f"| `{key.shown}` | {key.help} |" in markdown()
        assert key.help.split(",")[0][:40] in page.replace("\n            ", " ")


def test_the_manual_prints_the_table() -> None:
    assert markdown().strip() in MANUAL.read_text()


@pytest.mark.parametrize(
    ("text", "place"),
    [("11.17", (11, 17)), ("L3 E4", (3, 4)), (" 2 ", (2, 0)), ("1/0", (1, 0)), ("5,6", (5, 6))],
)
def test_places_are_read_as_people_type_them(text: str, place: tuple[int, int]) -> None:
    assert parse_place(text, (32,) * 12) == place


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12.0", "the last one is 11"),
        ("3.32", "the last one of layer 3 is 31"),
        ("x", "11.17"),
        ("", "11.17"),
    ],
)
def test_a_place_that_is_none_says_why(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_place(text, (32,) * 12)
