"""Ends runs early that fall behind the others: the median rule.

At every evaluation ("rung") a run is compared with all others of its sweep that came so far, finished, running or
ended. It ends when its best validation loss up to there is above the median of theirs at the same step. This is the
median stopping rule of Vizier (Golovin et al. 2017, https://dl.acm.org/doi/10.1145/3097983.3098043, section 3.2.1)
with losses at the same step in place of their running averages, which hardly ever end a run whose loss falls.

It errs where curves cross: a low learning rate or a long warm-up looks bad early. So nothing ends in the first part of
training, nor before enough others have passed the rung.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

Curve = Mapping[int, float]
"""Validation loss in nats by step."""


class Verdict(NamedTuple):
    """Why a run ends."""

    step: int
    loss: float
    """Its best validation loss up to the rung."""
    median: float
    """That of the others at the rung."""
    others: int
    """How many they are."""

    def __str__(self) -> str:
        return (
            f"at step {self.step} its best validation loss, {self.loss:.3f}, was above {self.median:.3f}, "
            f"the median of {self.others} others"
        )


@dataclass(frozen=True, kw_only=True)
class MedianRule:
    """When a run may end early."""

    least_others: int = 4
    """Runs that must have passed a rung before one ends there."""
    first_share: float = 0.25
    """Share of the steps in which nothing ends."""

    def verdict(self, own: Curve, others: Sequence[Curve], max_steps: int) -> Verdict | None:
        """The verdict at the newest rung of `own`, or None: go on. The last step is no rung."""
        if not own or not self.first_share * max_steps <= max(own) < max_steps:
            return None
        rung = max(own)
        passed = [curve[rung] for curve in others if rung in curve]
        if len(passed) < self.least_others:
            return None
        best, middle = min(own.values()), median(passed)
        return Verdict(rung, best, middle, len(passed)) if best > middle else None
