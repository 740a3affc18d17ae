"""The conditions of the load rules, as arrays over layers: when each is raised, when it is calm again.

Several records are judged together: then arrays have a leading axis T, where they depend on the record.

Layers in which every token uses every expert (E = k) have nothing to balance and are never judged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeviz.alerts.config import AlertConfig
from moeviz.alerts.drift import DriftCourse
from moeviz.alerts.statistics import LoadStatistics
from moeviz.metrics import load


class Reading(NamedTuple):
    """One rule for every layer: on one record, or with a leading axis on several."""

    rule: str
    raise_L: np.ndarray
    clear_L: np.ndarray
    judged_L: np.ndarray
    value_L: np.ndarray
    threshold_L: np.ndarray
    level: int = 0
    """1 for the harder line of a rule that escalates."""
    keep_L: np.ndarray | None = None
    """Where a row of records that has begun goes on although `raise_L` fails by no more than noise."""
    weight_L: np.ndarray | None = None
    """What this record counts for in its row; None: 1."""


class LoadView(NamedTuple):
    """What the load rules look at, from smoothed loads: [L], or [T, L] of a course."""

    lowest_L: np.ndarray
    """Smallest relative load."""
    n_eff_L: np.ndarray
    util_L: np.ndarray
    excess_L: np.ndarray
    dead_L: np.ndarray
    """Number of dead experts."""

    def at(self, t: int) -> LoadView:
        """Of a course: the view after record `t`."""
        return LoadView(*(values_TL[t] for values_TL in self))


def look(statistics: LoadStatistics, config: AlertConfig) -> LoadView:
    """Summarise the smoothed loads of every layer."""
    mean_LE, width_L, top_k_L = statistics.mean_LE, statistics.num_experts_L, statistics.top_k_L
    n_eff_L = load.n_eff(statistics.smooth_share_LE)
    lowest_L = load.filled(mean_LE, width_L, np.inf).min(axis=-1)
    return LoadView(
        lowest_L=lowest_L,
        n_eff_L=n_eff_L,
        util_L=load.utilisation(n_eff_L, top_k_L, width_L),
        excess_L=load.excess(mean_LE.max(axis=-1) - 1, top_k_L, width_L),
        dead_L=statistics.experts_below(np.full(len(width_L), config.dead_line), lowest_L),
    )


class LoadRules:
    """The six load rules for layers of these shapes; `readings` takes a course of statistics."""

    def __init__(self, num_experts_L: np.ndarray, top_k_L: np.ndarray, config: AlertConfig) -> None:
        self._config = config
        self._has_choice_L = num_experts_L > top_k_L
        self._many_dead_L = np.maximum(2, np.ceil(config.collapse_dead_share * num_experts_L))
        self._one_L = np.ones(len(num_experts_L))
        self._dead_line_L = config.dead_line * self._one_L
        self._drift_line_L = config.drift_limit * self._one_L
        self._swing_line_L = config.swing_amplitude * self._one_L

    def readings(self, statistics: LoadStatistics, drift: DriftCourse, view: LoadView) -> list[Reading]:
        """Every rule on a course of statistics."""
        config = self._config
        judged_L = self._has_choice_L & (statistics.seen_L >= config.arm_after)
        known_L = statistics.seen_L > config.arm_after + config.raise_after
        idle_L = 1 - view.util_L
        seen_enough_L = statistics.even_total_L >= config.dead_assignments
        return [
            self._starved(statistics, view, judged_L, known_L),
            self._dead(statistics, view, judged_L & seen_enough_L, known_L),
            self._skew(view, idle_L, judged_L),
            self._collapse(view, idle_L, seen_enough_L, judged_L),
            self._drift(drift, view, judged_L),
            self._oscillation(statistics, judged_L),
        ]

    def _starved(
        self, statistics: LoadStatistics, view: LoadView, judged_L: np.ndarray, known_L: np.ndarray
    ) -> Reading:
        config, line_L = self._config, statistics.starved_line_L
        sd_L = statistics.mean_sd(view.lowest_L)
        guarded_L = line_L - config.guard_sd * sd_L
        return Reading(
            "EXPERT_STARVED",
            raise_L=view.lowest_L < guarded_L,
            clear_L=view.lowest_L > config.starved_clear * line_L,
            judged_L=judged_L,
            value_L=view.lowest_L,
            threshold_L=line_L,
            weight_L=_worth(guarded_L - view.lowest_L, sd_L, known_L),
        )

    def _dead(
        self, statistics: LoadStatistics, view: LoadView, judged_L: np.ndarray, known_L: np.ndarray
    ) -> Reading:
        # A few stray tokens lift a smoothed load over so low a line for many records: that is noise, not recovery.
        config = self._config
        sd_L = statistics.mean_sd(self._dead_line_L)
        stray_L = config.guard_sd * sd_L
        return Reading(
            "EXPERT_DEAD",
            raise_L=view.dead_L > 0,
            clear_L=view.lowest_L > config.dead_clear,
            judged_L=judged_L,
            value_L=view.lowest_L,
            threshold_L=self._dead_line_L,
            keep_L=view.lowest_L < np.minimum(config.dead_line + stray_L, config.dead_clear),
            weight_L=_worth(config.dead_clear - stray_L - view.lowest_L, sd_L, known_L),
        )

    def _skew(self, view: LoadView, idle_L: np.ndarray, judged_L: np.ndarray) -> Reading:
        config = self._config
        value_L = np.maximum(view.excess_L / config.skew_excess, idle_L / (1 - config.skew_util))
        calm_L = (view.excess_L < config.skew_clear_excess) & (view.util_L > config.skew_clear_util)
        return Reading("LOAD_SKEW", value_L > 1, calm_L, judged_L, value_L, self._one_L)

    def _collapse(
        self, view: LoadView, idle_L: np.ndarray, seen_enough_L: np.ndarray, judged_L: np.ndarray
    ) -> Reading:
        config = self._config
        dead_L = view.dead_L / self._many_dead_L * seen_enough_L
        concentration_L = np.maximum(
            view.excess_L / config.collapse_excess, idle_L / (1 - config.collapse_util)
        )
        calm_L = (view.excess_L < config.collapse_clear_excess) & (view.util_L > config.collapse_clear_util)
        return Reading(
            "ROUTING_COLLAPSE",
            raise_L=(concentration_L > 1) | (dead_L >= 1),
            clear_L=calm_L & (dead_L < 1),
            judged_L=judged_L,
            value_L=np.maximum(concentration_L, dead_L),
            threshold_L=self._one_L,
        )

    def _drift(self, drift: DriftCourse, view: LoadView, judged_L: np.ndarray) -> Reading:
        config = self._config
        fallen_L = drift.best_util_TL - view.util_L >= config.drift_util_drop
        return Reading(
            "LOAD_DRIFT",
            raise_L=(drift.sum_TL > config.drift_limit) & fallen_L,
            clear_L=drift.sum_TL == 0,
            judged_L=judged_L,
            value_L=drift.sum_TL,
            threshold_L=self._drift_line_L,
        )

    def _oscillation(self, statistics: LoadStatistics, judged_L: np.ndarray) -> Reading:
        config, autocorr_L = self._config, statistics.autocorr_L
        value_L = statistics.swing_L / np.maximum(statistics.swing_noise_L, 1e-12)
        wide_L = (value_L > config.swing_amplitude) & (statistics.swing_L > config.swing_floor)
        return Reading(
            "BIAS_OSCILLATION",
            raise_L=(autocorr_L < config.swing_autocorr) & wide_L,
            clear_L=(autocorr_L > config.swing_clear_autocorr) | (value_L < config.swing_clear_amplitude),
            judged_L=judged_L,
            value_L=value_L,
            threshold_L=self._swing_line_L,
        )


def _worth(below_L: np.ndarray, sd_L: np.ndarray, known_L: np.ndarray) -> np.ndarray:
    """How many records one record counts for: one more for each standard deviation below a line, at most three.

    Persistence is there to rule out noise, so what noise cannot explain need not persist as long. One, where the noise
    is not `known_L` well enough for this: before the first records that could have persisted.
    """
    deviations_L = below_L / np.maximum(sd_L, 1e-12)
    return 1 + np.minimum(np.maximum(deviations_L, 0), 2) * known_L
