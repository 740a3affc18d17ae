"""The learning rate as a function of consumed tokens, so a change of batch size does not bend the curve.

A pure function of the position: resuming needs no state, and a plot of the whole schedule needs no training.
Position counts the tokens of the step about to be taken too, so the first step of a warm-up already moves the
weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A schedule with its lengths in tokens: call it with a number of tokens."""

    peak: float
    shape: str
    """cosine, linear, constant or wsd (warm-up, stable, decay: Hu et al. 2024, https://arxiv.org/abs/2404.06395)."""
    warmup_tokens: int
    total_tokens: int
    """Where the decay ends; later positions keep the last rate."""
    min_ratio: float
    decay_share: float

    def __call__(self, tokens: int) -> float:
        """The learning rate of the step that brings the run to `tokens` consumed tokens."""
        if tokens < self.warmup_tokens:
            return self.peak * tokens / self.warmup_tokens
        span = max(self.total_tokens - self.warmup_tokens, 1)
        progress = min((tokens - self.warmup_tokens) / span, 1.0)
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * self._height(progress))

    def _height(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""
        if self.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.shape == "linear":
            return 1 - progress
        if self.shape == "wsd":
            return min((1 - progress) / self.decay_share, 1.0) if self.decay_share else 1.0
        return 1.0


def learning_rate_of(config: TrainConfig, tokens_per_step: int) -> LearningRate:
    """The schedule of a run whose optimizer steps hold `tokens_per_step` tokens over all ranks."""
    schedule = config.schedule
    return LearningRate(
        peak=config.optim.learning_rate,
        shape=schedule.schedule,
        warmup_tokens=schedule.warmup_steps * tokens_per_step,
        total_tokens=(schedule.lr_steps or config.max_steps) * tokens_per_step,
        min_ratio=schedule.min_lr_ratio,
        decay_share=schedule.decay_share,
    )
