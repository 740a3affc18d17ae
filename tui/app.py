"""The terminal view: asks the feed for the newest snapshot at a steady pace and hands a scene to the screen in front.

Screens draw scenes and never touch the store. Whatever the feed or the archive raises ends up in the top line or in
a notice; the view lives on, and training never knows that it is watched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from textual import events
from textual.app import App, SystemCommand
from textual.screen import Screen
from textual.timer import Timer

from moeviz.colors import Theme
from moeviz.live import Snapshot
from tui.archive import Archive, Library, Source
from tui.errands import Errands
from tui.ink import Ink
from tui.keymap import KEYS, TABS, ScreenName
from tui.notices import Notices
from tui.observed import ObservedRun
from tui.scene import SCALES, Eye, LoadHistory
from tui.screens.alerts import AlertsScreen
from tui.screens.base import RunScreen, app_bindings
from tui.screens.flow import FlowScreen
from tui.screens.latents import LatentsScreen
from tui.screens.layer import LayerScreen
from tui.screens.overlays import FindScreen, HelpScreen
from tui.screens.overview import OverviewScreen
from tui.screens.runs import RunsScreen
from tui.screens.tokens import TokensScreen
from tui.themes import textual_theme

LINGER_SECONDS = 8.0
"""How long the view stays after the run ended, with `exit_when_ended`."""
MAX_FPS = 10.0
FIRST_LOOK_SECONDS = 0.05
"""Between two looks at the feed until it has its first snapshot."""


class MoevizApp(App[None]):
    """The application. Everything it reads is injected: the library that opens runs, and the clock."""

    CSS_PATH = "app.tcss"
    TITLE = "moeviz"
    MODES: ClassVar = {
        "overview": OverviewScreen,
        "layer": LayerScreen,
        "flow": FlowScreen,
        "tokens": TokensScreen,
        "alerts": AlertsScreen,
        "runs": RunsScreen,
        "latents": LatentsScreen,
    }
    DEFAULT_MODE = "overview"
    BINDINGS = app_bindings()

    def __init__(
        self,
        library: Library,
        *,
        run_path: str,
        ink: Ink | None = None,
        fps: float = 2.0,
        exit_when_ended: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show a run; it is opened in a thread, so the screen is there at once.

        Args:
            library: where runs are found and opened.
            run_path: path of the run, as the library names it.
            ink: theme and glyphs; by default dark, and by marks when NO_COLOR is set.
            fps: refreshes a second, at most 10.
            exit_when_ended: leave some seconds after the run ended, unless a key is pressed.
            clock: seconds, monotonic.
        """
        super().__init__()
        self.library = library
        self.ink = ink or Ink(color=not self.no_color)
        self.observed = ObservedRun(run_path, clock)
        self.errands = Errands(self, self._complain)
        self.run_screens: list[RunScreen] = []
        self._notices = Notices(self, self._complain)
        self._interval = 1 / min(max(fps, 0.1), MAX_FPS)
        self._first_looks: Timer | None = None
        self._exit_when_ended = exit_when_ended
        self._clock = clock
        for theme in ("dark", "light"):
            self.register_theme(textual_theme(theme))
        self.theme = f"moeviz-{self.ink.theme}"

    def on_mount(self) -> None:
        self._notices.attach()
        self.set_class(self.ink.ascii, "-ascii")
        self.set_interval(self._interval, self.tick)
        self.call_after_refresh(self._open, Path(self.observed.run_path))

    def on_unmount(self) -> None:
        self.observed.stop()
        self._notices.detach()

    async def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Key):
            self._exit_when_ended = False  # somebody is looking
        await super().on_event(event)

    # The pulse.

    def tick(self) -> None:
        """Take the newest snapshot, advance a replay, refresh what is on the screen."""
        self.observed.take()
        if self._first_looks is not None and self.observed.latest is not None:
            self._first_looks.stop()
            self._first_looks = None
        self.observed.playhead.tick()
        self.refresh_view()
        leaving = self._leaving_in()
        if leaving is not None and leaving <= 0:
            self.exit()

    def _leaving_in(self) -> float | None:
        """Seconds until the view closes by itself, if it does."""
        ended_for = self.observed.ended_for
        return LINGER_SECONDS - ended_for if self._exit_when_ended and ended_for is not None else None

    def refresh_view(self) -> None:
        """Hand the scene of this moment to the screen in front; panes repaint only what changed."""
        screen = next((one for one in reversed(self.screen_stack) if isinstance(one, RunScreen)), None)
        if screen is None or not screen.is_mounted:
            return
        observed = self.observed
        screen.show_status(observed.status(self._leaving_in()))
        frame = observed.playhead.frame()
        if frame is None:
            screen.show(None, observed.trouble or f"opening {observed.run_path}")
            return
        if observed.playhead.held_step is not None or observed.eye.scale == "change" or screen.SHOWS_HISTORY:
            self._want_history()
        waiting = frame.step < 0 and screen.NEEDS_STEP
        screen.show(
            observed.scene(frame, with_history=screen.SHOWS_HISTORY), _waiting_words(frame) if waiting else ""
        )

    def _want_history(self) -> None:
        """Read the loads of history steps that were never on the screen, if there are any."""
        playhead, archive = self.observed.playhead, self.archive
        gap = playhead.missing()
        if gap is not None:
            self.errands.ask(
                "history", lambda: archive.loads(*gap), lambda loads: self._take_history(gap, loads)
            )

    def _take_history(self, gap: tuple[int, int], history: LoadHistory) -> None:
        self.observed.playhead.fill(history, gap)
        self.refresh_view()

    # What screens ask for.

    @property
    def eye(self) -> Eye:
        return self.observed.eye

    def look(self, **changes: Any) -> None:
        """Change where the eye is (fields of `Eye`) and show it."""
        self.observed.look(**changes)
        self.refresh_view()

    def move_cell(self, layers: int, experts: int) -> None:
        """Move the cursor, stopping at the edges."""
        self.look(layer=self.eye.layer + layers, expert=self.eye.expert + experts)

    def show_tokens_of(self, layer: int, expert: int) -> None:
        """The Tokens screen, coloured by this expert alone."""
        self.observed.look(layer=layer, expert=expert)
        self.action_show_screen("tokens")
        screen = self.screen
        if isinstance(screen, TokensScreen):
            screen.want_expert(expert)

    @property
    def is_open(self) -> bool:
        """Whether the run was opened, or could not be."""
        return self.observed.source is not None or bool(self.observed.trouble)

    @property
    def archive(self) -> Archive:
        """The past and the tokens of the run that is open."""
        assert self.observed.source is not None
        return self.observed.source.archive

    def open_run(self, path: Path) -> None:
        """Leave this run and watch another."""
        if str(path) == self.observed.run_path:
            self.action_show_screen("overview")
        else:
            self._open(path)

    def _open(self, path: Path) -> None:
        def opened(source: Source) -> None:
            self._switch(source, path)

        self.errands.ask("open", lambda: self.library.open(path), opened, self._not_opened)

    def _not_opened(self, words: str) -> None:
        if self.observed.source is None:
            self.observed.trouble = words
            self.refresh_view()
        else:
            self._complain(words)

    def _switch(self, source: Source, path: Path) -> None:
        """From now on, the other run: nothing of the one before stays, not even answers that are under way."""
        first = self.observed.source is None
        self.observed.stop()
        self.errands.forget()
        self.observed = ObservedRun(str(path), self._clock, source)
        self.observed.start()
        if self._first_looks is None:
            self._first_looks = self.set_interval(FIRST_LOOK_SECONDS, self.tick)
        if not first:
            self.action_show_screen("overview")
        self.tick()

    def _complain(self, words: str) -> None:
        self.notify(words, severity="warning", timeout=8)

    # Keys that work everywhere (tui/keymap.py).

    def action_show_screen(self, name: ScreenName) -> None:
        self.switch_mode(name)

    def action_go_back(self) -> None:
        self.action_show_screen("overview")

    def action_pause(self) -> None:
        self.observed.playhead.pause()
        self.refresh_view()

    def action_step(self, direction: int) -> None:
        self.observed.playhead.replay_speed = 0
        self.observed.playhead.move(direction)
        self.refresh_view()

    def action_first_step(self) -> None:
        self.observed.playhead.first()
        self.refresh_view()

    def action_newest_step(self) -> None:
        self.observed.playhead.newest()
        self.refresh_view()

    def action_replay(self) -> None:
        self.observed.playhead.replay()
        self.refresh_view()

    def action_scale(self) -> None:
        self.look(scale=SCALES[(SCALES.index(self.eye.scale) + 1) % len(SCALES)])

    def action_colours(self) -> None:
        theme: Theme = "light" if self.ink.theme == "dark" else "dark"
        self.ink = replace(self.ink, theme=theme)
        self.theme = f"moeviz-{theme}"
        for screen in self.run_screens:
            screen.repaint()

    def action_find(self) -> None:
        latest = self.observed.latest
        if latest is not None:
            widths = tuple(layer.num_experts for layer in latest.info.layers)
            self.push_screen(
                FindScreen(widths, self.ink),
                lambda place: self.look(layer=place[0], expert=place[1]) if place else None,
            )

    def action_help(self) -> None:
        self.push_screen(HelpScreen(self.ink))

    def action_export(self) -> None:
        """Save the screen as SVG in the current folder."""
        latest = self.observed.playhead.frame()
        step = f"-{latest.step}" if latest is not None and latest.step >= 0 else ""
        name = re.sub(
            r"[^\w.-]+", "-", f"moeviz-{Path(self.observed.run_path).name}-{self.current_mode}{step}.svg"
        )
        try:
            path = self.save_screenshot(name, path=".")
        except OSError as error:
            self._complain(f"{name} could not be written: {error}; start from a folder that is writable")
        else:
            self.notify(f"saved {Path(path).name}", timeout=4)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The command palette: the screens, and every key that works everywhere with one meaning."""
        for tab in TABS:
            yield SystemCommand(tab.label, tab.question, lambda name=tab.name: self.action_show_screen(name))
        for key in KEYS:
            if key.screen is None and len(key.bindings) == 1 and "palette" not in key.bindings[0][1]:
                action = key.bindings[0][1]
                yield SystemCommand(
                    key.label, key.help, lambda action=action: self.call_later(self.run_action, action)
                )


def _waiting_words(frame: Snapshot) -> str:
    model = f"{frame.info.num_layers} MoE layers of {frame.info.max_experts} experts"
    return (
        f"Waiting for the first step.\n{model} are being watched; their loads appear here as soon as training has "
        "finished one optimizer step and the recorder has flushed it (about a second)."
    )
