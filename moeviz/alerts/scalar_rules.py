"""The conditions of the scalar rules: spikes, a loss that turns upwards, gradients that explode.

They are relative to the run's own recent past: a fixed line on a loss or a gradient norm does not transfer
from one model to the next. Each rule takes one finite value a step and answers with a `Judgement`.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np

from moeviz.alerts.config import AlertConfig


class Judgement(NamedTuple):
    """One rule on one value."""

    raises: bool
    clears: bool
    value: float
    """The watched quantity, in the unit of `Rule.watches`."""
    threshold: float
    level: float
    """The plain value behind it: the loss, the smoothed gradient norm."""


class Smoothed:
    """Exponential average over about `window` values, and its noise from successive differences."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.seen = 0
        self.mean = self._square = self._last = 0.0

    def update(self, value: float) -> None:
        """Take in one value: a plain mean until the window is full, exponential from then on."""
        self.seen += 1
        weight = max(2 / (self.window + 1), 1 / self.seen)
        if self.seen > 1:
            square = (value - self._last) ** 2 / 2
            self._square += max(2 / (self.window + 1), 1 / (self.seen - 1)) * (square - self._square)
        self.mean += weight * (value - self.mean)
        self._last = value

    @property
    def full(self) -> bool:
        return self.seen >= self.window

    @property
    def standard_error(self) -> float:
        """Of `mean`, for noise that is independent from step to step."""
        return math.sqrt(self._square / self.window)


class Spike:
    """A value far above its rolling mean.

    The OLMo-core rule (128 values, 6 sd), and visibly above the median.
    """

    def __init__(self, config: AlertConfig) -> None:
        self._config = config
        self._past: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, value: float) -> Judgement | None:
        """None until the rolling window is full."""
        past = np.array(self._past)
        self._past.append(value)
        if len(past) < self._config.spike_window:
            return None
        score = (value - past.mean()) / max(past.std(), 1e-12)
        visible = value - np.median(past) > self._config.spike_share * abs(np.median(past))
        raises = bool(score > self._config.spike_sd and visible)
        return Judgement(raises, not raises, float(score), self._config.spike_sd, value)


class Divergence:
    """A smoothed loss that stays above its own best by more than its noise."""

    def __init__(self, config: AlertConfig) -> None:
        self._config = config
        self._smooth = Smoothed(config.diverge_window)
        self._best = math.inf
        self.best_step = -1
        """Step of the lowest smoothed loss so far."""

    def judge(self, loss: float, step: int) -> Judgement | None:
        """None until the smoothing window is full."""
        self._smooth.update(loss)
        if not self._smooth.full:
            return None
        if self._smooth.mean < self._best:
            self._best, self.best_step = self._smooth.mean, step
        scale = max(abs(self._best), 1e-12)
        above = (self._smooth.mean - self._best) / scale
        noise = self._config.diverge_se * self._smooth.standard_error / scale
        line = max(self._config.diverge_share, noise)
        return Judgement(above > line, above <= line, above, line, self._smooth.mean)


class Explosion:
    """A smoothed gradient norm far above its usual level, or far above the norm it is clipped to."""

    def __init__(self, config: AlertConfig, grad_clip: float | None) -> None:
        self._config, self._clip = config, grad_clip
        self._smooth = Smoothed(config.explode_window)
        self._past: deque[float] = deque(maxlen=config.explode_history)

    def judge(self, norm: float) -> tuple[Judgement | None, Judgement | None]:
        """(against the history, against the clipping norm); None where there is nothing to compare with."""
        config = self._config
        self._smooth.update(norm)
        usual = self._usual()
        self._past.append(norm)
        by_history = by_clip = None
        if usual is not None:
            factor = self._smooth.mean / max(usual, 1e-12)
            line, calm = config.explode_factor, config.explode_clear
            by_history = Judgement(factor > line, factor < calm, factor, line, self._smooth.mean)
        if self._clip and self._smooth.full:
            factor = self._smooth.mean / self._clip
            line = config.explode_clip
            by_clip = Judgement(factor > line, factor < line / 2, factor, line, self._smooth.mean)
        return by_history, by_clip

    def _usual(self) -> float | None:
        """Median of the history without its most recent part.

        None until that is as long as the part left out.
        """
        recent = self._config.explode_recent
        if len(self._past) < 2 * recent:
            return None
        return float(np.median(np.array(self._past)[:-recent]))
