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
    """Running statistics of L layers. `follow` takes records in; the attributes say what is known after the last.

    Whatever does not hang on the record before is computed for all records at once; the averages alone go record by
    record. What a course keeps is made anew, never changed.
    """

    def __init__(self, num_experts_L: np.ndarray, top_k_L: np.ndarray, config: AlertConfig) -> None:
        self.num_experts_L = num_experts_L
        self.top_k_L = top_k_L
        self._config = config
        layers, width = len(num_experts_L), int(num_experts_L.max(initial=1))
        self._mask_LE = load.expert_mask(num_experts_L, width)
        self._padding_LE = ~self._mask_LE if not self._mask_LE.all() else None
        self._coverage_L1 = (top_k_L / num_experts_L)[:, None]
        first_L = width * np.arange(1, layers + 1) - num_experts_L  # of a layer's experts behind its padding
        self._middle_2L = np.stack([first_L + (num_experts_L - 1) // 2, first_L + num_experts_L // 2])
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
        self._last_LE, self._before_LE, self._gap_LE, self._ratio_LE = np.zeros((4, layers, width))
        self._averages_3L, self._unit_variance_L = np.zeros((3, layers)), np.zeros(layers)

    def follow(self, counts_TLE: np.ndarray) -> LoadStatistics:
        """Take in the assignment counts of T records; layers without assignments keep their state.

        Returns the course: a copy whose attributes have a leading axis, a row after each record.
        """
        width_L, course = self.num_experts_L, copy.copy(self)
        course.assignments_L = counts_TLE.sum(axis=-1).astype(np.float64)
        fresh_TL = course.assignments_L > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            rel_TLE = counts_TLE * (width_L / course.assignments_L)[..., None]
        even_TL = np.maximum(course.assignments_L, 1) / width_L
        planned_TL = np.ceil(64 * self._config.design_effect_prior / (even_TL * self.starved_line_L))
        course.window_L = np.maximum(self._config.window_min, planned_TL)
        if not fresh_TL.all():
            _hold(rel_TLE, fresh_TL[..., None], self._last_LE)
            _hold(course.window_L, fresh_TL, self.window_L)
        course.seen_L = self.seen_L + np.cumsum(fresh_TL, axis=0)
        course.even_total_L = _running_sum(self.even_total_L, course.assignments_L / width_L)
        alpha_TL = 2 / (course.window_L + 1)
        weight_TL = _weight(alpha_TL, fresh_TL, course.seen_L)
        course.mean_LE, gap_TLE = _average(self.mean_LE, rel_TLE, weight_TL[..., None])
        last_TLE = _behind(self._last_LE, rel_TLE)
        room_TLE = self._room(course.mean_LE)
        total_TL = self._total(room_TLE) / even_TL
        square2_TL = _square(rel_TLE - _behind(self._before_LE, last_TLE)) / (2 * total_TL)
        self._swing(course, gap_TLE, alpha_TL, fresh_TL, square2_TL)
        self._noise(course, _ratio(rel_TLE, last_TLE, room_TLE, even_TL), fresh_TL)
        course._unit_variance_L = course.design_effect_L / (even_TL * course.window_L)
        believed_TL = np.minimum(course.design_effect_L, self._config.swing_design_effect)
        course.swing_noise_L = np.sqrt(believed_TL * total_TL / width_L)
        self._gap_LE, self._last_LE, self._before_LE = gap_TLE[-1], rel_TLE[-1], last_TLE[-1]
        for name in (*_JUDGED, "window_L"):
            setattr(self, name, getattr(course, name)[-1])
        return course

    def at(self, t: int) -> LoadStatistics:
        """Of a course: the statistics after record `t`."""
        then = copy.copy(self)
        for name in _JUDGED:
            setattr(then, name, getattr(self, name)[t])
        return then

    def _swing(
        self,
        course: LoadStatistics,
        gap_TLE: np.ndarray,
        alpha_TL: np.ndarray,
        fresh_TL: np.ndarray,
        square2_TL: np.ndarray,
    ) -> None:
        """Average what is one number a layer: the swing, its covariance with the one before, squares at lag 2."""
        # A gap before the mean has settled would count as a swing.
        swinging_TL = alpha_TL * (fresh_TL & (course.seen_L > self._config.window_min // 2))
        noise_TL = _weight(self._noise_alpha(course.window_L), fresh_TL, course.seen_L - 2)
        covariance_TL = np.einsum("tle,tle->tl", gap_TLE, _behind(self._gap_LE, gap_TLE))
        values_T3L = np.stack([_square(gap_TLE), covariance_TL, square2_TL], axis=1)
        weight_T3L = np.stack([swinging_TL, swinging_TL, noise_TL], axis=1)
        averages_T3L, _ = _average(self._averages_3L, values_T3L, weight_T3L)
        self._averages_3L = averages_T3L[-1]
        course._averages_3L = averages_T3L
        course.swing_L = np.sqrt(averages_T3L[:, 0] / self.num_experts_L)
        course.autocorr_L = averages_T3L[:, 1] / np.maximum(averages_T3L[:, 0], 1e-30)

    def _noise(self, course: LoadStatistics, ratio_TLE: np.ndarray, fresh_TL: np.ndarray) -> None:
        """Estimate D twice: from lag 1, a median over experts, and from lag 2, which an alternation cannot inflate.

        `ratio_TLE`: squared differences at lag 1, in units of what independent tokens would make of them.
        """
        seen_TL = course.seen_L
        weight_TL1 = _weight(self._noise_alpha(course.window_L), fresh_TL, seen_TL - 1)[..., None]
        ratio_TLE *= weight_TL1
        limit_TL1 = np.where((seen_TL > self._config.window_min)[..., None], _OUTLIER * weight_TL1, np.inf)
        most_TL = np.where(seen_TL > 2, course._averages_3L[:, 2], 1.0)
        design_TL = np.empty_like(most_TL)
        design_L, mean_LE = self.design_effect_L, self._ratio_LE
        rows = zip(ratio_TLE, limit_TL1, 1 - weight_TL1, most_TL, design_TL, strict=True)
        for ratio_LE, limit_L1, kept_L1, most_L, known_L in rows:
            np.minimum(ratio_LE, limit_L1 * design_L[:, None], out=ratio_LE)
            ratio_LE += mean_LE * kept_L1
            np.maximum(np.minimum(self._median(ratio_LE), most_L), 1, out=known_L)
            mean_LE, design_L = ratio_LE, known_L
        self._ratio_LE, course.design_effect_L = mean_LE, design_TL

    def _noise_alpha(self, window_TL: np.ndarray) -> np.ndarray:
        return 2 / (np.maximum(self._config.noise_window, window_TL) + 1)

    def _room(self, mean_TLE: np.ndarray) -> np.ndarray:
        """r (1 - k r/E) of each load, which over N k/E is its sampling variance for independent tokens.

        r is the mean, but not below the starved line: a starved expert's variance goes to 0, and a ratio to it would
        not settle. Padding gets 1.
        """
        steady_TLE = np.maximum(mean_TLE, self.starved_line_L[:, None])
        room_TLE = steady_TLE * self._coverage_L1
        np.subtract(1, room_TLE, out=room_TLE)
        np.maximum(room_TLE, 1e-3, out=room_TLE)
        room_TLE *= steady_TLE
        if self._padding_LE is not None:
            room_TLE[:, self._padding_LE] = 1.0
        return room_TLE

    def _total(self, values_LE: np.ndarray) -> np.ndarray:
        """Sum over the experts of each layer, without padding."""
        return (
            values_LE.sum(axis=-1) if self._padding_LE is None else (values_LE * self._mask_LE).sum(axis=-1)
        )

    def _median(self, values_LE: np.ndarray) -> np.ndarray:
        """Median over the experts of each layer; padding is 0 and sorts first, as nothing here is below 0."""
        ordered_LE = values_LE.copy()
        ordered_LE.sort(axis=-1)
        low_L, high_L = ordered_LE.take(self._middle_2L)
        return (low_L + high_L) / 2

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


def _weight(alpha_TL: np.ndarray, fresh_TL: np.ndarray, seen_TL: np.ndarray) -> np.ndarray:
    """Weight of the newest of `seen_TL` values: a plain mean until the window is full, exponential from then on."""
    return np.maximum(alpha_TL, 1 / np.maximum(seen_TL, 1)) * (fresh_TL & (seen_TL > 0))


def _average(start: np.ndarray, values_T: np.ndarray, weights_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the average after each value, the distance of each value from the average before it)."""
    averages_T, gaps_T = np.empty(values_T.shape), np.empty(values_T.shape)
    average = start
    for value, weight, gap, after in zip(values_T, weights_T, gaps_T, averages_T, strict=True):
        np.subtract(value, average, out=gap)
        average = np.add(average, weight * gap, out=after)
    return averages_T, gaps_T


def _hold(values_T: np.ndarray, fresh_T: np.ndarray, before: np.ndarray) -> None:
    """Give every value that is not fresh the one before it, in place."""
    for value, fresh in zip(values_T, fresh_T, strict=True):
        np.copyto(value, before, where=~fresh)
        before = value


def _behind(before: np.ndarray, values_T: np.ndarray) -> np.ndarray:
    """The values one record earlier."""
    return before[None] if len(values_T) == 1 else np.concatenate([before[None], values_T[:-1]])


def _running_sum(start: np.ndarray, values_T: np.ndarray) -> np.ndarray:
    return np.cumsum(np.concatenate([start[None], values_T]), axis=0)[1:]


def _square(values_TLE: np.ndarray) -> np.ndarray:
    return np.einsum("tle,tle->tl", values_TLE, values_TLE)


def _ratio(
    rel_TLE: np.ndarray, last_TLE: np.ndarray, room_TLE: np.ndarray, even_TL: np.ndarray
) -> np.ndarray:
    """Squared differences from the record before over twice the variance of a load, room / even."""
    ratio_TLE = rel_TLE - last_TLE
    ratio_TLE *= ratio_TLE
    ratio_TLE /= room_TLE
    ratio_TLE *= even_TL[..., None] / 2
    return ratio_TLE
