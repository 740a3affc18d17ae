"""The conditions of the scalar rules: spikes, a loss that turns upwards, gradients that explode.

They are relative to the run's own recent past: a fixed line on a loss or a gradient norm does not transfer
from one model to the next. Each rule takes one finite value a step and answers with a `Judgement`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moeviz.alerts.config import AlertConfig

_REFRESH = 10
"""The median of a long history is taken anew once in this many values."""


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


class Ring:
    """The newest `size` values."""

    def __init__(self, size: int) -> None:
        self._values = np.zeros(size)
        self.seen = 0

    def add(self, value: float) -> None:
        self._values[self.seen % len(self._values)] = value
        self.seen += 1

    @property
    def full(self) -> bool:
        return self.seen >= len(self._values)

    def values(self) -> np.ndarray:
        """All that are held, in no particular order."""
        return self._values[: self.seen]

    def without_newest(self, count: int) -> np.ndarray:
        """All that are held but the newest `count`."""
        held = min(self.seen, len(self._values))
        return self._values[(self.seen - held + np.arange(held - count)) % len(self._values)]


class Spike:
    """A value far above its rolling mean.

    The OLMo-core rule (128 values, 6 sd), and visibly above the median.
    """

    def __init__(self, config: AlertConfig, share: float) -> None:
        self._config, self._share = config, share
        self._past = Ring(config.spike_window)

    def judge(self, value: float) -> Judgement | None:
        """None until the rolling window is full."""
        if not self._past.full:
            self._past.add(value)
            return None
        past = self._past.values()
        mean, sd = _mean_and_sd(past)
        score = (value - mean) / max(sd, 1e-12)
        raises = score > self._config.spike_sd and self._visible(value, float(np.median(past)))
        self._past.add(value)
        return Judgement(raises, not raises, score, self._config.spike_sd, value)

    def _visible(self, value: float, usual: float) -> bool:
        return value - usual > self._share * abs(usual)


def _mean_and_sd(values: np.ndarray) -> tuple[float, float]:
    """Both as numpy's methods have them, without what these cost a hundred values."""
    mean = float(np.add.reduce(values)) / len(values)
    squares = values - mean
    squares *= squares
    return mean, math.sqrt(float(np.add.reduce(squares)) / len(values))


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
        self._past = Ring(config.explode_history)
        self._usual: float | None = None

    def judge(self, norm: float) -> tuple[Judgement | None, Judgement | None]:
        """(against the history, against the clipping norm); None where there is nothing to compare with."""
        config = self._config
        self._smooth.update(norm)
        self._refresh()
        usual = self._usual
        self._past.add(norm)
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

    def _refresh(self) -> None:
        """Median of the history without its most recent part, once that is as long as the part left out."""
        recent = self._config.explode_recent
        if self._past.seen >= 2 * recent and self._past.seen % _REFRESH == 0:
            self._usual = float(np.median(self._past.without_newest(recent)))
