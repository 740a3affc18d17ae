"""Screen 2: one layer, its experts in order of load, the busiest over time, its numbers."""

from __future__ import annotations

import numpy as np
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical

from tui.drawings.layer_bars import bar_order, draw_layer_bars
from tui.drawings.layer_facts import draw_expert_facts, draw_layer_facts, draw_top_experts
from tui.screens.base import RunScreen, screen_bindings
from tui.widgets.pane import Pane


class LayerScreen(RunScreen):
    NAME = "layer"
    FRONT = "bars"
    SHOWS_HISTORY = True
    BINDINGS = screen_bindings("layer")

    def compose_body(self) -> ComposeResult:
        with Horizontal(classes="body"):
            with Vertical(classes="column wide"):
                yield Pane(draw_layer_bars, id="bars")
                yield Pane(draw_top_experts, id="top")
            with Vertical(classes="column side"):
                yield Pane(draw_layer_facts, id="facts")
                yield Pane(draw_expert_facts, id="expert")

    def action_bar(self, direction: int) -> None:
        """The expert whose bar is next to that of the cursor."""
        if self.scene is None or not self.scene.num_experts:
            return
        order = bar_order(self.scene)
        at = int(np.flatnonzero(order == self.scene.expert)[0]) + direction
        if 0 <= at < len(order):
            self.moeviz.look(expert=int(order[at]))

    def action_sort(self) -> None:
        self.moeviz.look(by_id=not self.moeviz.eye.by_id)

    def action_enter(self) -> None:
        self.moeviz.show_tokens_of(self.moeviz.eye.layer, self.moeviz.eye.expert)
