"""The terminal view in a test: an app on a synthetic run, its screen as text, and a check against stored text."""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from textual.pilot import Pilot
from tui_fakes import FakeArchive, FakeLibrary, ListFeed, SyntheticRun

from moeviz.live import Snapshot
from tui.app import MoevizApp
from tui.archive import Source
from tui.ink import Ink
from tui.lines import Row, text_of
from tui.screens.base import RunScreen

SNAPSHOTS = Path(__file__).parent / "snapshots" / "tui"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """An app under test with everything it was given."""

    def __init__(
        self,
        run: SyntheticRun,
        *moments: Snapshot | Exception | None,
        ink: Ink | None = None,
        ends: bool = False,
    ) -> None:
        self.run, self.clock = run, Clock()
        self.feed = ListFeed(*(moments or (run.snapshot(),)))
        self.archive = FakeArchive(run)
        self.library = FakeLibrary({"olmo-24x64": Source(self.feed, self.archive)})
        self.app = MoevizApp(
            self.library,
            run_path="runs/olmo-24x64",
            ink=ink,
            fps=0.1,  # the test ticks
            exit_when_ended=ends,
            clock=self.clock,
        )
        self.pilot: Pilot[None]

    @asynccontextmanager
    async def open(self, width: int = 120, height: int = 36) -> AsyncIterator[Stage]:
        async with self.app.run_test(size=(width, height), notifications=True) as self.pilot:
            await self.settle()
            yield self

    async def settle(self) -> None:
        """Wait until every question was answered and drawn."""
        for _ in range(200):
            await self.pilot.pause()
            if self.app.errands.idle and self.app.is_open:
                break
            await self.pilot.pause(0.01)
        self.app.tick()
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.settle()

    async def advance(self) -> None:
        """The feed has news."""
        self.feed.advance()
        self.app.tick()
        await self.settle()

    @property
    def screen(self) -> RunScreen:
        assert isinstance(self.app.screen, RunScreen)
        return self.app.screen

    @property
    def text(self) -> str:
        """The whole screen as a person reads it."""
        strips = self.app.screen._compositor.render_strips()
        rows: list[Row] = [list(strip) for strip in strips]
        return text_of(rows)


def check(name: str, text: str, update: bool) -> None:
    """Compare with the stored text; `--update-snapshots` stores it.

    Raises:
        AssertionError: it differs; the message is the difference.
    """
    path = SNAPSHOTS / f"{name}.txt"
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert path.exists(), f"no stored text {path.name}; look at the screen, then run with --update-snapshots"
    wanted = path.read_text().rstrip("\n")
    difference = difflib.unified_diff(wanted.splitlines(), text.splitlines(), "stored", "now", lineterm="")
    assert text == wanted, "\n".join(difference)
