"""From load records to alerts: statistics, rules, latches and episodes of all MoE layers together.

Feed it every record of the training mixture, in step order, and nothing else: one domain alone looks like
collapse (that is specialisation), and so does an evaluation set. All layers, and all records of a block, are judged in
the same few array operations; record by record goes only what a record hands on to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moeviz.alerts.circulating import circulating_readings
from moeviz.alerts.config import AlertConfig, RunPlan
from moeviz.alerts.drift import Drift, DriftCourse
from moeviz.alerts.episodes import Episodes, Finding
from moeviz.alerts.facts import experts_of, layer_facts
from moeviz.alerts.latch import NOTHING, Latch
from moeviz.alerts.load_rules import LoadRules, LoadView, look
from moeviz.alerts.router_rules import RouterCourse, RouterRules
from moeviz.alerts.rules import LATENT_RULES, PROBE_RULES, rule
from moeviz.alerts.statistics import LoadStatistics
from moeviz.metrics import layer_shapes, live_metrics, losses
from moeviz.metrics.load_block import LoadBlock
from moeviz.records import AlertRecord, LoadRecord, ModelInfo

_RECENT = 20
"""Newest values of the watched quantity that travel with an alert."""


class _Course(NamedTuple):
    """What was seen of T records, R rules and L layers."""

    statistics: LoadStatistics
    view: LoadView
    drift: DriftCourse
    routers: RouterCourse
    raise_RTL: np.ndarray
    value_RTL: np.ndarray
    threshold_RTL: np.ndarray


class RouterDetector:
    """Watches the routers of one model."""

    def __init__(
        self, info: ModelInfo, config: AlertConfig | None = None, plan: RunPlan | None = None
    ) -> None:
        self.config, self.plan = config or AlertConfig(), plan or RunPlan()
        self._info = info
        self._shapes = layer_shapes(info)
        self._most_nats_L = np.log(self._shapes[0])
        self.episodes = Episodes(self.plan.startup_end(self.config), self.config.update_every)
        self.restart()

    def restart(self) -> None:
        """Forget all statistics; open episodes stay open until their clear condition holds."""
        self.statistics = LoadStatistics(*self._shapes, self.config)
        self._drift = Drift(self._info.num_layers, self.config)
        self._loads = LoadRules(*self._shapes, self.config)
        self._routers = RouterRules(self._info, self.config, self.plan)
        self._latch: Latch | None = None
        self._recent_TRL = np.zeros((0, 0, 0))
        self._records = 0
        self._rows: list[tuple[str, int]] = []
        self._peak_RL, self._sign_R1 = np.zeros((0, 0)), np.zeros((0, 1))

    def observe(self, record: LoadRecord) -> list[AlertRecord]:
        """Judge one record."""
        return self.observe_block(LoadBlock.of([record]))[1][0]

    def observe_block(self, block: LoadBlock) -> tuple[dict[str, np.ndarray], list[list[AlertRecord]]]:
        """Judge T records; their steps do not fall.

        Returns their live metrics, [T, L] by id (those of `metrics.live_metrics`, with the design effect that was
        known before each record, and `design_effect`, `n_starved` and `n_dead` after it), and the alerts of each
        record.
        """
        before_L = self.statistics.design_effect_L
        course = self.statistics.follow(block.counts_LE)
        known_TL = np.concatenate([before_L[None], course.design_effect_L[:-1]])
        live = live_metrics(block, *self._shapes, known_TL)
        view = look(course, self.config)
        with np.errstate(invalid="ignore"):
            alerts = self._judge(block, live, course, view)
        live["design_effect"] = course.design_effect_L
        live["n_starved"] = course.experts_below(course.starved_line_L, view.lowest_L)
        live["n_dead"] = view.dead_L
        return live, alerts

    def restore(self, alerts: Iterable[AlertRecord]) -> None:
        """Adopt the open router episodes of an earlier attempt, so that they can be updated and cleared."""
        self.episodes.restore(
            alert
            for alert in alerts
            if alert.layer is not None and alert.rule not in PROBE_RULES | LATENT_RULES
        )
        if self._latch is not None:
            # What holds now and was not open then is raised by the next record in which it holds.
            self._latch.active_RL[:] = False
        self._adopt()

    def rewind(self, step: int, last_step: int) -> list[AlertRecord]:
        """Training went back to `step`: statistics start anew and episodes of the undone steps are closed."""
        closed = self.episodes.rewind(step, last_step)
        self.restart()
        return closed

    def _judge(
        self, block: LoadBlock, live: dict[str, np.ndarray], statistics: LoadStatistics, view: LoadView
    ) -> list[list[AlertRecord]]:
        config = self.config
        armed_TL = (statistics.seen_L >= config.arm_after) & (statistics.assignments_L > 0)
        gap_nats_TL = (1 - live["load_entropy"]) * self._most_nats_L
        drift = self._drift.follow(gap_nats_TL, view.util_L, armed_TL, block.steps)
        readings = self._loads.readings(statistics, drift, view)
        of_routers, routers = self._routers.readings(block, live, statistics.design_effect_L, self._shapes)
        readings += of_routers
        if config.circulating:
            readings += circulating_readings(live, armed_TL, self._shapes[0], config, self.plan.z_coef)
        if self._latch is None:
            self._rows = [(reading.rule, reading.level) for reading in readings]
            self._latch = self._new_latch()
            self._adopt()
        length = len(block.steps)
        raise_RTL = self._table([reading.raise_L for reading in readings], length, False)
        value_RTL = self._table([reading.value_L for reading in readings], length, 0.0)
        judged_RTL = self._table([reading.judged_L for reading in readings], length, False)
        threshold_RTL = self._table([reading.threshold_L for reading in readings], length, 0.0)
        course = _Course(statistics, view, drift, routers, raise_RTL, value_RTL, threshold_RTL)
        still = self._latch.is_still and not (raise_RTL & judged_RTL).any()
        if not still:  # seldom in a healthy run
            clear_RTL = self._table([reading.clear_L for reading in readings], length, False)
            keep_RTL = self._table([reading.keep_L for reading in readings], length, False)
            weight_RTL = self._table([reading.weight_L for reading in readings], length, 1.0)
        alerts = []
        for t, step in enumerate(block.steps):
            raised, cleared = NOTHING, NOTHING
            if not still:
                raised, cleared = self._latch.update(
                    raise_RTL[:, t],
                    clear_RTL[:, t],
                    judged_RTL[:, t],
                    step,
                    keep_RL=keep_RTL[:, t],
                    weight_RL=weight_RTL[:, t],
                )
            self._remember(value_RTL[:, t])
            alerts.append(self._transitions(course, t, raised, cleared, step))
        return alerts

    def _transitions(
        self, course: _Course, t: int, raised: np.ndarray, cleared: np.ndarray, step: int
    ) -> list[AlertRecord]:
        """What record `t` changed about the alerts. `raised` and `cleared`: (rule, layer), int [n, 2]."""
        due = self.episodes.tick()
        records = self.episodes.promote(step)
        for row, layer in raised.tolist():
            finding = self._finding(course, t, row, layer, step)
            change = self.episodes.escalate if self._rows[row][1] else self.episodes.raise_
            records += change(finding, step)
        for row, layer in cleared.tolist():
            if not self._rows[row][1]:
                value = float(course.value_RTL[row, t, layer])
                records += self.episodes.clear(self._rows[row][0], layer, step, value)
        for rule_id, layer in due:
            if layer is not None and self.episodes.is_open(rule_id, layer):
                row = self._rows.index((rule_id, 0))
                if not course.raise_RTL[row, t, layer]:
                    continue  # between the two lines: nothing new to say
                experts = experts_of(rule_id, layer, course.statistics.at(t), self.config)
                if self.episodes.has_news(rule_id, layer, float(self._peak_RL[row, layer]), experts):
                    records += self.episodes.update(self._finding(course, t, row, layer, step), step)
        return records

    def _table(self, rows: list[np.ndarray | None], length: int, without: bool | float) -> np.ndarray:
        """One array [R, T, L] of what each rule says, [L] or [T, L]; `without` where it says nothing."""
        table_RTL = np.empty((len(rows), length, self._info.num_layers), dtype=type(without))
        for row, values in enumerate(rows):
            table_RTL[row] = without if values is None else values
        return table_RTL

    def _remember(self, value_RL: np.ndarray) -> None:
        """Keep the newest values and the worst value since each condition last began to hold."""
        self._recent_TRL[self._records % _RECENT] = value_RL
        self._records += 1
        assert self._latch is not None
        if not self._latch.is_still:
            kept_RL = self._latch.active_RL | self._latch.holding_RL
            better_RL = self._sign_R1 * value_RL < self._sign_R1 * self._peak_RL
            value_RL = np.where(kept_RL & better_RL, self._peak_RL, value_RL)
        self._peak_RL = value_RL

    def _new_latch(self) -> Latch:
        config = self.config
        persist = {"LOAD_DRIFT": 1, "NONFINITE": 1, "FIVE_PERCENT": 1}
        persist |= {"BIAS_SATURATED": config.bias_after, "ROUTER_HARDENED": config.hard_after}
        raise_after_R = np.array([persist.get(rule_id, config.raise_after) for rule_id, _ in self._rows])
        shape = (len(self._rows), self._info.num_layers)
        self._recent_TRL = np.full((_RECENT, *shape), np.nan)
        self._peak_RL = np.full(shape, np.nan)
        self._sign_R1 = np.array(
            [[1 if rule(rule_id).worse == "higher" else -1] for rule_id, _ in self._rows]
        )
        return Latch(raise_after_R, np.full(len(self._rows), config.clear_after), self._info.num_layers)

    def _adopt(self) -> None:
        """Put the latches of open episodes on, after a restart or a restore."""
        if self._latch is not None:
            for alert in self.episodes.open_alerts:
                if alert.layer is not None and (alert.rule, 0) in self._rows:
                    self._latch.reset(self._rows.index((alert.rule, 0)), alert.layer, active=True)

    def _finding(self, course: _Course, t: int, row: int, layer: int, step: int) -> Finding:
        assert self._latch is not None
        rule_id, statistics = self._rows[row][0], course.statistics.at(t)
        experts = experts_of(rule_id, layer, statistics, self.config)
        held_since_L = course.drift.since_TL[t] if rule_id == "LOAD_DRIFT" else self._latch.since_RL[row]
        since = int(held_since_L[layer])
        if since < 0:  # the condition began before a restart
            since = self.episodes.raised_step(rule_id, layer, step)
        facts = layer_facts(layer, experts, statistics, course.view.at(t), course.routers, t) | {
            "step": step,
            "since": since,
            "value": float(course.value_RTL[row, t, layer]),
            "threshold": float(course.threshold_RTL[row, t, layer]),
            "progress": step / (self.plan.planned_steps or max(step, 1)),
        }
        facts["rounding"] = losses.bf16_rounding(facts["value"])
        order_T = np.arange(self._records - _RECENT, self._records) % _RECENT
        recent_T = self._recent_TRL[order_T, row, layer]
        return Finding(
            rule=rule_id,
            layer=layer,
            value=facts["value"],
            peak=float(self._peak_RL[row, layer]),
            threshold=facts["threshold"],
            experts=experts,
            facts=facts,
            evidence={
                "since": facts["since"],
                "recent": [round(float(value), 5) for value in recent_T[~np.isnan(recent_T)]],
                **{
                    name: round(facts[name], 4)
                    for name in ("n_eff", "eff_util", "excess_cov", "design_effect")
                },
            },
        )
