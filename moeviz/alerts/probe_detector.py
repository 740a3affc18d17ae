"""Alerts about the fixed probe: routing that moves again, experts that do the same, attention that looks at one key.

Each pass is one observation, hundreds of steps after the one before, so nothing persists over records here: a rule is
raised by the first pass that says so, and cleared by the first that does not. All are notes, not alarms: they tell
where to look.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from moeviz.alerts.config import AlertConfig
from moeviz.alerts.episodes import Episodes, Finding
from moeviz.alerts.rules import PROBE_RULES
from moeviz.records import AlertRecord, MetricRecord, ProbeRecord

_RECENT = 20
_NAMED = 8
"""Heads that a sentence names at most."""
_SAME_INTERVAL = 0.1
"""Churn over another number of steps, by more than this share, is another quantity."""


class ProbeDetector:
    """Watches the passes of one run."""

    def __init__(self, config: AlertConfig | None = None) -> None:
        self.config = config or AlertConfig()
        self.episodes = Episodes()
        self.restart()

    def restart(self) -> None:
        """Forget the passes before; open episodes stay open until a pass is calm."""
        self._churn_TL: deque[np.ndarray] = deque(maxlen=self.config.churn_passes)
        self._interval = 0
        self._last_step: int | None = None
        self._recent: dict[tuple[str, int | None], deque[float]] = {}

    def observe(self, record: ProbeRecord, metrics: MetricRecord) -> list[AlertRecord]:
        """Judge one pass by its record and the metrics that follow from it."""
        self.episodes.tick()
        changes = self._churn(metrics)
        changes += self._alike(metrics)
        changes += self._attention(record)
        self._last_step = record.step
        return changes

    def restore(self, alerts: Iterable[AlertRecord]) -> None:
        """Adopt the open episodes of an earlier attempt."""
        self.episodes.restore(alert for alert in alerts if alert.rule in PROBE_RULES)

    def rewind(self, step: int, last_step: int) -> list[AlertRecord]:
        """Training went back to `step`: the passes before are forgotten and episodes of undone steps closed."""
        closed = self.episodes.rewind(step, last_step)
        self.restart()
        return closed

    def _churn(self, metrics: MetricRecord) -> list[AlertRecord]:
        """Against the median of the passes before; only passes that are equally far apart tell something."""
        churn_L = metrics.values.get("churn")
        if not isinstance(churn_L, np.ndarray) or self._last_step is None:
            return []
        interval = metrics.step - self._last_step
        if not self._churn_TL or abs(interval - self._interval) > _SAME_INTERVAL * self._interval:
            if len(self._churn_TL) == self._churn_TL.maxlen:
                return []  # one odd pass, as the last of a run: nothing to compare it with
            self._churn_TL.clear()
            self._interval = interval
        changes = []
        config = self.config
        if len(self._churn_TL) == self._churn_TL.maxlen:
            usual_L = np.median(self._churn_TL, axis=0)
            for layer, (churn, usual) in enumerate(zip(churn_L, usual_L, strict=True)):
                line = max(config.churn_factor * usual, config.churn_floor)
                if np.isfinite(churn) and np.isfinite(usual):
                    facts = {"usual": float(usual), "passes": len(self._churn_TL)}
                    changes += self._judge(
                        "PROBE_CHURN",
                        layer,
                        metrics.step,
                        float(churn),
                        float(line),
                        churn > line,
                        churn <= line,
                        facts,
                    )
        self._churn_TL.append(churn_L)
        return changes

    def _alike(self, metrics: MetricRecord) -> list[AlertRecord]:
        """The larger of two similarities: of what experts compute, and of the router's rows."""
        config = self.config
        found = {
            name: values_L
            for name in ("pes", "router_cos")
            if isinstance(values_L := metrics.values.get(name), np.ndarray)
        }
        if not found:
            return []
        changes = []
        for layer in range(len(next(iter(found.values())))):
            known = {name: float(values_L[layer]) for name, values_L in found.items()}
            known = {name: value for name, value in known.items() if np.isfinite(value)}
            if not known:
                continue
            worst = max(known, key=lambda name: known[name])
            what = "Experts" if worst == "pes" else "The router's rows"
            value, line = known[worst], config.alike_line
            changes += self._judge(
                "EXPERTS_ALIKE",
                layer,
                metrics.step,
                value,
                line,
                value > line,
                value < config.alike_clear,
                {"what": what, **known},
            )
        return changes

    def _attention(self, record: ProbeRecord) -> list[AlertRecord]:
        """The share of all heads whose attention hardly leaves one key."""
        if not record.head_entropy:
            return []
        config = self.config
        low = [
            (block, head)
            for block, entropy_H in sorted(record.head_entropy.items())
            for head in np.flatnonzero(np.asarray(entropy_H) < config.head_entropy)
        ]
        total = sum(np.size(entropy_H) for entropy_H in record.head_entropy.values())
        share, line = len(low) / total, config.head_share
        named = ", ".join(f"{block}.{head}" for block, head in low[:_NAMED])
        facts = {
            "heads": len(low),
            "total": total,
            "named": named + (f" and {len(low) - _NAMED} more" if len(low) > _NAMED else ""),
            "entropy": config.head_entropy,
        }
        calm = share < config.head_clear_share
        return self._judge("ATTENTION_COLLAPSED", None, record.step, share, line, share > line, calm, facts)

    def _judge(
        self,
        rule_id: str,
        layer: int | None,
        step: int,
        value: float,
        line: float,
        raises: bool | np.bool_,
        clears: bool | np.bool_,
        facts: dict[str, Any],
    ) -> list[AlertRecord]:
        recent = self._recent.setdefault((rule_id, layer), deque(maxlen=_RECENT))
        recent.append(round(value, 5))
        evidence = {**facts, "recent": list(recent)}
        facts = {**facts, "layer": layer, "step": step, "value": value, "threshold": line}
        finding = Finding(
            rule=rule_id, layer=layer, value=value, peak=value, threshold=line, facts=facts, evidence=evidence
        )
        if self.episodes.is_open(rule_id, layer):
            if clears:
                return self.episodes.clear(rule_id, layer, step, value)
            return self.episodes.update(finding, step) if raises else []
        return self.episodes.raise_(finding, step) if raises else []
