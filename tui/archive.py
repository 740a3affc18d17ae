"""What the view asks for by key: older loads, sampled tokens, routes, other runs. Asked in a thread, never by a widget.

The protocols are what screens are handed; tests hand them ten-line fakes. Shapes: T steps, L MoE layers, E experts,
S tokens of a sequence, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from moeviz.live import Feed, RunState
from tui.latents import LatentSheet
from tui.scene import LoadHistory


@dataclass(frozen=True, kw_only=True)
class SequenceRef:
    """One sampled sequence that can be looked at."""

    step: int
    rank: int
    seq: int
    domain: str | None
    num_tokens: int
    mean_loss: float
    """nats per token; NaN where it was not recorded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTrace:
    """The routing of one sequence through all layers that were recorded."""

    ref: SequenceRef
    layers: tuple[int, ...]
    """MoE layer of each entry of axis L."""
    experts_LSK: np.ndarray
    """Slots by falling selection score; -1 in slots that a layer does not have."""
    weights_LSK: np.ndarray
    texts: tuple[str, ...]
    loss_S: np.ndarray
    """nats, of predicting the next token; NaN where unknown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Flow:
    """Where tokens go from one MoE layer to the next: first choices of the sampled tokens of the newest steps."""

    layer: int
    next_layer: int
    counts_EE: np.ndarray
    """Tokens whose first choice is expert i in `layer` and expert j in `next_layer`."""
    steps: str
    """Which steps, in words."""

    @property
    def tokens(self) -> int:
        return int(self.counts_EE.sum())

    @property
    def lift_EE(self) -> np.ndarray:
        """How much more often than by chance: P(i, j) / (P(i) P(j)); NaN where an expert got nothing."""
        total = self.counts_EE.sum()
        if total == 0:
            return np.full(self.counts_EE.shape, np.nan)
        joint = self.counts_EE / total
        chance = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(chance > 0, joint / chance, np.nan)


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run of a folder, in a line."""

    path: Path
    name: str
    state: RunState | Literal["unreadable"]
    step: int
    """Newest step, -1 before the first."""
    planned_steps: int | None
    shape: str
    """For example `24 × 64, top 8`."""
    loss: float
    worst_entropy: float
    """Smallest load entropy / ln E over the layers, now; NaN before the first step."""
    open_alerts: int
    age_seconds: float
    """Since it was created."""


@dataclass(frozen=True, kw_only=True)
class LatentPlace:
    """Which latents are asked for; what was not recorded is replaced by what was."""

    block: int | None = None
    """None: the last block."""
    part: int = 0
    """Place in `tui.latents.PARTS` of the kind."""
    head: int = 0
    """Place among the recorded heads."""
    step: int = 0
    """The newest recorded one up to this is shown."""


class Archive(Protocol):
    """The past and the tokens of one run."""

    def loads(self, first_step: int, last_step: int) -> LoadHistory:
        """Relative loads of every recorded step in the range."""

    def sequences(self) -> list[SequenceRef]:
        """The newest sampled sequences, newest first."""

    def trace(self, ref: SequenceRef) -> TokenTrace: ...

    def flow(self, layer: int) -> Flow | None:
        """From `layer` to the next one; None where no tokens were sampled or it is the last layer."""

    def latents(self, place: LatentPlace) -> LatentSheet | None:
        """Latents of one attention block; None where none were recorded up to the step."""

    def close(self) -> None: ...


class Source(NamedTuple):
    """A run that is open: what it does now, and what it has done."""

    feed: Feed
    archive: Archive


class Library(Protocol):
    """The runs that can be opened."""

    def runs(self) -> list[RunRow]: ...

    def open(self, path: Path) -> Source: ...
