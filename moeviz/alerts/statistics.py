"""Smoothed loads and their noise, for all layers at once: what the load rules judge instead of single steps.

A step is a small sample of correlated tokens, so a fixed line on single steps fires thousands of times on
healthy runs. Kept here per layer: an exponential average of the relative loads, an estimate of the design
effect D that a drift cannot inflate (von Neumann's successive differences), the swing from step to step, and
a CUSUM of the load entropy. L layers, E experts; columns past a layer's own number of experts are padding.
"""

from __future__ import annotations

import copy

import numpy as np

from moeviz.alerts.config import AlertConfig
from moeviz.metrics import load

_OUTLIER = 10.0
"""One difference counts as at most this many times its expected square: a jump is not noise."""
_JUDGED = (
    "seen_L", "assignments_L", "even_total_L", "mean_LE", "swing_L", "swing_noise_L", "autocorr_L",
    "design_effect_L", "_unit_variance_L",
)  # fmt: skip
"""What the rules look at after a record."""


class LoadStatistics:
    """Running statistics of L layers. Call `update` once a record, or `follow` with several; read the attributes."""

    def __init__(self, num_experts_L: np.ndarray, top_k_L: np.ndarray, config: AlertConfig) -> None:
        self.num_experts_L = num_experts_L
        self.top_k_L = top_k_L
        self._config = config
        layers, width = len(num_experts_L), int(num_experts_L.max(initial=1))
        self._mask_LE = load.expert_mask(num_experts_L, width)
        self._padding_LE = ~self._mask_LE if not self._mask_LE.all() else None
        self._coverage_L1 = (top_k_L / num_experts_L)[:, None]
        self._middle_L = (num_experts_L - 1) // 2, num_experts_L // 2
        self.starved_line_L = load.starved_line(
            num_experts_L, cap=config.starved_cap, scale=config.starved_scale
        )
        self.seen_L = np.zeros(layers, dtype=np.int64)
        """Records with assignments so far."""
        self.assignments_L = np.zeros(layers)
        """N k of the last record."""
        self.even_total_L = np.zeros(layers)
        """Assignments that an even share would have brought each expert so far."""
        self.mean_LE = np.zeros((layers, width))
        """Smoothed relative load m; 1 is even."""
        self.window_L = np.full(layers, float(config.window_min))
        """Smoothing window W in records."""
        self.design_effect_L = np.ones(layers)
        self.swing_L = np.zeros(layers)
        """Root mean square over experts of the load's distance from its average."""
        self.swing_noise_L = np.zeros(layers)
        """What sampling alone makes of `swing_L`."""
        self.autocorr_L = np.zeros(layers)
        """Lag-1 autocorrelation of that distance, pooled over experts: -1 when loads alternate."""
        self._last_LE, self._before_LE, self._gap_LE, self._square_LE = np.zeros((4, layers, width))
        self._square2_L, self._swing2_L, self._covariance_L, self._unit_variance_L = np.zeros((4, layers))

    def follow(self, counts_TLE: np.ndarray) -> LoadStatistics:
        """Take in T records; returns the course: a copy whose attributes have a leading axis, a row after each."""
        rows = []
        for counts_LE in counts_TLE:
            self.update(counts_LE)
            rows.append([getattr(self, name) for name in _JUDGED])
        course = copy.copy(self)
        for name, values in zip(_JUDGED, zip(*rows, strict=True), strict=True):
            setattr(course, name, np.array(values))
        return course

    def at(self, t: int) -> LoadStatistics:
        """Of a course: the statistics after record `t`."""
        then = copy.copy(self)
        for name in _JUDGED:
            setattr(then, name, getattr(self, name)[t])
        return then

    def update(self, counts_LE: np.ndarray) -> None:
        """Take in the assignment counts of one record. Layers without assignments keep their state."""
        self.assignments_L = np.asarray(counts_LE).sum(axis=-1).astype(np.float64)
        fresh_L = self.assignments_L > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            rel_LE = counts_LE * (self.num_experts_L / self.assignments_L)[:, None]
        if not fresh_L.all():
            rel_LE = np.where(fresh_L[:, None], rel_LE, self._last_LE)
        # What a course keeps is made anew, never changed.
        self.seen_L = self.seen_L + fresh_L
        self.even_total_L = self.even_total_L + self.assignments_L / self.num_experts_L
        self._smooth(rel_LE, fresh_L)

    def _smooth(self, rel_LE: np.ndarray, fresh_L: np.ndarray) -> None:
        config = self._config
        even_L = np.maximum(self.assignments_L, 1) / self.num_experts_L
        planned_L = np.ceil(64 * config.design_effect_prior / (even_L * self.starved_line_L))
        self.window_L = np.where(fresh_L, np.maximum(config.window_min, planned_L), self.window_L)
        gap_LE = rel_LE - self.mean_LE
        alpha_L = 2 / (self.window_L + 1)
        self.mean_LE = self.mean_LE + self._weight(alpha_L, fresh_L)[:, None] * gap_LE
        # A gap before the mean has settled would count as a swing.
        swinging_L = fresh_L & (self.seen_L > config.window_min // 2)
        self._swing(gap_LE, alpha_L * swinging_L)
        self._noise(rel_LE, even_L, fresh_L)
        self._gap_LE, self._last_LE, self._before_LE = gap_LE, rel_LE, self._last_LE

    def _weight(self, alpha_L: np.ndarray, fresh_L: np.ndarray, lag: int = 0) -> np.ndarray:
        """Weight of the newest record: a plain mean until the window is full, exponential from then on."""
        seen_L = self.seen_L - lag
        return np.maximum(alpha_L, 1 / np.maximum(seen_L, 1)) * (fresh_L & (seen_L > 0))

    def _swing(self, gap_LE: np.ndarray, weight_L: np.ndarray) -> None:
        self._swing2_L += weight_L * (np.einsum("le,le->l", gap_LE, gap_LE) - self._swing2_L)
        self._covariance_L += weight_L * (np.einsum("le,le->l", gap_LE, self._gap_LE) - self._covariance_L)
        self.swing_L = np.sqrt(self._swing2_L / self.num_experts_L)
        self.autocorr_L = self._covariance_L / np.maximum(self._swing2_L, 1e-30)

    def _noise(self, rel_LE: np.ndarray, even_L: np.ndarray, fresh_L: np.ndarray) -> None:
        """Estimate D twice.

        From lag 1, a median over experts, and from lag 2, which an alternation cannot inflate.
        """
        alpha_L = 2 / (np.maximum(self._config.noise_window, self.window_L) + 1)
        room_LE = self._room()
        half_L = even_L / 2  # a square over twice its variance is half_L times the square over its room
        square_LE = rel_LE - self._last_LE
        square_LE *= square_LE
        square_LE /= room_LE
        settled_L = self.seen_L > self._config.window_min
        limit_L = np.where(settled_L, _OUTLIER * self.design_effect_L / half_L, np.inf)
        np.minimum(square_LE, limit_L[:, None], out=square_LE)
        weight_L = self._weight(alpha_L, fresh_L, lag=1)
        square_LE *= (weight_L * half_L)[:, None]
        self._square_LE *= (1 - weight_L)[:, None]
        self._square_LE += square_LE
        total_L = self._total(room_LE) / even_L
        lag2_LE = rel_LE - self._before_LE
        square2_L = np.einsum("le,le->l", lag2_LE, lag2_LE) / (2 * total_L)
        self._square2_L += self._weight(alpha_L, fresh_L, lag=2) * (square2_L - self._square2_L)
        estimate_L = np.minimum(self._median(self._square_LE), self._square2_L)
        self.design_effect_L = np.where(self.seen_L > 2, np.maximum(estimate_L, 1), 1.0)
        self._unit_variance_L = self.design_effect_L / (even_L * self.window_L)
        believed_L = np.minimum(self.design_effect_L, self._config.swing_design_effect)
        self.swing_noise_L = np.sqrt(believed_L * total_L / self.num_experts_L)

    def _room(self) -> np.ndarray:
        """r (1 - k r/E) of each load, which over N k/E is its sampling variance for independent tokens.

        r is the mean, but not below the starved line: a starved expert's variance goes to 0, and a ratio to it would
        not settle. Padding gets 1.
        """
        steady_LE = np.maximum(self.mean_LE, self.starved_line_L[:, None])
        room_LE = steady_LE * self._coverage_L1
        np.subtract(1, room_LE, out=room_LE)
        np.maximum(room_LE, 1e-3, out=room_LE)
        room_LE *= steady_LE
        if self._padding_LE is not None:
            room_LE[self._padding_LE] = 1.0
        return room_LE

    def _total(self, values_LE: np.ndarray) -> np.ndarray:
        """Sum over the experts of each layer, without padding."""
        return (
            values_LE.sum(axis=-1) if self._padding_LE is None else (values_LE * self._mask_LE).sum(axis=-1)
        )

    def _median(self, values_LE: np.ndarray) -> np.ndarray:
        """Median over the experts of each layer; padding sorts last."""
        if self._padding_LE is not None:
            values_LE = np.where(self._mask_LE, values_LE, np.inf)
        ordered_LE = np.sort(values_LE, axis=-1)
        rows_L = np.arange(len(ordered_LE))
        low_L, high_L = self._middle_L
        return (ordered_LE[rows_L, low_L] + ordered_LE[rows_L, high_L]) / 2

    def mean_sd(self, rel: np.ndarray) -> np.ndarray:
        """Standard deviation of a smoothed load m = `rel` [L] of each layer: `noise.load_rel_var` over the window."""
        variance_L = self._unit_variance_L * rel * (1 - rel * self._coverage_L1[:, 0])
        return np.sqrt(np.maximum(variance_L, 0))

    @property
    def smooth_share_LE(self) -> np.ndarray:
        """Smoothed load shares, rows sum to 1."""
        return self.mean_LE / self.num_experts_L[:, None]

    def experts_below(self, line_L: np.ndarray, lowest_L: np.ndarray) -> np.ndarray:
        """int64 [L]: experts whose smoothed load is below the line of their layer; `lowest_L` is the smallest load."""
        found_L = np.zeros(lowest_L.shape, dtype=np.int64)
        rows = np.nonzero(lowest_L < line_L)
        if rows[-1].size:
            below_XE = (self.mean_LE[rows] < line_L[rows[-1], None]) & self._mask_LE[rows[-1]]
            found_L[rows] = below_XE.sum(axis=-1)
        return found_L
