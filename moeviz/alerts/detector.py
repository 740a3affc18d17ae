"""From load records to alerts: statistics, rules, latches and episodes of all MoE layers together.

Feed it every record of the training mixture, in step order, and nothing else: one domain alone looks like
collapse (that is specialisation), and so does an evaluation set. All layers are judged in the same few array
operations.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moeviz.alerts.circulating import circulating_readings
from moeviz.alerts.config import AlertConfig, RunPlan
from moeviz.alerts.drift import Drift
from moeviz.alerts.episodes import Episodes, Finding
from moeviz.alerts.facts import experts_of, layer_facts
from moeviz.alerts.latch import Latch
from moeviz.alerts.load_rules import LoadRules, Reading, look
from moeviz.alerts.router_rules import RouterRules
from moeviz.alerts.rules import LATENT_RULES, PROBE_RULES, rule
from moeviz.alerts.statistics import LoadStatistics
from moeviz.metrics import layer_shapes, live_metrics, losses
from moeviz.records import AlertRecord, LoadRecord, ModelInfo

_RECENT = 20
"""Newest values of the watched quantity that travel with an alert."""


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
        self._view = look(self.statistics, self.config)
        self._latch: Latch | None = None
        self._recent_TRL = np.zeros((0, 0, 0))
        self._records = 0
        self._rows: list[tuple[str, int]] = []
        self._peak_RL, self._sign_R1 = np.zeros((0, 0)), np.zeros((0, 1))

    def observe(self, record: LoadRecord, live: dict[str, np.ndarray] | None = None) -> list[AlertRecord]:
        """Judge one record.

        `live` are its metrics where the caller has them already (`metrics.live_metrics`).
        """
        self.statistics.update(record.counts_LE)
        if live is None:
            live = live_metrics(record, *self._shapes, self.statistics.design_effect_L)
        self._view = look(self.statistics, self.config)
        with np.errstate(invalid="ignore"):
            readings = self._readings(record, live)
        return self._transitions(readings, record.step)

    @property
    def n_starved_L(self) -> np.ndarray:
        """Experts of each layer whose smoothed load is below the starved line."""
        return self.statistics.experts_below(self.statistics.starved_line_L, self._view.lowest_L)

    @property
    def n_dead_L(self) -> np.ndarray:
        """Experts of each layer whose smoothed load is below the dead line."""
        return self._view.dead_L

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

    def _readings(self, record: LoadRecord, live: dict[str, np.ndarray]) -> list[Reading]:
        statistics, config = self.statistics, self.config
        armed_L = (statistics.seen_L >= config.arm_after) & (statistics.assignments_L > 0)
        gap_nats_L = (1 - live["load_entropy"]) * self._most_nats_L
        self._drift.update(gap_nats_L, self._view.util_L, armed_L, record.step)
        readings = self._loads.readings(statistics, self._drift, self._view)
        readings += self._routers.readings(record, live, statistics.design_effect_L, self._shapes)
        if config.circulating:
            readings += circulating_readings(live, armed_L, self._shapes[0], config, self.plan.z_coef)
        return readings

    def _transitions(self, readings: list[Reading], step: int) -> list[AlertRecord]:
        if self._latch is None:
            self._rows = [(reading.rule, reading.level) for reading in readings]
            self._latch = self._new_latch()
            self._adopt()
        raised, cleared = self._latch.update(
            self._table([reading.raise_L for reading in readings]),
            self._table([reading.clear_L for reading in readings]),
            self._table([reading.judged_L for reading in readings]),
            step,
            keep_RL=self._rows_of([reading.keep_L for reading in readings], False),
            weight_RL=self._rows_of([reading.weight_L for reading in readings], 1.0),
        )
        self._remember(readings)
        due = self.episodes.tick()
        records = self.episodes.promote(step)
        for row, layer in raised.tolist():
            finding = self._finding(readings[row], row, layer, step)
            change = self.episodes.escalate if readings[row].level else self.episodes.raise_
            records += change(finding, step)
        for row, layer in cleared.tolist():
            if not readings[row].level:
                value = float(readings[row].value_L[layer])
                records += self.episodes.clear(readings[row].rule, layer, step, value)
        for rule_id, layer in due:
            if layer is not None and self.episodes.is_open(rule_id, layer):
                row = self._rows.index((rule_id, 0))
                if not readings[row].raise_L[layer]:
                    continue  # between the two lines: nothing new to say
                experts = experts_of(rule_id, layer, self.statistics, self.config)
                if self.episodes.has_news(rule_id, layer, float(self._peak_RL[row, layer]), experts):
                    records += self.episodes.update(self._finding(readings[row], row, layer, step), step)
        return records

    def _table(self, rows: list[np.ndarray]) -> np.ndarray:
        """One array [R, L]; a third of the time of `np.stack`."""
        return np.concatenate(rows).reshape(len(rows), self._info.num_layers)

    def _rows_of(self, rows: list[np.ndarray | None], without: bool | float) -> np.ndarray:
        """One array [R, L] of what each rule says; `without` where it says nothing."""
        table_RL = np.full((len(rows), self._info.num_layers), without)
        for row, values_L in enumerate(rows):
            if values_L is not None:
                table_RL[row] = values_L
        return table_RL

    def _remember(self, readings: list[Reading]) -> None:
        """Keep the newest values and the worst value since each condition last began to hold."""
        value_RL = self._table([reading.value_L for reading in readings])
        self._recent_TRL[self._records % _RECENT] = value_RL
        self._records += 1
        assert self._latch is not None
        kept_RL = self._latch.active_RL | self._latch.holding_RL
        if kept_RL.any():
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

    def _finding(self, reading: Reading, row: int, layer: int, step: int) -> Finding:
        assert self._latch is not None
        statistics, config = self.statistics, self.config
        experts = experts_of(reading.rule, layer, statistics, config)
        since = self._drift.since_L if reading.rule == "LOAD_DRIFT" else self._latch.since_RL[row]
        if since[layer] < 0:  # the condition began before a restart
            since = np.full_like(since, self.episodes.raised_step(reading.rule, layer, step))
        facts = layer_facts(layer, experts, statistics, self._view, self._routers) | {
            "step": step,
            "since": int(since[layer]),
            "value": float(reading.value_L[layer]),
            "threshold": float(reading.threshold_L[layer]),
            "progress": step / (self.plan.planned_steps or max(step, 1)),
        }
        facts["rounding"] = losses.bf16_rounding(facts["value"])
        order_T = np.arange(self._records - _RECENT, self._records) % _RECENT
        recent_T = self._recent_TRL[order_T, row, layer]
        return Finding(
            rule=reading.rule,
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
