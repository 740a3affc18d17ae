"""Screen 7: what attention keeps in latents, block by block."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical

from moeviz.records import ModelInfo
from tui.archive import LatentPlace
from tui.drawings.latent_sheet import draw_latent_facts, draw_latent_picture, draw_latent_time
from tui.latents import LatentSheet, LatentView
from tui.scene import Scene
from tui.screens.base import RunScreen, screen_bindings
from tui.widgets.pane import Pane

NO_LATENTS = (
    "The attention of this model has no latents: it keeps the keys and values of every head.\n\nTo see some:\n"
    "moeviz train --preset demo-mla --log-routing\nmoeviz train --preset demo-slots --log-routing"
)
NOT_YET = (
    "No latents were recorded up to this step. They are recorded every n steps of a run with\n"
    "--log-routing --latent-every 10\n(or watch with a SamplingPolicy whose latent_every is not 0)."
)


class LatentsScreen(RunScreen):
    NAME = "latents"
    FRONT = "latent_picture"
    NEEDS_STEP = False
    BINDINGS = screen_bindings("latents")

    def __init__(self) -> None:
        super().__init__()
        self.sheet: LatentSheet | None = None
        self.place = LatentPlace()
        self.first_row = 0
        self._asked: Hashable = None
        self._message = "reading the latents"

    def compose_body(self) -> ComposeResult:
        with Horizontal(classes="body"):
            with Vertical(classes="column wide"):
                yield Pane(draw_latent_picture, id="latent_picture")
                yield Pane(draw_latent_time, id="latent_time")
            with Vertical(classes="column side"):
                yield Pane(draw_latent_facts, id="latent_facts")

    def subjects(self, scene: Scene) -> dict[str, tuple[object, Hashable]]:
        self._want(scene)
        view = LatentView(sheet=self.sheet, first_row=self.first_row, message=self._message)
        return {pane.id or "": (view, view.key) for pane in self.panes}

    def _want(self, scene: Scene) -> None:
        """Ask for the newest latents up to the step on the screen, when place or step changed."""
        snapshot = scene.snapshot
        asked = (snapshot.run_path, self.place, snapshot.step)
        if asked == self._asked:
            return
        self._asked = asked
        archive, place, info = self.moeviz.archive, replace(self.place, step=snapshot.step), snapshot.info
        self.moeviz.errands.ask(
            "latents", lambda: archive.latents(place), lambda found: self._take(found, info)
        )

    def _take(self, sheet: LatentSheet | None, info: ModelInfo) -> None:
        self.sheet = sheet
        self._message = (NOT_YET if info.latents else NO_LATENTS) if sheet is None else ""
        self.moeviz.refresh_view()

    def _look(self, **changes: int) -> None:
        self.place = replace(self.place, **changes)
        self.moeviz.refresh_view()

    def on_screen_resume(self) -> None:
        self._asked = None
        super().on_screen_resume()

    def action_block(self, direction: int) -> None:
        if self.sheet is not None:
            at = self.sheet.blocks.index(self.sheet.block) + direction
            if 0 <= at < len(self.sheet.blocks):
                self._look(block=self.sheet.blocks[at])

    def action_head(self, direction: int) -> None:
        if self.sheet is not None and 0 <= self.sheet.head + direction < len(self.sheet.heads):
            self._look(head=self.sheet.head + direction)

    def action_part(self) -> None:
        self._look(part=1 - self.place.part, head=0)

    def action_rows(self, direction: int) -> None:
        """Scroll the tokens of the picture."""
        if self.sheet is not None:
            pane = self.query_one("#latent_picture", Pane)
            page = max(pane.content_size.height - 2, 1)
            last = max(len(self.sheet.grid_SC) - page, 0)
            self.first_row = min(max(self.first_row + direction * page, 0), last)
            self.moeviz.refresh_view()

    def hit(self, pane: str, row: int, column: int) -> None:
        """Nothing to choose in these drawings."""
