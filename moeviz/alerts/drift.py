"""LOAD_DRIFT: a slow loss of balance, seen hundreds of steps before any single line is crossed.

A one-sided CUSUM (Page 1954) of x = ln(ln E - H), the logarithm of the entropy gap of single steps, against a
robust baseline. The baseline is the best stretch so far: training usually starts out of balance, improves,
and may relax later, and it is from its best that a layer drifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moeviz.alerts.config import AlertConfig


class DriftCourse(NamedTuple):
    """What the rule looks at, after each of T records; as in `Drift`."""

    sum_TL: np.ndarray
    since_TL: np.ndarray
    best_util_TL: np.ndarray


class Drift:
    """CUSUM of L layers.

    `update` takes one record, `follow` several; `sum_L` is the statistic in robust standard deviations.
    """

    def __init__(self, num_layers: int, config: AlertConfig) -> None:
        self._config = config
        self.sum_L = np.zeros(num_layers)
        self.since_L = np.full(num_layers, -1, dtype=np.int64)
        """Step at which the sum last left 0."""
        self.best_util_L = np.full(num_layers, np.nan)
        """Effective utilisation of the baseline stretch."""
        self._center_L = np.full(num_layers, np.inf)
        self._scale_L = np.ones(num_layers)
        self._block_TL = np.full((config.drift_baseline, num_layers), np.nan)
        self._util_TL = np.full((config.drift_baseline, num_layers), np.nan)
        self._filled = 0

    def follow(
        self, gap_nats_TL: np.ndarray, util_TL: np.ndarray, armed_TL: np.ndarray, steps: Sequence[int]
    ) -> DriftCourse:
        """Feed T records as `update` takes them."""
        rows = []
        for gap_nats_L, util_L, armed_L, step in zip(gap_nats_TL, util_TL, armed_TL, steps, strict=True):
            self.update(gap_nats_L, util_L, armed_L, step)
            rows.append((self.sum_L, self.since_L, self.best_util_L))
        return DriftCourse(*map(np.array, zip(*rows, strict=True)))

    def update(self, gap_nats_L: np.ndarray, util_L: np.ndarray, armed_L: np.ndarray, step: int) -> None:
        """Feed ln E - H of a step and the smoothed utilisation; layers that are not armed stand still."""
        if not armed_L.any():
            return
        x_L = np.log(np.maximum(gap_nats_L, 1e-12))
        x_L[~armed_L] = np.nan
        score_L = np.minimum((x_L - self._center_L) / self._scale_L, self._config.drift_clip)
        # Four alarm lines are enough to remember; an endless sum would never clear.
        grown_L = self.sum_L + score_L - self._config.drift_slack
        grown_L = np.minimum(np.maximum(grown_L, 0), 4 * self._config.drift_limit)
        grown_L = np.where(np.isnan(score_L), self.sum_L, grown_L)
        self.since_L = np.where((grown_L > 0) & (self.sum_L == 0), step, self.since_L)
        self.sum_L = grown_L
        self._collect(x_L, util_L)

    def _collect(self, x_L: np.ndarray, util_L: np.ndarray) -> None:
        if np.isnan(x_L).all():
            return
        self._block_TL[self._filled], self._util_TL[self._filled] = x_L, util_L
        self._filled += 1
        if self._filled == len(self._block_TL):
            self._filled = 0
            self._rebase()

    def _rebase(self) -> None:
        """Take the stretch just filled as the baseline of each layer in which it is the best so far."""
        complete_L = ~np.isnan(self._block_TL).any(axis=0)
        block_TL = np.where(complete_L, self._block_TL, 0.0)
        center_L = np.median(block_TL, axis=0)
        scale_L = np.maximum(1.4826 * np.median(np.abs(block_TL - center_L), axis=0), 1e-3)
        better_L = complete_L & (center_L < self._center_L - self._scale_L)
        self._center_L = np.where(better_L, center_L, self._center_L)
        self._scale_L = np.where(better_L, scale_L, self._scale_L)
        self.sum_L = np.where(better_L, 0.0, self.sum_L)
        self.best_util_L = np.where(better_L, np.median(self._util_TL, axis=0), self.best_util_L)
