"""Screen 3: where the tokens of one layer's experts go in the next layer."""

from __future__ import annotations

from collections.abc import Hashable

from textual.app import ComposeResult
from textual.containers import Horizontal

from tui.archive import Flow
from tui.drawings.flow_map import FlowScene, draw_flow_map, draw_routes
from tui.scene import Scene
from tui.screens.base import RunScreen, screen_bindings
from tui.widgets.pane import Pane

NOTHING = (
    "No sampled tokens go from this layer to a next one. Routes need token-level rows of both layers: train with "
    "--log-routing (or watch with a SamplingPolicy that records tokens)."
)


class FlowScreen(RunScreen):
    NAME = "flow"
    FRONT = "flow"
    NEEDS_STEP = False
    BINDINGS = screen_bindings("flow")

    def __init__(self) -> None:
        super().__init__()
        self.flow: Flow | None = None
        self.target = 0
        self._asked: Hashable = None
        self._message = "reading the sampled tokens"

    def compose_body(self) -> ComposeResult:
        with Horizontal(classes="column body"):
            yield Pane(draw_flow_map, id="flow")
            yield Pane(draw_routes, id="routes", classes="pane side")

    def subjects(self, scene: Scene) -> dict[str, tuple[object, Hashable]]:
        self._want(scene)
        current = self.flow if self.flow is not None and self.flow.layer == scene.layer else None
        view = FlowScene(current, scene.expert, self.target, self._message)
        return {"flow": (view, view.key), "routes": (view, view.key)}

    def _want(self, scene: Scene) -> None:
        """Ask for the flow out of the layer under the cursor, once per layer (again on coming back)."""
        asked = (scene.snapshot.run_path, scene.layer)
        if asked != self._asked:
            self._asked, self._message = asked, "reading the sampled tokens"
            archive = self.moeviz.archive
            self.moeviz.errands.ask("flow", lambda: archive.flow(scene.layer), self._take)

    def _take(self, flow: Flow | None) -> None:
        self.flow = flow
        if flow is None:
            self._message = NOTHING
        else:
            self.target = min(self.target, flow.counts_EE.shape[1] - 1)
        self.moeviz.refresh_view()

    def on_screen_resume(self) -> None:
        self._asked = None
        super().on_screen_resume()

    def action_pair(self, sources: int, targets: int) -> None:
        if self.flow is None:
            return
        num_sources, num_targets = self.flow.counts_EE.shape
        self.target = min(max(self.target + targets, 0), num_targets - 1)
        self.moeviz.look(expert=min(max(self.moeviz.eye.expert + sources, 0), num_sources - 1))

    def action_enter(self) -> None:
        if self.flow is not None:
            self.moeviz.look(layer=self.flow.next_layer, expert=self.target)

    def hit(self, pane: str, row: int, column: int) -> None:
        self.target = column
        self.moeviz.look(expert=row)
