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

from moeviz.colors import Theme
from moeviz.live import Snapshot
from tui.archive import Archive, Library, Source
from tui.drawings.status_line import Status
from tui.errands import Errands
from tui.ink import Ink
from tui.keymap import KEYS, TABS, ScreenName
from tui.notices import Notices
from tui.playhead import Playhead
from tui.scene import CHANGE_STEPS, SCALES, Eye, LoadHistory, Reference, Scene
from tui.screens.alerts import AlertsScreen
from tui.screens.base import RunScreen, app_bindings
from tui.screens.flow import FlowScreen
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
SILENT_SECONDS = 30.0
"""A feed that hands out the same snapshot for this long is late, whatever the snapshot says."""


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
        self.library, self.run_path = library, run_path
        self._source: Source | None = None
        self.ink = ink or Ink(color=not self.no_color)
        self.eye = Eye()
        self.playhead = Playhead()
        self.errands = Errands(self, self._complain)
        self._notices = Notices(self, self._complain)
        self._interval = 1 / min(max(fps, 0.1), MAX_FPS)
        self._exit_when_ended = exit_when_ended
        self._clock = clock
        self._ended_at: float | None = None
        self._seen_at = clock()
        self._trouble = ""
        for theme in ("dark", "light"):
            self.register_theme(textual_theme(theme))
        self.theme = f"moeviz-{self.ink.theme}"

    def on_mount(self) -> None:
        self._notices.attach()
        self.set_class(self.ink.ascii, "-ascii")
        self.set_interval(self._interval, self.tick)
        self.call_after_refresh(self._open, Path(self.run_path))

    def on_unmount(self) -> None:
        self._close_source()
        self._notices.detach()

    async def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Key):
            self._exit_when_ended = False  # somebody is looking
        await super().on_event(event)

    # The pulse.

    def tick(self) -> None:
        """Take the newest snapshot, advance a replay, refresh what is on the screen."""
        if self._source is None:
            self.refresh_view()
            return
        try:
            latest, self._trouble = self._source.feed.latest, ""
        except Exception as error:  # shown in the top line; the next tick asks again
            latest, self._trouble = None, str(error) or type(error).__name__
        if latest is not None and latest is not self.playhead.latest:
            first = self.playhead.latest is None or self.playhead.latest.run_path != latest.run_path
            self._seen_at = self._clock()
            self.playhead.offer(latest)
            if first:
                self._meet(latest)
        if self.playhead.latest is None:
            self.set_timer(FIRST_LOOK_SECONDS, self.tick)
        self.playhead.tick()
        self.refresh_view()
        self._leave_if_ended()

    def _meet(self, snapshot: Snapshot) -> None:
        """A run's first snapshot: put the cursor on its worst place."""
        worst = snapshot.open_alerts[0] if snapshot.open_alerts else None
        if worst is not None and worst.layer is not None:
            self.eye = replace(self.eye, layer=worst.layer, expert=worst.experts[0] if worst.experts else 0)
        for screen in self._screens():
            screen.place_panes()

    def _leave_if_ended(self) -> None:
        latest = self.playhead.latest
        if latest is None or latest.state not in ("ended", "dead"):
            self._ended_at = None
            return
        if self._ended_at is None:
            self._ended_at = self._clock()
        if self._exit_when_ended and self._clock() - self._ended_at >= LINGER_SECONDS:
            self.exit()

    def refresh_view(self) -> None:
        """Hand the scene of this moment to the screen in front; panes repaint only what changed."""
        screen = next(
            (screen for screen in reversed(self.screen_stack) if isinstance(screen, RunScreen)), None
        )
        if screen is None or not screen.is_mounted:
            return
        screen.show_status(self._status())
        frame = self.playhead.frame()
        if frame is None:
            screen.show(None, f"opening {self.run_path}" if not self._trouble else self._trouble)
            return
        waiting = frame.step < 0 and screen.NEEDS_STEP
        arranged = screen.scene is not None and screen.scene.num_layers == frame.info.num_layers
        screen.show(self._scene(frame), _waiting_words(frame) if waiting else "")
        if not arranged:
            screen.place_panes()

    def _scene(self, frame: Snapshot) -> Scene:
        self.eye = self.eye.inside(frame.info)
        if self.playhead.held_step is not None or self.eye.scale == "change":
            self.want_history()
        return Scene(
            snapshot=frame,
            eye=self.eye,
            reference=self._reference(frame) if self.eye.scale == "change" else None,
            history=self.playhead.history(self.eye.layer) if self.current_mode == "layer" else None,
            version=self.playhead.version,
        )

    def _reference(self, frame: Snapshot) -> Reference | None:
        """The step to compare with, or the oldest known one of a run that is younger."""
        if not len(frame.history_steps_T):
            return None
        known = self.playhead.loads_at(max(frame.step - CHANGE_STEPS, int(frame.history_steps_T[0])))
        return Reference(*known) if known else None

    def _status(self) -> Status:
        latest = self.playhead.latest
        since = self._clock() - self._seen_at
        if latest is not None and latest.state == "live" and since > SILENT_SECONDS:
            latest = replace(latest, state="stale")
        leaving = None
        if self._exit_when_ended and self._ended_at is not None:
            leaving = max(LINGER_SECONDS - (self._clock() - self._ended_at), 0.0)
        return Status(
            run_name=latest.run_name if latest else Path(self.run_path).name,
            latest=latest,
            behind_seconds=latest.behind_seconds + since if latest else 0.0,
            held_step=self.playhead.held_step,
            replay=self.playhead.replay_speed,
            trouble=self._trouble,
            leaving_in=leaving,
            muted=self.eye.muted,
        )

    # What screens ask for.

    def look(self, **changes: Any) -> None:
        """Change where the eye is (fields of `Eye`) and show it."""
        self.eye = replace(self.eye, **changes)
        self.refresh_view()

    def move_cell(self, layers: int, experts: int) -> None:
        """Move the cursor, stopping at the edges."""
        latest = self.playhead.latest
        if latest is not None:
            moved = replace(self.eye, layer=self.eye.layer + layers, expert=self.eye.expert + experts)
            self.eye = moved.inside(latest.info)
            self.refresh_view()

    def go_to(self, layer: int, expert: int) -> None:
        self.look(layer=layer, expert=expert)

    def show_tokens_of(self, layer: int, expert: int) -> None:
        """The Tokens screen, coloured by this expert alone."""
        self.eye = replace(self.eye, layer=layer, expert=expert)
        self.action_show_screen("tokens")
        screen = self.screen
        if isinstance(screen, TokensScreen):
            screen.want_expert(expert)

    def want_history(self) -> None:
        """Read the loads of history steps that were never on the screen, if there are any."""
        gap = self.playhead.missing()
        if gap is not None:
            archive = self.archive
            self.errands.ask("history", lambda: archive.loads(*gap), self._take_history)

    def _take_history(self, history: LoadHistory) -> None:
        self.playhead.fill(history)
        self.refresh_view()

    @property
    def is_open(self) -> bool:
        """Whether the run was opened, or could not be."""
        return self._source is not None or bool(self._trouble)

    @property
    def archive(self) -> Archive:
        """The past and the tokens of the run that is open."""
        assert self._source is not None
        return self._source.archive

    def open_run(self, path: Path) -> None:
        """Leave this run and watch another."""
        if str(path) == self.run_path:
            self.action_show_screen("overview")
        else:
            self._open(path)

    def _open(self, path: Path) -> None:
        self.errands.ask(
            "open",
            lambda: self.library.open(path),
            lambda source: self._switch(source, path),
            self._not_opened,
        )

    def _not_opened(self, words: str) -> None:
        if self._source is None:
            self._trouble = words
            self.refresh_view()
        else:
            self._complain(words)

    def _switch(self, source: Source, path: Path) -> None:
        """From now on, the other run: nothing of the one before stays, not even answers that are under way."""
        first = self._source is None
        self._close_source()
        self.errands.forget()
        self._source, self.run_path, self._trouble = source, str(path), ""
        self.playhead, self.eye, self._ended_at = Playhead(), Eye(), None
        source.feed.start()
        if not first:
            self.action_show_screen("overview")
        self.tick()

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.feed.stop()
            self._source.archive.close()

    def _complain(self, words: str) -> None:
        self.notify(words, severity="warning", timeout=8)

    def _screens(self) -> Iterable[RunScreen]:
        return (
            screen
            for stack in self._screen_stacks.values()
            for screen in stack
            if isinstance(screen, RunScreen)
        )

    # Keys that work everywhere (tui/keymap.py).

    def action_show_screen(self, name: ScreenName) -> None:
        self.switch_mode(name)

    def action_go_back(self) -> None:
        self.action_show_screen("overview")

    def action_pause(self) -> None:
        self.playhead.pause()
        self.refresh_view()

    def action_step(self, direction: int) -> None:
        self.playhead.replay_speed = 0
        self.playhead.move(direction)
        self.refresh_view()

    def action_first_step(self) -> None:
        self.playhead.first()
        self.refresh_view()

    def action_newest_step(self) -> None:
        self.playhead.newest()
        self.refresh_view()

    def action_replay(self) -> None:
        self.playhead.replay()
        self.refresh_view()

    def action_scale(self) -> None:
        self.look(scale=SCALES[(SCALES.index(self.eye.scale) + 1) % len(SCALES)])

    def action_colours(self) -> None:
        theme: Theme = "light" if self.ink.theme == "dark" else "dark"
        self.ink = replace(self.ink, theme=theme)
        self.theme = f"moeviz-{theme}"
        for screen in self._screens():
            screen.repaint()

    def action_find(self) -> None:
        latest = self.playhead.latest
        if latest is not None:
            widths = tuple(layer.num_experts for layer in latest.info.layers)
            self.push_screen(
                FindScreen(widths, self.ink), lambda place: self.go_to(*place) if place else None
            )

    def action_help(self) -> None:
        self.push_screen(HelpScreen(self.ink))

    def action_export(self) -> None:
        """Save the screen as SVG in the current folder."""
        latest = self.playhead.frame()
        step = f"-{latest.step}" if latest is not None and latest.step >= 0 else ""
        name = re.sub(r"[^\w.-]+", "-", f"moeviz-{Path(self.run_path).name}-{self.current_mode}{step}.svg")
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
