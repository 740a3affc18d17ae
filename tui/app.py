"""The terminal view: asks the feed for the newest snapshot at a steady pace and hands a scene to the screen in front.

Screens draw scenes and never touch the store. Whatever the feed or the archive raises ends up in the top line or in
a notice; the view lives on, and training never knows that it is watched.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from textual import events
from textual.app import App, SystemCommand
from textual.screen import Screen
from textual.theme import Theme as TextualTheme

from moeviz.colors import Theme
from moeviz.live import Snapshot
from tui.archive import Library, Source
from tui.drawings.status_line import Status
from tui.errands import Errands
from tui.ink import Ink
from tui.keymap import KEYS, TABS, ScreenName
from tui.playhead import Playhead
from tui.scene import CHANGE_STEPS, SCALES, EntropyKind, LoadHistory, Reference, Scale, Scene
from tui.screens.alerts import AlertsScreen
from tui.screens.base import RunScreen, app_bindings
from tui.screens.flow import FlowScreen
from tui.screens.layer import LayerScreen
from tui.screens.overlays import FindScreen, HelpScreen
from tui.screens.overview import OverviewScreen
from tui.screens.runs import RunsScreen
from tui.screens.tokens import TokensScreen

LINGER_SECONDS = 8.0
"""How long the view stays after the run ended, with `exit_when_ended`."""
MAX_FPS = 10.0
_log = logging.getLogger("moeviz.tui")


@dataclass(frozen=True, kw_only=True)
class Eye:
    """Where a person looks; kept over screens and steps."""

    layer: int = 0
    expert: int = 0
    scale: Scale = "step"
    entropy: EntropyKind = "load"
    by_id: bool = False
    acknowledged: frozenset[str] = frozenset()
    muted: frozenset[str] = frozenset()


class MoevizApp(App[None]):
    """The application. Everything it reads is injected: the source, the library of runs, the clock."""

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
        source: Source,
        library: Library,
        *,
        run_path: str,
        ink: Ink | None = None,
        fps: float = 2.0,
        exit_when_ended: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show the run of `source`.

        Args:
            source: the run's feed (started here, stopped at exit) and its archive.
            library: where other runs are found and opened.
            run_path: path of the run, as the library names it.
            ink: theme and glyphs; by default dark, and by marks when NO_COLOR is set.
            fps: refreshes a second, at most 10.
            exit_when_ended: leave some seconds after the run ended, unless a key is pressed.
            clock: seconds, monotonic.
        """
        super().__init__()
        self.source, self.library, self.run_path = source, library, run_path
        self.ink = ink or Ink(color=not self.no_color)
        self.eye = Eye()
        self.playhead = Playhead()
        self.errands = Errands(self, self._complain)
        self._interval = 1 / min(max(fps, 0.1), MAX_FPS)
        self._exit_when_ended = exit_when_ended
        self._clock = clock
        self._ended_at: float | None = None
        self._seen_at = clock()
        self._trouble = ""
        for theme in ("dark", "light"):
            self.register_theme(_textual_theme(theme))
        self.theme = f"moeviz-{self.ink.theme}"

    def on_mount(self) -> None:
        self.set_class(self.ink.ascii, "-ascii")
        self.source.feed.start()
        self.set_interval(self._interval, self.tick)
        self.call_after_refresh(self.tick)

    def on_unmount(self) -> None:
        self.source.feed.stop()
        self.source.archive.close()

    async def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Key):
            self._exit_when_ended = False  # somebody is looking
        await super().on_event(event)

    # The pulse.

    def tick(self) -> None:
        """Take the newest snapshot, advance a replay, refresh what is on the screen."""
        try:
            latest, self._trouble = self.source.feed.latest, ""
        except Exception as error:  # shown in the top line; the next tick asks again
            _log.warning("the feed failed", exc_info=True)
            latest, self._trouble = None, str(error) or type(error).__name__
        if latest is not None and latest is not self.playhead.latest:
            first = self.playhead.latest is None or self.playhead.latest.run_path != latest.run_path
            self._seen_at = self._clock()
            self.playhead.offer(latest)
            if first:
                self._meet(latest)
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
        eye = self._inside(frame)
        reference = None
        if eye.scale == "change":
            self.want_history()
            known = self.playhead.loads_at(max(frame.step - CHANGE_STEPS, int(frame.history_steps_T[0])))
            reference = Reference(*known) if known else None
        held = self.playhead.held_step is not None
        if held:
            self.want_history()
        wants_history = self.current_mode == "layer"
        return Scene(
            snapshot=frame,
            layer=eye.layer,
            expert=eye.expert,
            scale=eye.scale,
            entropy=eye.entropy,
            by_id=eye.by_id,
            reference=reference,
            history=self.playhead.history() if wants_history else None,
            acknowledged=eye.acknowledged,
            muted=eye.muted,
            marker=self.playhead.missing() is None if held else None,
        )

    def _inside(self, frame: Snapshot) -> Eye:
        """The eye, on a layer and an expert that this run has."""
        layer = min(self.eye.layer, max(frame.info.num_layers - 1, 0))
        most = frame.info.layers[layer].num_experts if frame.info.layers else 1
        self.eye = replace(self.eye, layer=layer, expert=min(self.eye.expert, most - 1))
        return self.eye

    def _status(self) -> Status:
        latest = self.playhead.latest
        since = self._clock() - self._seen_at
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
        if latest is not None and latest.info.layers:
            layer = min(max(self.eye.layer + layers, 0), latest.info.num_layers - 1)
            most = latest.info.layers[layer].num_experts - 1
            self.look(layer=layer, expert=min(max(self.eye.expert + experts, 0), most))

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
            archive = self.source.archive
            self.errands.ask("history", lambda: archive.loads(*gap), self._take_history)

    def _take_history(self, history: LoadHistory) -> None:
        self.playhead.fill(history)
        self.refresh_view()

    def open_run(self, path: Path) -> None:
        """Leave this run and watch another."""
        if str(path) != self.run_path:
            self.errands.ask(
                "open", lambda: self.library.open(path), lambda source: self._switch(source, str(path))
            )
        else:
            self.action_show_screen("overview")

    def _switch(self, source: Source, path: str) -> None:
        self.source.feed.stop()
        self.source.archive.close()
        self.source, self.run_path = source, path
        self.playhead, self.eye, self._ended_at = Playhead(), Eye(), None
        source.feed.start()
        self.action_show_screen("overview")

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


def _textual_theme(theme: Theme) -> TextualTheme:
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
