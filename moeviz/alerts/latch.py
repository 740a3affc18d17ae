"""Persistence and hysteresis for many yes/no conditions at once.

A condition that holds P records in a row raises; a second, looser one that holds Q in a row clears. Between
the two nothing changes, because the dynamics of routing have hysteresis themselves. A rule that knows its noise
may say more: a record of stronger evidence counts for more than one, and a record on which the condition fails
by no more than noise does not break the row.
"""

from __future__ import annotations

import numpy as np

NOTHING = np.zeros((0, 2), dtype=np.int64)


class Latch:
    """One on/off state for each of R rules and L layers."""

    def __init__(self, raise_after_R: np.ndarray, clear_after_R: np.ndarray, num_layers: int) -> None:
        """Start off. `raise_after_R` and `clear_after_R` are P and Q of each rule, in records."""
        shape = (len(raise_after_R), num_layers)
        self._raise_after_R1 = np.asarray(raise_after_R)[:, None]
        self._clear_after_R1 = np.asarray(clear_after_R)[:, None]
        self._held_RL = np.zeros(shape)
        self._calm_RL = np.zeros(shape, dtype=np.int64)
        self.active_RL = np.zeros(shape, dtype=bool)
        self.since_RL = np.full(shape, -1, dtype=np.int64)
        """Step at which the raise condition last began to hold."""

    @property
    def holding_RL(self) -> np.ndarray:
        """Where the raise condition held on the last judged record."""
        return self._held_RL > 0

    @property
    def is_still(self) -> bool:
        """Whether no condition is on or has begun to hold: until one is raised, nothing can change."""
        return not (self._held_RL.any() or self.active_RL.any())

    def update(
        self,
        raise_RL: np.ndarray,
        clear_RL: np.ndarray,
        judged_RL: np.ndarray,
        step: int,
        *,
        keep_RL: np.ndarray | None = None,
        weight_RL: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Feed one record.

        Returns the indices (rule, layer) that were raised and those that were cleared, int [n, 2].

        Args:
            raise_RL: where the raise condition holds.
            clear_RL: where the clear condition holds.
            judged_RL: where this is false (not armed, nothing recorded) the counters stand still.
            step: of the record.
            keep_RL: where a row that has begun goes on although the raise condition fails; None: nowhere.
            weight_RL: what a record counts for in its row; None: 1.
        """
        starting_RL = raise_RL & judged_RL
        if not starting_RL.any() and self.is_still:
            return NOTHING, NOTHING  # most records of a healthy run
        going_RL = raise_RL if keep_RL is None else raise_RL | (keep_RL & (self._held_RL > 0))
        longer_RL = self._held_RL + (1 if weight_RL is None else weight_RL)
        held_RL = np.where(judged_RL, np.where(going_RL, longer_RL, 0), self._held_RL)
        calm_RL = np.where(judged_RL, np.where(clear_RL & ~raise_RL, self._calm_RL + 1, 0), self._calm_RL)
        self.since_RL[(held_RL > 0) & (self._held_RL == 0)] = step
        self._held_RL, self._calm_RL = held_RL, calm_RL
        raised_RL = ~self.active_RL & (held_RL >= self._raise_after_R1)
        cleared_RL = self.active_RL & (calm_RL >= self._clear_after_R1)
        self.active_RL = (self.active_RL | raised_RL) & ~cleared_RL
        return np.argwhere(raised_RL), np.argwhere(cleared_RL)

    def reset(self, rule: int, layer: int, *, active: bool = False) -> None:
        """Forget what one condition counted, and set its state."""
        self._held_RL[rule, layer] = self._calm_RL[rule, layer] = 0
        self.active_RL[rule, layer] = active
