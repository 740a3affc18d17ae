"""What is on the screen: one snapshot and where the eye is. Immutable, so a drawing is a function of it.

The small questions that several drawings ask (which layer is worst, how much is noise) are answered here once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from moeviz.live import Snapshot
from moeviz.metrics.noise import even_load_sd
from moeviz.records import ModelInfo

Scale = Literal["step", "mean", "share", "change"]
SCALES: tuple[Scale, ...] = ("step", "mean", "share", "change")
EntropyKind = Literal["load", "token"]
CHANGE_STEPS = 100
"""The `change` scale compares with this many steps ago."""
DEAD_LOAD = 0.02
"""Relative load, averaged over about 20 steps, below which an expert counts as dead."""
MIN_NOISE_LOG2 = 0.25
MAX_NOISE_LOG2 = 1.0


class Reference(NamedTuple):
    """An older step to compare with."""

    step: int
    load_rel_LE: np.ndarray


class LayerHistory(NamedTuple):
    """Relative loads of one layer over steps, oldest first: steps [T], load_rel_TE."""

    steps: np.ndarray
    load_rel_TE: np.ndarray


class LoadHistory(NamedTuple):
    """Relative loads over steps, oldest first: steps [T], load_rel_TLE."""

    steps: np.ndarray
    load_rel_TLE: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Eye:
    """Where a person looks; kept over screens and steps."""

    layer: int = 0
    expert: int = 0
    scale: Scale = "step"
    entropy: EntropyKind = "load"
    by_id: bool = False
    """Bars of the Layer screen in the order of the experts instead of by load."""
    acknowledged: frozenset[str] = frozenset()
    """Alert episodes that were seen."""
    muted: frozenset[str] = frozenset()
    """Alert episodes that are left out of the overview and of the counts."""

    def inside(self, info: ModelInfo) -> Eye:
        """The same, on a layer and an expert that the model has."""
        layer = min(max(self.layer, 0), max(info.num_layers - 1, 0))
        most = info.layers[layer].num_experts if info.layers else 1
        return replace(self, layer=layer, expert=min(max(self.expert, 0), most - 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A snapshot, of the newest step or of an older one, and the eye on it."""

    snapshot: Snapshot
    eye: Eye = Eye()
    reference: Reference | None = None
    """What the scale `change` compares with."""
    history: LayerHistory | None = None
    """Of the layer under the cursor, for the screen that shows one."""
    version: Hashable = 0
    """Moves when the snapshot looks different: its age alone does not count."""

    @property
    def key(self) -> Hashable:
        """Two scenes with equal keys look the same."""
        reference = None if self.reference is None else self.reference.step
        history = None if self.history is None else (len(self.history.steps), int(self.history.steps[-1]))
        return (self.snapshot.run_path, self.version, self.eye, reference, history)

    @property
    def layer(self) -> int:
        return self.eye.layer

    @property
    def expert(self) -> int:
        return self.eye.expert

    @property
    def scale(self) -> Scale:
        return self.eye.scale

    @property
    def num_layers(self) -> int:
        return self.snapshot.info.num_layers

    @property
    def num_experts(self) -> int:
        """Experts of the layer under the cursor."""
        return self.snapshot.info.layers[self.layer].num_experts if self.num_layers else 0

    @property
    def load_rel(self) -> float:
        """Relative load of the cell under the cursor, NaN where there is none."""
        loads = self.snapshot.load_rel_LE
        inside = self.layer < loads.shape[0] and self.expert < loads.shape[1]
        return float(loads[self.layer, self.expert]) if inside else float("nan")


class Place(NamedTuple):
    """A value and where it is."""

    value: float
    layer: int
    expert: int = -1


def noise_log2_L(snapshot: Snapshot) -> np.ndarray:
    """Half width in log2 of the band that sampling noise alone fills, per layer.

    Twice the deviation of balanced, independent routing, and never less than a quarter of a doubling, because the
    tokens of one text are not independent. Range 0.25 to 1.
    """
    top_k_L = np.array([layer.top_k for layer in snapshot.info.layers])
    num_experts_L = np.array([layer.num_experts for layer in snapshot.info.layers])
    sd_L = even_load_sd(max(snapshot.tokens, 1), top_k_L, num_experts_L)
    return np.clip(2 * sd_L / math.log(2), MIN_NOISE_LOG2, MAX_NOISE_LOG2)


def coverage(snapshot: Snapshot, layer: int, load_rel: float) -> float:
    """Share of tokens that use an expert of this relative load: K r / E."""
    info = snapshot.info.layers[layer]
    return load_rel * info.top_k / info.num_experts


def coverage_LE(snapshot: Snapshot) -> np.ndarray:
    """Share of tokens per expert, 0 to 1; an even layer is K / E everywhere."""
    scale_L = np.array([layer.top_k / layer.num_experts for layer in snapshot.info.layers])
    return snapshot.load_rel_LE * scale_L[:, None]


def worst_entropy(snapshot: Snapshot) -> Place | None:
    """The layer whose load is least even now."""
    if not len(snapshot.load_entropy_TL):
        return None
    newest_L = snapshot.load_entropy_TL[-1]
    if np.isnan(newest_L).all():
        return None
    layer = int(np.nanargmin(newest_L))
    return Place(float(newest_L[layer]), layer)


def highest_load(snapshot: Snapshot) -> Place | None:
    """The busiest expert now."""
    loads = snapshot.load_rel_LE
    if not loads.size or np.isnan(loads).all():
        return None
    layer, expert = np.unravel_index(np.nanargmax(loads), loads.shape)
    return Place(float(loads[layer, expert]), int(layer), int(expert))


def dead_LE(snapshot: Snapshot) -> np.ndarray:
    """Experts that get (almost) nothing on average over about 20 steps."""
    return snapshot.load_rel_ema_LE < DEAD_LOAD


def entropy_style(value: float, healthy: str = "muted") -> str:
    """Style of a load entropy / ln E: the two lines below which the screens say look here, and look now."""
    return "critical" if value < 0.7 else "warning" if value < 0.85 else healthy


def entropy_TL(scene: Scene) -> np.ndarray:
    """The entropy history that the view has chosen, normalised to 0..1."""
    snapshot = scene.snapshot
    return snapshot.load_entropy_TL if scene.eye.entropy == "load" else snapshot.route_entropy_TL
