"""The factor that keeps small fp16 gradients from becoming zero (Micikevicius et al. 2018, arXiv:1710.03740).

It doubles after many good steps and halves at each step whose gradient is not finite; that step is not taken.
With other types it is 1 and stays so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

_START, _LEAST, _LARGEST = 2.0**16, 1.0, 2.0**24
_GROW_AFTER = 2000


class LossScale:
    """What losses are multiplied by before backward."""

    def __init__(self, dtype: str) -> None:
        self.dynamic = dtype == "fp16"
        self.value = _START if self.dynamic else 1.0
        self._good_steps = 0

    @torch.no_grad()
    def unscale(self, weights: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the factor."""
        if self.value != 1.0:
            for weight in weights:
                if weight.grad is not None:
                    weight.grad /= self.value

    def update(self, finite: bool) -> bool:
        """Take note of a step. Returns whether the factor was lowered, which excuses a gradient that is not finite."""
        if not self.dynamic:
            return False
        if not finite:
            self._good_steps = 0
            lowered = self.value > _LEAST
            self.value = max(self.value / 2, _LEAST)
            return lowered
        self._good_steps += 1
        if self._good_steps == _GROW_AFTER:
            self._good_steps = 0
            self.value = min(self.value * 2, _LARGEST)
        return False

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self._good_steps}

    def load(self, state: Mapping[str, float]) -> None:
        self.value, self._good_steps = state["value"], int(state["good_steps"])
