"""Screen 4: sampled sequences as text, coloured by expert, and the path of the token under the cursor."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical

from tui.archive import SequenceRef, TokenTrace
from tui.drawings.token_path import draw_shared, draw_token_path
from tui.drawings.token_text import TokenScene, draw_token_text, layout
from tui.scene import Scene
from tui.screens.base import RunScreen, screen_bindings
from tui.widgets.pane import Pane

NOTHING = (
    "No sampled sequence yet. Token-level rows are recorded every few steps with --log-routing; "
    "--route-every 1 records them at every step."
)
_READING = "reading the sampled sequences"


class TokensScreen(RunScreen):
    NAME = "tokens"
    FRONT = "text"
    NEEDS_STEP = False
    BINDINGS = screen_bindings("tokens")

    def __init__(self) -> None:
        super().__init__()
        self.view = TokenScene(None, message=_READING)
        self._refs: list[SequenceRef] = []
        self._run = ""
        self._wanted_expert: int | None = None

    def compose_body(self) -> ComposeResult:
        with Horizontal(classes="body"):
            with Vertical(classes="column wide"):
                yield Pane(draw_token_text, id="text")
                yield Pane(draw_shared, id="shared")
            with Vertical(classes="column", id="paths"):
                yield Pane(draw_token_path, id="path")

    def subjects(self, scene: Scene) -> dict[str, tuple[object, Hashable]]:
        if scene.snapshot.run_path != self._run:
            self._run = scene.snapshot.run_path
            self.view = TokenScene(None, message=_READING)
            self.read_sequences()
        trace = self.view.trace
        if trace is not None and scene.layer in trace.layers:
            self.view = replace(self.view, layer=trace.layers.index(scene.layer))
        self._share_height()
        return {pane.id or "": (self.view, self.view.key) for pane in self.panes}

    def place_panes(self) -> None:
        super().place_panes()
        self._share_height()

    def _share_height(self) -> None:
        """The text has at least half of its column, the map below it no more than its layers need."""
        layers = len(self.view.trace.layers) if self.view.trace is not None else 0
        lines = min(max(-(-layers // 2), min(layers, 8)) + 3, (self.size.height - 3) // 2)
        self.query_one("#shared").styles.height = "1fr" if self.narrow or not layers else max(lines, 5)

    def on_screen_resume(self) -> None:
        super().on_screen_resume()
        if self._run:
            self.read_sequences()

    def read_sequences(self) -> None:
        """Ask which sequences there are; the one that is open stays open."""
        self.moeviz.errands.ask("sequences", self.moeviz.archive.sequences, self._take_sequences)

    def _take_sequences(self, refs: list[SequenceRef]) -> None:
        self._refs = refs
        if not refs:
            self.view = replace(self.view, message=NOTHING)
            self.moeviz.refresh_view()
            return
        open_ref = None if self.view.trace is None else self.view.trace.ref
        if open_ref in refs:
            self.view = replace(self.view, position=refs.index(open_ref), total=len(refs))
            self._choose_wanted()
            self.moeviz.refresh_view()
        else:
            self._open(0)

    def _open(self, position: int) -> None:
        ref = self._refs[position]
        archive = self.moeviz.archive
        self.view = replace(self.view, position=position, total=len(self._refs))
        self.moeviz.errands.ask("trace", lambda: archive.trace(ref), self._take_trace)

    def _take_trace(self, trace: TokenTrace) -> None:
        position, total = self.view.position, self.view.total
        if not trace.texts or not trace.layers:
            self.view = TokenScene(
                None, position=position, total=total, message="This sequence has no routing rows."
            )
        else:
            token = min(self.view.token, len(trace.texts) - 1)
            self.view = replace(
                self.view, trace=trace, token=token, layer=min(self.view.layer, len(trace.layers) - 1)
            )
            self._choose_wanted()
        self.moeviz.refresh_view()

    def want_expert(self, expert: int) -> None:
        """Show only this expert, as soon as the sequence is there."""
        self._wanted_expert = expert
        self._choose_wanted()

    def _choose_wanted(self) -> None:
        trace = self.view.trace
        if trace is None or self._wanted_expert is None:
            return
        if self.moeviz.eye.layer in trace.layers:
            self.view = replace(self.view, layer=trace.layers.index(self.moeviz.eye.layer))
        users = (trace.experts_LSK[self.view.layer] == self._wanted_expert).any(axis=1).nonzero()[0]
        token = int(users[0]) if len(users) else self.view.token
        self.view = replace(self.view, only=self._wanted_expert, token=token)
        self._wanted_expert = None

    # Keys.

    def action_layer(self, direction: int) -> None:
        trace = self.view.trace
        if trace is None:
            return
        layer = min(max(self.view.layer + direction, 0), len(trace.layers) - 1)
        self.view = replace(self.view, layer=layer)
        self.moeviz.look(layer=trace.layers[layer])

    def action_token(self, direction: int) -> None:
        if self.view.trace is not None:
            self._move_to(self.view.token + direction)

    def action_text_line(self, direction: int) -> None:
        """The token under or above the cursor."""
        if self.view.trace is None:
            return
        lines = layout(self.view.trace.texts, self.query_one("#text", Pane).content_size.width)
        here = next((at for at, line in enumerate(lines) if any(p.token == self.view.token for p in line)), 0)
        at = here + direction
        if not (0 <= at < len(lines) and lines[at]):
            return
        before = [piece.token for piece in lines[here]].index(self.view.token)
        column = sum(len(piece.text) for piece in lines[here][:before])
        for piece in lines[at]:
            token = piece.token
            column -= len(piece.text)
            if column < 0:
                break
        self._move_to(token)

    def _move_to(self, token: int) -> None:
        assert self.view.trace is not None
        self.view = replace(self.view, token=min(max(token, 0), len(self.view.trace.texts) - 1))
        self.moeviz.refresh_view()

    def action_sequence(self, direction: int) -> None:
        position = self.view.position + direction
        if 0 <= position < len(self._refs):
            self._open(position)

    def action_only(self) -> None:
        if self.view.trace is not None:
            expert = int(self.view.top_experts_S[self.view.token])
            self.view = replace(self.view, only=None if self.view.only is not None else expert)
            self.moeviz.refresh_view()

    def action_enter(self) -> None:
        trace = self.view.trace
        if trace is not None:
            self.moeviz.look(
                layer=trace.layers[self.view.layer], expert=int(self.view.top_experts_S[self.view.token])
            )
            self.moeviz.action_show_screen("layer")

    def hit(self, pane: str, row: int, column: int) -> None:
        self._move_to(column)
