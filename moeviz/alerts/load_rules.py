"""The conditions of the load rules, as arrays over layers: when each is raised, when it is calm again.

Layers in which every token uses every expert (E = k) have nothing to balance and are never judged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeviz.alerts.config import AlertConfig
from moeviz.alerts.drift import Drift
from moeviz.alerts.statistics import LoadStatistics
from moeviz.metrics import load


class Reading(NamedTuple):
    """One rule on one record, for every layer."""

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
    """What the load rules look at, from smoothed loads."""

    lowest_L: np.ndarray
    """Smallest relative load."""
    n_eff_L: np.ndarray
    util_L: np.ndarray
    excess_L: np.ndarray
    dead_L: np.ndarray
    """Number of dead experts."""


def look(statistics: LoadStatistics, config: AlertConfig) -> LoadView:
    """Summarise the smoothed loads of every layer."""
    mean_LE, width_L, top_k_L = statistics.mean_LE, statistics.num_experts_L, statistics.top_k_L
    n_eff_L = load.n_eff(statistics.smooth_share_LE)
    return LoadView(
        lowest_L=load.filled(mean_LE, width_L, np.inf).min(axis=-1),
        n_eff_L=n_eff_L,
        util_L=load.utilisation(n_eff_L, top_k_L, width_L),
        excess_L=load.excess(mean_LE.max(axis=-1) - 1, top_k_L, width_L),
        dead_L=statistics.experts_below(config.dead_line).sum(axis=-1),
    )


def load_readings(
    statistics: LoadStatistics, drift: Drift, view: LoadView, config: AlertConfig
) -> list[Reading]:
    """The six load rules on the current statistics."""
    judged_L = (statistics.seen_L >= config.arm_after) & (statistics.num_experts_L > statistics.top_k_L)
    return [
        _starved(statistics, view, config, judged_L),
        _dead(statistics, view, config, judged_L),
        _skew(view, config, judged_L),
        _collapse(statistics, view, config, judged_L),
        _drift(drift, view, config, judged_L),
        _oscillation(statistics, config, judged_L),
    ]


def _starved(
    statistics: LoadStatistics, view: LoadView, config: AlertConfig, judged_L: np.ndarray
) -> Reading:
    line_L = statistics.starved_line_L
    sd_L = statistics.mean_sd(view.lowest_L)
    guarded_L = line_L - config.guard_sd * sd_L
    return Reading(
        "EXPERT_STARVED",
        raise_L=view.lowest_L < guarded_L,
        clear_L=view.lowest_L > config.starved_clear * line_L,
        judged_L=judged_L,
        value_L=view.lowest_L,
        threshold_L=line_L,
        weight_L=_worth((guarded_L - view.lowest_L) / np.maximum(sd_L, 1e-12), statistics, config),
    )


def _dead(statistics: LoadStatistics, view: LoadView, config: AlertConfig, judged_L: np.ndarray) -> Reading:
    # A few stray tokens lift a smoothed load over so low a line for many records: that is noise, not recovery.
    sd_L = statistics.mean_sd(np.full_like(view.lowest_L, config.dead_line))
    stray_L = config.guard_sd * sd_L
    return Reading(
        "EXPERT_DEAD",
        raise_L=view.dead_L > 0,
        clear_L=view.lowest_L > config.dead_clear,
        judged_L=judged_L & (statistics.even_total_L >= config.dead_assignments),
        value_L=view.lowest_L,
        threshold_L=np.full_like(view.lowest_L, config.dead_line),
        keep_L=view.lowest_L < np.minimum(config.dead_line + stray_L, config.dead_clear),
        weight_L=_worth(
            (config.dead_clear - stray_L - view.lowest_L) / np.maximum(sd_L, 1e-12), statistics, config
        ),
    )


def _worth(deviations_L: np.ndarray, statistics: LoadStatistics, config: AlertConfig) -> np.ndarray:
    """How many records one record counts for: one more for each standard deviation below a line, at most three.

    Persistence is there to rule out noise, so what noise cannot explain need not persist as long. Before the first
    records that could have persisted, the noise is not known well enough for this.
    """
    known_L = statistics.seen_L > config.arm_after + config.raise_after
    return np.where(known_L, 1 + np.clip(deviations_L, 0, 2), 1.0)


def _skew(view: LoadView, config: AlertConfig, judged_L: np.ndarray) -> Reading:
    value_L = np.maximum(view.excess_L / config.skew_excess, (1 - view.util_L) / (1 - config.skew_util))
    calm_L = (view.excess_L < config.skew_clear_excess) & (view.util_L > config.skew_clear_util)
    return Reading("LOAD_SKEW", value_L > 1, calm_L, judged_L, value_L, np.ones_like(value_L))


def _collapse(
    statistics: LoadStatistics, view: LoadView, config: AlertConfig, judged_L: np.ndarray
) -> Reading:
    many_dead_L = np.maximum(2, np.ceil(config.collapse_dead_share * statistics.num_experts_L))
    dead_L = np.where(statistics.even_total_L >= config.dead_assignments, view.dead_L / many_dead_L, 0.0)
    concentration_L = np.maximum(
        view.excess_L / config.collapse_excess, (1 - view.util_L) / (1 - config.collapse_util)
    )
    calm_L = (view.excess_L < config.collapse_clear_excess) & (view.util_L > config.collapse_clear_util)
    return Reading(
        "ROUTING_COLLAPSE",
        raise_L=(concentration_L > 1) | (dead_L >= 1),
        clear_L=calm_L & (dead_L < 1),
        judged_L=judged_L,
        value_L=np.maximum(concentration_L, dead_L),
        threshold_L=np.ones_like(concentration_L),
    )


def _drift(drift: Drift, view: LoadView, config: AlertConfig, judged_L: np.ndarray) -> Reading:
    fallen_L = drift.best_util_L - view.util_L >= config.drift_util_drop
    return Reading(
        "LOAD_DRIFT",
        raise_L=(drift.sum_L > config.drift_limit) & fallen_L,
        clear_L=drift.sum_L == 0,
        judged_L=judged_L,
        value_L=drift.sum_L,
        threshold_L=np.full_like(drift.sum_L, config.drift_limit),
    )


def _oscillation(statistics: LoadStatistics, config: AlertConfig, judged_L: np.ndarray) -> Reading:
    value_L = statistics.swing_L / np.maximum(statistics.swing_noise_L, 1e-12)
    autocorr_L = statistics.autocorr_L
    wide_L = (value_L > config.swing_amplitude) & (statistics.swing_L > config.swing_floor)
    return Reading(
        "BIAS_OSCILLATION",
        raise_L=(autocorr_L < config.swing_autocorr) & wide_L,
        clear_L=(autocorr_L > config.swing_clear_autocorr) | (value_L < config.swing_clear_amplitude),
        judged_L=judged_L,
        value_L=value_L,
        threshold_L=np.full_like(value_L, config.swing_amplitude),
    )
