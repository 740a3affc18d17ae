"""The conditions of the router rules.

Balance bias, drops, size of the logits, early hardening, values not finite.

Each judges only what was recorded: a model without a bias or a capacity limit costs nothing here.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from moeviz.alerts.config import AlertConfig, RunPlan
from moeviz.alerts.load_rules import Reading
from moeviz.metrics import capacity
from moeviz.records import LoadRecord, ModelInfo

_GROWTH_SAMPLES = 64
"""Points kept of each layer's z-loss within the window in which growth is judged."""
_NOT_OF_EVERY_LAYER = ("margin", "logit_squared")
"""Sums over tokens that mean nothing for some routers, and are NaN there in a model that mixes kinds."""


class RouterRules:
    """State of the router rules for the layers of one model; `readings` takes one record."""

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
        """u of the balancing rule: given, or the usual size of a bias's change."""
        self.bias_span_L = np.full(info.num_layers, np.nan)
        self.expected_drop_L = np.zeros(info.num_layers)
        """Drop rate of a perfectly balanced router."""
        planned = config.logit_growth_share * (plan.planned_steps or 0)
        self._growth_steps = max(config.logit_growth_steps, int(planned))
        self._z_history: deque[tuple[int, np.ndarray]] = deque()
        self._lowest_z_L = np.zeros(0)

    def readings(
        self, record: LoadRecord, live: dict[str, np.ndarray], design_effect_L: np.ndarray, shapes: tuple
    ) -> list[Reading]:
        """The router rules on one record and its live metrics. `shapes` is (num_experts_L, top_k_L)."""
        return [
            self._saturated(record, live),
            *self._dropped(record, live, design_effect_L, shapes),
            *self._logits(record.step, live),
            self._hardened(record.step, live),
            self._nonfinite(record),
        ]

    def _silent(self, rule: str, level: int = 0) -> Reading:
        """A rule whose quantity was not recorded."""
        return Reading(rule, self._no_L, self._no_L, self._no_L, self._nan_L, self._nan_L, level)

    def _saturated(self, record: LoadRecord, live: dict[str, np.ndarray]) -> Reading:
        if record.bias_LE is None:
            return self._silent("BIAS_SATURATED")
        self._learn_bias_step(record.bias_LE)
        config, span_L = self._config, live["bias_range"]
        self.bias_span_L = span_L
        value_L, judged_L, line_L = span_L, self._score_space_L, self._bias_line_L
        if self._logit_space_L.any():
            squared_L = record.token_sums.get("logit_squared", self._nan_L)
            logit_rms_L = np.sqrt(np.asarray(squared_L) / record.tokens)
            value_L = np.where(self._logit_space_L, span_L / logit_rms_L, span_L)
            judged_L = judged_L | (self._logit_space_L & np.isfinite(logit_rms_L))
        clear_L = line_L * config.bias_clear_scores / config.bias_scores
        # A large bias under an even load is one that works: seen in healthy runs balanced by bias alone.
        uneven_L = live["eff_util"] < config.bias_even_util
        fires_L, calm_L = (value_L > line_L) & uneven_L, (value_L < clear_L) | ~uneven_L
        return Reading("BIAS_SATURATED", fires_L, calm_L, judged_L, value_L, line_L)

    def _learn_bias_step(self, bias_LE: np.ndarray) -> None:
        """The sign rule moves a bias by u or not at all.

        The largest move of the last record that moved is u.
        """
        if self._bias_LE is not None and self._plan.bias_step is None:
            moved_LE = np.subtract(bias_LE, self._bias_LE, dtype=np.float64)
            largest_L = np.abs(moved_LE, out=moved_LE).max(axis=-1)
            self.bias_step_L = np.where(largest_L > 0, largest_L, self.bias_step_L)
        self._bias_LE = bias_LE

    def _dropped(
        self, record: LoadRecord, live: dict[str, np.ndarray], design_effect_L: np.ndarray, shapes: tuple
    ) -> list[Reading]:
        if record.dropped_LE is None:
            return [self._silent("TOKENS_DROPPED"), self._silent("TOKENS_DROPPED", level=1)]
        config, rate_L = self._config, live["drop_rate"]
        self.expected_drop_L = self._zero_L
        if record.dropped_LE.any():
            self._expect_drops(record, design_effect_L, shapes)
        line_L = self.expected_drop_L + config.drop_excess
        error_L = config.drop_error * self._one_L
        judged_L = ~np.isnan(rate_L)
        return [
            Reading("TOKENS_DROPPED", rate_L > line_L, rate_L < line_L / 2, judged_L, rate_L, line_L),
            Reading("TOKENS_DROPPED", rate_L > error_L, rate_L < error_L / 2, judged_L, rate_L, error_L, 1),
        ]

    def _expect_drops(self, record: LoadRecord, design_effect_L: np.ndarray, shapes: tuple) -> None:
        """Note what a perfectly balanced router would drop at this capacity."""
        assert record.dropped_LE is not None
        num_experts_L, top_k_L = shapes
        factor_L = capacity.implied_capacity_factor(record.counts_LE, record.dropped_LE, num_experts_L)
        if self._plan.capacity_factor is not None:
            factor_L = np.full(self._num_layers, self._plan.capacity_factor)
        expected_L = capacity.expected_drop(factor_L, record.tokens, top_k_L, num_experts_L, design_effect_L)
        self.expected_drop_L = np.nan_to_num(expected_L)

    def _logits(self, step: int, live: dict[str, np.ndarray]) -> list[Reading]:
        if "z_loss" not in live:
            return [self._silent("ROUTER_LOGITS"), self._silent("ROUTER_LOGITS", level=1)]
        config, z_L, lse_L = self._config, live["z_loss"], live["lse_rms"]
        factor_L = z_L / np.maximum(self._lowest_z(step, z_L), 1e-12)
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

    def _hardened(self, step: int, live: dict[str, np.ndarray]) -> Reading:
        if self._plan.planned_steps is None or "route_entropy" not in live:
            return self._silent("ROUTER_HARDENED")
        config, entropy_L = self._config, live["route_entropy"]
        early = step < config.hard_share * self._plan.planned_steps
        line_L = config.hard_entropy * self._one_L
        return Reading(
            "ROUTER_HARDENED",
            raise_L=(entropy_L < line_L) & early,
            clear_L=entropy_L > config.hard_clear_entropy,
            judged_L=np.isfinite(entropy_L),
            value_L=entropy_L,
            threshold_L=line_L,
        )

    def _nonfinite(self, record: LoadRecord) -> Reading:
        # A sum is finite unless an entry is not: one pass over each table instead of three.
        tables = (record.prob_sum_LE, record.weight_sum_LE, record.bias_LE)
        totals = [table_LE.sum(axis=-1) for table_LE in tables if table_LE is not None]
        sums = record.token_sums.items()
        totals += [total_L for name, total_L in sums if name not in _NOT_OF_EVERY_LAYER]
        bad_L = self._zero_L
        if totals and not np.isfinite(whole_L := np.concatenate(totals)).all():
            bad_L = (~np.isfinite(whole_L)).reshape(len(totals), -1).sum(axis=0).astype(np.float64)
        return Reading("NONFINITE", bad_L > 0, self._no_L, self._yes_L, bad_L, self._zero_L)
