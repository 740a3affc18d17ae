"""The conditions of the router rules.

Balance bias, drops, size of the logits, early hardening, values not finite.

Each judges only what was recorded: a model without a bias or a capacity limit costs nothing here.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from moeviz.alerts.config import AlertConfig, RunPlan
from moeviz.alerts.load_rules import Reading
from moeviz.metrics import capacity
from moeviz.metrics.load_block import LoadBlock
from moeviz.records import ModelInfo

_GROWTH_SAMPLES = 64
"""Points kept of each layer's z-loss within the window in which growth is judged."""
_NOT_OF_EVERY_LAYER = ("margin", "logit_squared")
"""Sums over tokens that mean nothing for some routers, and are NaN there in a model that mixes kinds."""


class RouterCourse(NamedTuple):
    """What an alert tells of the routers, after each of T records."""

    bias_step_TL: np.ndarray
    """u of the balancing rule: given, or the usual size of a bias's change."""
    bias_span_TL: np.ndarray
    expected_drop_TL: np.ndarray
    """Drop rate of a perfectly balanced router."""


class RouterRules:
    """State of the router rules for the layers of one model; `readings` takes a block of records."""

    def __init__(self, info: ModelInfo, config: AlertConfig, plan: RunPlan) -> None:
        self._config, self._plan = config, plan
        scores = np.array([layer.score for layer in info.layers])
        self._score_space_L = np.isin(scores, ["sigmoid", "softmax"])
        self._logit_space_L = scores == "softmax_topk"
        self._even_lse2_L = (
            np.log(np.array([layer.num_experts for layer in info.layers], dtype=np.float64)) ** 2
        )
        self._num_layers = info.num_layers
        self._one_L, self._zero_L = np.ones(info.num_layers), np.zeros(info.num_layers)
        self._yes_L, self._no_L = self._one_L > 0, self._one_L < 0
        self._nan_L = np.full(info.num_layers, np.nan)
        self._bias_line_L = np.where(self._logit_space_L, config.bias_logits, config.bias_scores)
        self._bias_LE: np.ndarray | None = None
        self.bias_step_L = np.full(info.num_layers, np.nan if plan.bias_step is None else plan.bias_step)
        planned = config.logit_growth_share * (plan.planned_steps or 0)
        self._growth_steps = max(config.logit_growth_steps, int(planned))
        self._z_history: deque[tuple[int, np.ndarray]] = deque()
        self._lowest_z_L = np.zeros(0)

    def readings(
        self, block: LoadBlock, live: dict[str, np.ndarray], design_effect_TL: np.ndarray, shapes: tuple
    ) -> tuple[list[Reading], RouterCourse]:
        """The router rules on a block and its live metrics. `shapes` is (num_experts_L, top_k_L)."""
        bias_step_TL = self._learn_bias_step(block)
        expected_TL = self._expected_drops(block, design_effect_TL, shapes)
        readings = [
            self._saturated(block, live),
            *self._dropped(block, live, expected_TL),
            *self._logits(block, live),
            self._hardened(block, live),
            self._nonfinite(block),
        ]
        unknown_TL = np.broadcast_to(self._nan_L, expected_TL.shape)
        return readings, RouterCourse(bias_step_TL, live.get("bias_range", unknown_TL), expected_TL)

    def _silent(self, rule: str, level: int = 0) -> Reading:
        """A rule whose quantity was not recorded."""
        return Reading(rule, self._no_L, self._no_L, self._no_L, self._nan_L, self._nan_L, level)

    def _saturated(self, block: LoadBlock, live: dict[str, np.ndarray]) -> Reading:
        if block.bias_LE is None:
            return self._silent("BIAS_SATURATED")
        config, span_L = self._config, live["bias_range"]
        value_L, judged_L, line_L = span_L, self._score_space_L, self._bias_line_L
        if self._logit_space_L.any():
            squared_L = block.token_sums.get("logit_squared", self._nan_L)
            logit_rms_L = np.sqrt(squared_L / block.tokens)
            value_L = np.where(self._logit_space_L, span_L / logit_rms_L, span_L)
            judged_L = judged_L | (self._logit_space_L & np.isfinite(logit_rms_L))
        clear_L = line_L * config.bias_clear_scores / config.bias_scores
        # A large bias under an even load is one that works: seen in healthy runs balanced by bias alone.
        uneven_L = live["eff_util"] < config.bias_even_util
        fires_L, calm_L = (value_L > line_L) & uneven_L, (value_L < clear_L) | ~uneven_L
        return Reading("BIAS_SATURATED", fires_L, calm_L, judged_L, value_L, line_L)

    def _learn_bias_step(self, block: LoadBlock) -> np.ndarray:
        """u after each record, [T, L]: the sign rule moves a bias by u or not at all.

        The largest move of the last record that moved is u.
        """
        bias_TLE = block.bias_LE
        if bias_TLE is None or self._plan.bias_step is not None:
            return np.broadcast_to(self.bias_step_L, (len(block.steps), self._num_layers))
        first_LE = bias_TLE[0] if self._bias_LE is None else self._bias_LE
        moved_TLE = bias_TLE.astype(np.float64)
        moved_TLE[1:] -= bias_TLE[:-1]
        moved_TLE[0] -= first_LE
        self._bias_LE = bias_TLE[-1]
        known_TL = []
        for largest_L in np.abs(moved_TLE, out=moved_TLE).max(axis=-1):
            self.bias_step_L = np.where(largest_L > 0, largest_L, self.bias_step_L)
            known_TL.append(self.bias_step_L)
        return np.array(known_TL)

    def _dropped(
        self, block: LoadBlock, live: dict[str, np.ndarray], expected_TL: np.ndarray
    ) -> list[Reading]:
        if block.dropped_LE is None:
            return [self._silent("TOKENS_DROPPED"), self._silent("TOKENS_DROPPED", level=1)]
        config, rate_L = self._config, live["drop_rate"]
        line_L = expected_TL + config.drop_excess
        error_L = config.drop_error * self._one_L
        judged_L = ~np.isnan(rate_L)
        return [
            Reading("TOKENS_DROPPED", rate_L > line_L, rate_L < line_L / 2, judged_L, rate_L, line_L),
            Reading("TOKENS_DROPPED", rate_L > error_L, rate_L < error_L / 2, judged_L, rate_L, error_L, 1),
        ]

    def _expected_drops(self, block: LoadBlock, design_effect_TL: np.ndarray, shapes: tuple) -> np.ndarray:
        """What a perfectly balanced router would drop at this capacity, [T, L]; 0 where nothing was dropped."""
        expected_TL = np.zeros((len(block.steps), self._num_layers))
        if block.dropped_LE is None or not block.dropped_LE.any():
            return expected_TL
        num_experts_L, top_k_L = shapes
        for t, dropped_LE in enumerate(block.dropped_LE):
            if dropped_LE.any():
                factor_L = capacity.implied_capacity_factor(block.counts_LE[t], dropped_LE, num_experts_L)
                if self._plan.capacity_factor is not None:
                    factor_L = np.full(self._num_layers, self._plan.capacity_factor)
                expected_TL[t] = np.nan_to_num(
                    capacity.expected_drop(
                        factor_L, int(block.tokens[t, 0]), top_k_L, num_experts_L, design_effect_TL[t]
                    )
                )
        return expected_TL

    def _logits(self, block: LoadBlock, live: dict[str, np.ndarray]) -> list[Reading]:
        if "z_loss" not in live:
            return [self._silent("ROUTER_LOGITS"), self._silent("ROUTER_LOGITS", level=1)]
        config, z_L, lse_L = self._config, live["z_loss"], live["lse_rms"]
        lowest_L = np.array(
            [self._lowest_z(step, row_L) for step, row_L in zip(block.steps, z_L, strict=True)]
        )
        factor_L = z_L / np.maximum(lowest_L, 1e-12)
        high_L = 2 * self._even_lse2_L
        growing_L = (z_L > high_L) & (factor_L > config.logit_growth)
        calm_L = (lse_L < config.lse_clear * config.lse_warning) & ~(
            (z_L > config.lse_clear * high_L) & (factor_L > config.lse_clear * config.logit_growth)
        )
        judged_L = np.isfinite(z_L)
        line_L = np.where(lse_L > config.lse_warning, config.lse_warning, np.sqrt(high_L))
        hard_L = config.lse_critical * self._one_L
        return [
            Reading(
                "ROUTER_LOGITS", (lse_L > config.lse_warning) | growing_L, calm_L, judged_L, lse_L, line_L
            ),
            Reading(
                "ROUTER_LOGITS", lse_L > hard_L, lse_L < config.lse_clear * hard_L, judged_L, lse_L, hard_L, 1
            ),
        ]

    def _lowest_z(self, step: int, z_L: np.ndarray) -> np.ndarray:
        """Smallest z-loss of each layer within the growth window, on a coarse grid of its steps."""
        history, known = self._z_history, len(self._z_history)
        if not history or step - history[-1][0] >= self._growth_steps // _GROWTH_SAMPLES:
            history.append((step, z_L))
            known = -1
        while history and step - history[0][0] > self._growth_steps:
            history.popleft()
        if known != len(history):
            self._lowest_z_L = np.fmin.reduce([z for _, z in history])
        return np.fmin(self._lowest_z_L, z_L)

    def _hardened(self, block: LoadBlock, live: dict[str, np.ndarray]) -> Reading:
        if self._plan.planned_steps is None or "route_entropy" not in live:
            return self._silent("ROUTER_HARDENED")
        config, entropy_L = self._config, live["route_entropy"]
        early_T1 = np.array(block.steps)[:, None] < config.hard_share * self._plan.planned_steps
        line_L = config.hard_entropy * self._one_L
        return Reading(
            "ROUTER_HARDENED",
            raise_L=(entropy_L < line_L) & early_T1,
            clear_L=entropy_L > config.hard_clear_entropy,
            judged_L=np.isfinite(entropy_L),
            value_L=entropy_L,
            threshold_L=line_L,
        )

    def _nonfinite(self, block: LoadBlock) -> Reading:
        # A sum is finite unless an entry is not: one pass over each table instead of three.
        tables = (block.prob_sum_LE, block.weight_sum_LE, block.bias_LE)
        totals = [table_LE.sum(axis=-1) for table_LE in tables if table_LE is not None]
        sums = block.token_sums.items()
        totals += [total_L for name, total_L in sums if name not in _NOT_OF_EVERY_LAYER]
        bad_L = self._zero_L
        if totals and not np.isfinite(whole_NTL := np.array(totals)).all():
            bad_L = (~np.isfinite(whole_NTL)).sum(axis=0).astype(np.float64)
        return Reading("NONFINITE", bad_L > 0, self._no_L, self._yes_L, bad_L, self._zero_L)
