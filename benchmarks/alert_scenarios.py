"""Routing to try the alert rules on: how tokens are spread over experts, and how a batch differs from that.

Counts are drawn, not trained. Tokens come in clusters that route alike (design effect D), and the coverage of
a batch wanders (AR(1) on the logits), because both are what real batches do. A `Truth` is the noise-free
coverage over time.

S steps, R replicates, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ONSET = 400
"""Step at which a scenario turns bad: after the start-up window and the first drift baseline."""

Truth = Callable[[np.ndarray], np.ndarray]
"""Steps [S] -> noise-free coverage [S, E], rows sum to k."""


@dataclass(frozen=True)
class Noise:
    """How a batch differs from the coverage it is drawn from."""

    name: str
    design_effect: float
    wander_sd: float
    wander_memory: float


NOISES = (Noise("indep", 1.0, 0.0, 0.0), Noise("clust", 8.0, 0.10, 0.8))


def with_sum(weight_SE: np.ndarray, top_k: int) -> np.ndarray:
    """Scale non-negative weights to coverages: rows sum to k, no entry exceeds 1."""
    cover_SE = weight_SE * (top_k / weight_SE.sum(axis=-1, keepdims=True))
    for _ in range(30):
        if not (cover_SE > 1 + 1e-12).any():
            break
        over_SE = cover_SE >= 1
        free_SE = np.where(over_SE, 0, cover_SE)
        room_S1 = top_k - over_SE.sum(axis=-1, keepdims=True)
        scale_S1 = room_S1 / np.maximum(free_SE.sum(axis=-1, keepdims=True), 1e-300)
        cover_SE = np.where(over_SE, 1.0, free_SE * scale_S1)
    return cover_SE


class Counts:
    """Draws assignment counts of R replicates around a coverage."""

    def __init__(self, noise: Noise, tokens: int, top_k: int, shape_RE: tuple[int, int], seed: int) -> None:
        self._noise, self._tokens, self._top_k = noise, tokens, top_k
        self._rng = np.random.default_rng(seed)
        self._wander_RE = np.zeros(shape_RE)
        # Forcing the sum to N k takes 1/E of the variance away again.
        cluster = noise.design_effect * shape_RE[1] / (shape_RE[1] - 1)
        self._clusters = max(round(tokens / cluster), 1)

    def draw(self, cover_SE: np.ndarray) -> np.ndarray:
        """int64 [S, R, E]; each row sums to N k."""
        cover_SRE = np.clip(self._heterogeneous(cover_SE), 0, 1)
        hits_SRE = self._rng.binomial(self._clusters, cover_SRE) * (self._tokens / self._clusters)
        spread_SRE = cover_SRE * (1 - cover_SRE) + 1e-12
        missing_SR1 = self._tokens * self._top_k - hits_SRE.sum(axis=-1, keepdims=True)
        hits_SRE += missing_SR1 * spread_SRE / spread_SRE.sum(axis=-1, keepdims=True)
        counts_SRE = np.clip(np.rint(hits_SRE), 0, None).astype(np.int64)
        # What rounding left over goes to the busiest expert.
        busiest_SR1 = counts_SRE.argmax(axis=-1)[..., None]
        rest_SR1 = self._tokens * self._top_k - counts_SRE.sum(axis=-1, keepdims=True)
        np.put_along_axis(
            counts_SRE, busiest_SR1, np.take_along_axis(counts_SRE, busiest_SR1, -1) + rest_SR1, -1
        )
        return counts_SRE

    def _heterogeneous(self, cover_SE: np.ndarray) -> np.ndarray:
        replicates = len(self._wander_RE)
        if not self._noise.wander_sd:
            return np.repeat(cover_SE[:, None], replicates, axis=1)
        memory = self._noise.wander_memory
        shock_SRE = self._rng.normal(size=(len(cover_SE), *self._wander_RE.shape))
        shock_SRE *= self._noise.wander_sd * np.sqrt(1 - memory**2)
        wander_SRE = np.empty_like(shock_SRE)
        for step, shock_RE in enumerate(shock_SRE):
            self._wander_RE = memory * self._wander_RE + shock_RE
            wander_SRE[step] = self._wander_RE
        return with_sum(cover_SE[:, None] * np.exp(wander_SRE), self._top_k)


def even(num_experts: int, top_k: int) -> Truth:
    """Perfect balance."""
    return lambda step_S: np.full((len(step_S), num_experts), top_k / num_experts)


def published(folder: Path, model: str, domain: str, layer: int, top_k: int) -> Truth:
    """The average load of a published model in one domain, held constant."""
    table = json.loads((folder / "expert_counts.json").read_text())[model]
    cover_E = with_sum(np.array(table["expert_counts"][domain][layer], dtype=float)[None], top_k)[0]
    return lambda step_S: np.tile(cover_E, (len(step_S), 1))


def burst(base: Truth, rare: Truth, every: int = 500, length: int = 5) -> Truth:
    """`length` batches in a row of another domain, once in `every` steps."""
    return lambda step_S: np.where((step_S % every < length)[:, None], rare(step_S), base(step_S))


def relax(num_experts: int, top_k: int, target: Truth, steps: int = 6000) -> Truth:
    """Load that slowly grows from even to the shape of a healthy trained model."""
    goal_E = target(np.zeros(1))[0]
    start_E = np.full(num_experts, top_k / num_experts)

    def truth(step_S: np.ndarray) -> np.ndarray:
        progress_S1 = np.clip((step_S - ONSET) / steps, 0, 1)[:, None]
        return with_sum(start_E * (goal_E / start_E) ** progress_S1, top_k)

    return truth


def sudden(num_experts: int, top_k: int) -> Truth:
    """k experts take everything from one step to the next."""
    goal_E = np.r_[np.ones(top_k), np.zeros(num_experts - top_k)]
    return lambda step_S: np.where((step_S >= ONSET)[:, None], goal_E, top_k / num_experts)


def slow(num_experts: int, top_k: int, steps: int = 2000, reach: float = 7.2) -> Truth:
    """Logits of the experts separate linearly over 2,000 steps."""
    lean_E = np.linspace(-0.5, 0.5, num_experts)

    def truth(step_S: np.ndarray) -> np.ndarray:
        progress_S1 = np.clip((step_S - ONSET) / steps, 0, 1)[:, None]
        return with_sum(np.exp(reach * progress_S1 * lean_E), top_k)

    return truth


def dead_one(num_experts: int, top_k: int, fall: float = 25.0) -> Truth:
    """One expert loses its load with a time constant of 25 steps; the others share it."""

    def truth(step_S: np.ndarray) -> np.ndarray:
        weight_SE = np.ones((len(step_S), num_experts))
        weight_SE[:, 0] = np.exp(-np.clip(step_S - ONSET, 0, None) / fall)
        return with_sum(weight_SE, top_k)

    return truth


def oscillate(num_experts: int, top_k: int, swing: float = 0.6) -> Truth:
    """Half of the experts are over, half under, and they swap every step."""
    sign_E = np.where(np.arange(num_experts) % 2, 1.0, -1.0)

    def truth(step_S: np.ndarray) -> np.ndarray:
        phase_S1 = np.where(step_S % 2, 1.0, -1.0)[:, None] * (step_S >= ONSET)[:, None]
        return with_sum(1 + swing * phase_S1 * sign_E, top_k)

    return truth
