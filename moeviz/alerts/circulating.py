"""Rules in circulation: fixed lines that public guides repeat without a source, for those who are asked for them.

Each is judged as literally as it is told, off by default (`AlertConfig.circulating`), and its alert says what it
is and which rule here does the same work with a measured error rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from moeviz.alerts.config import AlertConfig
from moeviz.alerts.load_rules import Reading
from moeviz.alerts.scalar_rules import Judgement, Smoothed


def circulating_readings(
    live: Mapping[str, np.ndarray],
    judged_L: np.ndarray,
    num_experts_L: np.ndarray,
    config: AlertConfig,
    z_coef: float | None,
) -> list[Reading]:
    """The two rules about layers on one record: FIVE_PERCENT of the step alone, Z_LOSS_LINE of the weighted loss.

    Args:
        live: metrics of the record.
        judged_L: layers that are armed.
        num_experts_L: experts of each layer.
        config: the lines.
        z_coef: weight of the z-loss; None: Z_LOSS_LINE does not judge.
    """
    share_L = live["min_load"] / num_experts_L
    line_L = np.full_like(share_L, config.circulating_share)
    small_L = judged_L & (num_experts_L == config.circulating_experts)
    z_L = np.full_like(share_L, np.nan)
    if z_coef is not None and "z_loss" in live:
        z_L = z_coef * live["z_loss"]
    top_L = np.full_like(share_L, config.circulating_z_loss)
    return [
        Reading("FIVE_PERCENT", share_L < line_L, share_L >= line_L, small_L, share_L, line_L),
        Reading("Z_LOSS_LINE", z_L > top_L, z_L <= top_L, judged_L & np.isfinite(z_L), z_L, top_L),
    ]


class Circulating:
    """The three rules about loss and gradient norm."""

    def __init__(self, config: AlertConfig) -> None:
        self._config = config
        self._loss = Smoothed(config.diverge_window)
        self._best, self._best_step = math.inf, -1

    def judge(self, values: Mapping[str, float], step: int) -> Iterator[tuple[str, Judgement]]:
        """(rule, judgement) of each rule that this record says something about."""
        norm = values.get("grad_norm", math.nan)
        if math.isfinite(norm):
            line = self._config.circulating_grad_norm
            yield "GRAD_NORM_LINE", Judgement(norm > line, norm <= line, norm, line, norm)
        loss = values.get("loss", math.nan)
        if math.isfinite(loss):
            yield from self._rising(loss, step)
        validation = values.get("val_loss", math.nan)
        if math.isfinite(validation) and self._loss.full:
            excess = validation / max(abs(self._loss.mean), 1e-12) - 1
            line = self._config.circulating_val_excess
            yield "VALIDATION_GAP", Judgement(excess > line, excess <= line, excess, line, validation)

    def _rising(self, loss: float, step: int) -> Iterator[tuple[str, Judgement]]:
        self._loss.update(loss)
        if not self._loss.full:
            return
        if self._loss.mean < self._best:
            self._best, self._best_step = self._loss.mean, step
        line = self._config.circulating_loss_steps
        since = step - self._best_step
        yield "LOSS_RISING", Judgement(since > line, since <= line, since, line, self._loss.mean)
