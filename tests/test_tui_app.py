"""The app lives: it follows the feed, holds and looks back, moves its eye, narrows, and survives what breaks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tui_fakes import FakeArchive, ListFeed, SyntheticRun
from tui_screen import Stage

from moeviz.errors import CorruptRunError
from tui.app import LINGER_SECONDS
from tui.archive import Source
from tui.ink import Ink
from tui.keymap import TABS
from tui.observed import SILENT_SECONDS
from tui.widgets.pane import Pane


@pytest.fixture(scope="module")
def run() -> SyntheticRun:
    return SyntheticRun(6, 16, 2, steps=60)


async def test_digits_show_every_screen_and_escape_goes_back(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        for tab in TABS[1:]:
            await stage.press(tab.key)
            assert tab.name == stage.screen.NAME
            assert f"{tab.key} {tab.label}" in stage.text
        await stage.press("escape")
        assert stage.screen.NAME == "overview"


async def test_the_cursor_starts_at_the_first_alert_and_moves_with_arrows_and_letters(
    run: SyntheticRun,
) -> None:
    async with Stage(run).open() as stage:
        assert (stage.app.eye.layer, stage.app.eye.expert) == (run.sick, run.hot[0])
        await stage.press("home", "slash", "1", ".", "3", "enter")
        assert f"L1 E3   {run.loads_TLE[0, 1, 3]:.2f}×" in stage.text
        await stage.press("end", "right", "down", "l", "j", "up", "h")
        assert (stage.app.eye.layer, stage.app.eye.expert) == (2, 4)
        assert f"L2 E4   {run.loads_TLE[-1, 2, 4]:.2f}×" in stage.text
        await stage.press(*["up"] * 9, *["left"] * 30)
        assert (stage.app.eye.layer, stage.app.eye.expert) == (0, 0)


async def test_find_refuses_places_that_do_not_exist(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await stage.press("slash", "9", "enter")
        assert "layer 9 does not exist; the last one is 5" in stage.text
        await stage.press("escape")
        assert stage.screen.NAME == "overview"


async def test_pause_holds_the_picture_while_the_top_line_moves_on(run: SyntheticRun) -> None:
    async with Stage(run, run.snapshot(50), run.snapshot(51, behind=7.0), run.snapshot(52)).open() as stage:
        await stage.press("space")
        body = stage.text.splitlines()[2:]
        await stage.advance()
        assert stage.text.splitlines()[2:] == body
        assert "step 51" in stage.text.splitlines()[0]
        assert "7.0 s behind" in stage.text
        assert "paused at 50" in stage.text
        await stage.press("space")
        assert "paused" not in stage.text
        assert stage.text.splitlines()[2:] != body


async def test_commas_and_dots_step_through_time(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await stage.press("slash", "0", ".", "5", "enter", "comma", "comma", "comma", "full_stop")
        assert "paused at 57" in stage.text
        assert f"L0 E5   {run.loads_TLE[57, 0, 5]:.2f}×" in stage.text
        await stage.press("home")
        assert "paused at 0" in stage.text
        await stage.press("end")
        assert "paused" not in stage.text


async def test_replay_runs_through_the_history_and_ends_live(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await stage.press("r", "r", "r")
        assert "replay 16×" in stage.text
        for _ in range(5):
            stage.app.tick()
        await stage.settle()
        assert "replay" not in stage.text


async def test_panes_repaint_only_when_something_changed(run: SyntheticRun) -> None:
    shot = run.snapshot(50)
    moments = (shot, replace(shot, behind_seconds=1.4, revision=99), run.snapshot(51))
    async with Stage(run, *moments).open() as stage:
        pane = stage.screen.query_one("#map", Pane)
        before = pane.repaints
        for _ in range(5):
            stage.app.tick()
        await stage.advance()
        assert pane.repaints == before
        assert "1.4 s behind" in stage.text
        await stage.advance()
        assert pane.repaints == before + 1


async def test_a_narrow_terminal_shows_one_pane_and_tab_goes_on(run: SyntheticRun) -> None:
    async with Stage(run).open(80, 24) as stage:
        assert [pane.id for pane in stage.screen.panes if pane.display] == ["map"]
        assert "tab Pane" in stage.text
        await stage.press("tab")
        assert "load entropy by layer" in stage.text
        assert "expert load" not in stage.text
        await stage.press("tab", "tab")
        assert "routing collapse" in stage.text
        await stage.press("tab", "shift+tab")
        assert [pane.id for pane in stage.screen.panes if pane.display] == ["alerts"]


async def test_the_layout_follows_the_size_of_the_terminal(run: SyntheticRun) -> None:
    async with Stage(run).open(80, 24) as stage:
        for size, shown in (((140, 40), 4), ((99, 40), 1), ((140, 29), 1), ((100, 30), 4)):
            await stage.pilot.resize_terminal(*size)
            await stage.settle()
            assert sum(pane.display for pane in stage.screen.panes) == shown, size
            assert all(len(line) <= size[0] for line in stage.text.splitlines())


async def test_no_color_draws_glyphs(run: SyntheticRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with Stage(run).open() as stage:
        assert not stage.app.ink.color
        assert "x dead  - <1/2  . even  + >2x  # >4x" in stage.text
        assert "▀" not in stage.text


async def test_ascii_reaches_every_corner_of_the_screen(run: SyntheticRun) -> None:
    async with Stage(run, ink=Ink(ascii=True)).open() as stage:
        for key in "123456":
            await stage.press(key)
            assert stage.text.isascii(), key
        await stage.press("1", "question_mark")
        assert stage.text.isascii()


async def test_scale_and_colours_cycle(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        for words in (
            "mean of about 20 steps",
            "share of tokens",
            "change since step 0",
            "relative to an even share",
        ):
            await stage.press("y")
            assert words in stage.text
        await stage.press("c")
        assert (stage.app.ink.theme, stage.app.theme) == ("light", "moeviz-light")
        await stage.press("t")
        assert "token entropy by layer" in stage.text


# States and failures.


async def test_waiting_says_what_it_waits_for(run: SyntheticRun) -> None:
    async with Stage(run, run.snapshot(-1, state="waiting"), run.snapshot(0)).open() as stage:
        assert "Waiting for the first step" in stage.text
        assert "6 MoE layers of 16 experts" in stage.text
        await stage.press("2", "1")
        await stage.advance()
        assert "Waiting" not in stage.text
        assert "H/ln E" in stage.text


async def test_a_feed_that_raises_is_named_and_the_app_lives(run: SyntheticRun) -> None:
    async with Stage(run, run.snapshot(50), OSError("disk is gone"), run.snapshot(51)).open() as stage:
        await stage.advance()
        assert "feed: disk is gone" in stage.text
        assert "expert load" in stage.text
        await stage.press("2", "1")
        await stage.advance()
        assert "disk is gone" not in stage.text
        assert "step 51" in stage.text


async def test_an_archive_that_raises_is_a_notice(run: SyntheticRun) -> None:
    def broken() -> list[object]:
        raise OSError("sequences cannot be read")

    stage = Stage(run)
    stage.archive.sequences = broken  # type: ignore[method-assign,assignment]
    async with stage.open():
        await stage.press("4")
        assert "sequences cannot be read" in stage.text


async def test_a_run_that_does_not_open_says_why(run: SyntheticRun) -> None:
    stage = Stage(run)

    def broken(_path: Path) -> Source:
        raise CorruptRunError("run.json is damaged; restore it from a copy of the run")

    stage.library.open = broken  # type: ignore[method-assign]
    async with stage.open():
        assert "run.json is damaged" in stage.text
        await stage.press("6")
        assert "demo-4x8" in stage.text


async def test_a_silent_feed_is_called_stale(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        assert "live" in stage.text
        stage.clock.now += SILENT_SECONDS + 1
        await stage.settle()
        assert "stale 31 s behind" in stage.text


async def test_warnings_of_the_library_become_notices_instead_of_garbage(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        logging.getLogger("moeviz.store").warning("looking at the run failed: trying again")
        await stage.settle()
        assert "looking at the run failed" in stage.text
    assert logging.getLogger("moeviz").propagate


async def test_it_leaves_by_itself_some_seconds_after_the_run_ended(run: SyntheticRun) -> None:
    async with Stage(run, run.snapshot(), run.snapshot(state="ended"), ends=True).open() as stage:
        await stage.advance()
        assert "leaving in 8 s, any key stays" in stage.text
        stage.clock.now += LINGER_SECONDS - 1
        await stage.settle()
        assert stage.app.return_code is None
        stage.clock.now += 1
        stage.app.tick()
        assert stage.app.return_code == 0


async def test_a_key_keeps_it_open(run: SyntheticRun) -> None:
    async with Stage(run, run.snapshot(state="ended"), ends=True).open() as stage:
        await stage.press("right")
        stage.clock.now += 10 * LINGER_SECONDS
        await stage.settle()
        assert stage.app.return_code is None
        assert "leaving" not in stage.text


async def test_another_run_can_be_opened(run: SyntheticRun) -> None:
    other = SyntheticRun(4, 8, 2, steps=30)
    stage = Stage(run)
    shot = replace(other.snapshot(), run_name="demo-4x8", run_path="runs/demo-4x8")
    feed = ListFeed(shot)
    stage.library.sources["demo-4x8"] = Source(feed, FakeArchive(other))
    async with stage.open():
        await stage.press("4", "6", "down", "enter")
        assert stage.screen.NAME == "overview"
        assert "demo-4x8" in stage.text
        assert "top 2 of 8" in stage.text
        assert (stage.feed.stopped, stage.archive.closed, feed.started) == (1, True, 1)
        await stage.press("4")
        assert "L3" in stage.text
        assert "L5" not in stage.text
    assert feed.stopped == 1


async def test_export_writes_a_picture(
    run: SyntheticRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with Stage(run).open() as stage:
        await stage.press("e")
        assert "saved moeviz-olmo-24x64-overview-59.svg" in stage.text
    assert (tmp_path / "moeviz-olmo-24x64-overview-59.svg").read_text().startswith("<svg")


async def test_help_and_the_palette_open_and_close(run: SyntheticRun) -> None:
    async with Stage(run).open() as stage:
        await stage.press("question_mark")
        assert "Everywhere" in stage.text
        await stage.press("escape")
        assert stage.screen.NAME == "overview"
        await stage.press("ctrl+p", *"Pause")
        assert "Hold the picture" in stage.text
