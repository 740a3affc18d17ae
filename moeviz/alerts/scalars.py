"""Alerts about the numbers of a step that belong to no layer: loss and gradient norm.

Watches `loss` and `grad_norm`; NONFINITE watches every scalar of `_FINITE`. Feed it every ScalarRecord in
step order.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from moeviz.alerts.circulating import Circulating
from moeviz.alerts.config import AlertConfig, RunPlan
from moeviz.alerts.episodes import Episodes, Finding
from moeviz.alerts.rules import LATENT_RULES, PROBE_RULES
from moeviz.alerts.scalar_rules import Divergence, Explosion, Judgement, Spike
from moeviz.records import AlertRecord, ScalarRecord

LOSS, GRAD = "loss", "grad_norm"
WATCHED = {LOSS, GRAD}
"""Scalars that every training step reports."""
_FINITE = (LOSS, GRAD, "aux_loss", "z_loss")
"""Scalars, or first parts of names like `aux_loss/3`, that must be finite in every step."""
_RECENT = 20
"""Newest values that travel with an alert."""


class Hold:
    """Persistence of one condition.

    True `raise_after` times in a row, then calm `clear_after` times in a row.
    """

    def __init__(self, raise_after: int, clear_after: int) -> None:
        self._raise_after, self._clear_after = raise_after, clear_after
        self._held = self._calm = 0
        self.since = -1
        """Step at which the condition began to hold."""
        self.peak = -math.inf
        """Largest value since then."""
        self.recent: deque[float] = deque(maxlen=_RECENT)

    def update(self, judgement: Judgement, step: int, *, is_open: bool) -> tuple[bool, bool]:
        """(whether the condition has held long enough, whether it has been calm long enough)."""
        if judgement.raises and not self._held and not is_open:
            self.since, self.peak = step, -math.inf
        self._held = self._held + 1 if judgement.raises else 0
        self._calm = self._calm + 1 if judgement.clears else 0
        self.peak = max(self.peak, judgement.value)
        self.recent.append(round(judgement.value, 5))
        return self._held >= self._raise_after, self._calm >= self._clear_after


class ScalarDetector:
    """Watches the loss and the gradient norm of one run."""

    def __init__(self, config: AlertConfig | None = None, plan: RunPlan | None = None) -> None:
        self.config, self.plan = config or AlertConfig(), plan or RunPlan()
        self.episodes = Episodes(update_every=self.config.update_every)
        self.restart()

    def restart(self) -> None:
        """Forget the past; open episodes stay open until their clear condition holds."""
        config = self.config
        self._spikes = {LOSS: Spike(config, config.spike_share), GRAD: Spike(config, config.spike_grad_share)}
        self._divergence = Divergence(config)
        self._explosion = Explosion(config, self.plan.grad_clip)
        self._holds = {
            LOSS: Hold(1, config.spike_clear_after),
            GRAD: Hold(1, config.spike_clear_after),
            "diverging": Hold(config.diverge_after, config.spike_clear_after),
            "history": Hold(config.explode_after, config.clear_after),
            "clip": Hold(config.explode_clip_after, config.clear_after),
            "GRAD_NORM_LINE": Hold(config.raise_after, config.clear_after),
            "LOSS_RISING": Hold(1, 1),
            "VALIDATION_GAP": Hold(1, 1),
        }
        self._circulating = Circulating(config) if config.circulating else None
        self._owner: dict[str, str] = {}
        self._due: list[tuple[str, int | None]] = []

    def observe(self, record: ScalarRecord) -> list[AlertRecord]:
        """Judge one record; scalars with other names pass unseen."""
        step, values = record.step, record.values
        self._due = self.episodes.tick()
        changes = self._nonfinite(record)
        for name in (LOSS, GRAD):
            if math.isfinite(values.get(name, math.nan)):
                changes += self._apply("LOSS_SPIKE", name, self._spikes[name].judge(values[name]), step)
        if math.isfinite(values.get(LOSS, math.nan)):
            judgement = self._divergence.judge(values[LOSS], step)
            changes += self._apply("LOSS_DIVERGING", "diverging", judgement, step)
        if math.isfinite(values.get(GRAD, math.nan)):
            by_history, by_clip = self._explosion.judge(values[GRAD])
            changes += self._apply("GRAD_EXPLOSION", "history", by_history, step)
            changes += self._apply("GRAD_EXPLOSION", "clip", by_clip, step)
        if self._circulating is not None:
            for rule_id, judgement in self._circulating.judge(values, step):
                changes += self._apply(rule_id, rule_id, judgement, step)
        return changes

    def restore(self, alerts: Iterable[AlertRecord]) -> None:
        """Adopt the open run-level episodes of an earlier attempt, to be updated and cleared here."""
        self.episodes.restore(
            alert for alert in alerts if alert.layer is None and alert.rule not in PROBE_RULES | LATENT_RULES
        )

    def rewind(self, step: int, last_step: int) -> list[AlertRecord]:
        """Training went back to `step`: statistics start anew and episodes of the undone steps are closed."""
        closed = self.episodes.rewind(step, last_step)
        self.restart()
        return closed

    def _apply(self, rule_id: str, clause: str, judgement: Judgement | None, step: int) -> list[AlertRecord]:
        """Feed one clause of a rule.

        An episode belongs to the clause that raised it, which alone can clear it.
        """
        if judgement is None:
            return []
        is_open = self.episodes.is_open(rule_id, None)
        owned = is_open and self._owner.setdefault(rule_id, clause) == clause
        raised, cleared = self._holds[clause].update(judgement, step, is_open=owned)
        if raised and not is_open:
            self._owner[rule_id] = clause
            return self.episodes.raise_(self._finding(rule_id, clause, judgement, step), step)
        if owned and cleared:
            del self._owner[rule_id]
            return self.episodes.clear(rule_id, None, step, judgement.value)
        if owned and (rule_id, None) in self._due:
            return self.episodes.update(self._finding(rule_id, clause, judgement, step), step)
        return []

    def _finding(self, rule_id: str, clause: str, judgement: Judgement, step: int) -> Finding:
        hold = self._holds[clause]
        since = self._divergence.best_step if rule_id == "LOSS_DIVERGING" else hold.since
        facts: dict[str, Any] = {
            "name": "the gradient norm" if clause == GRAD else "the loss",
            "step": step,
            "since": since,
            "lasting": step - hold.since + 1,
            "value": judgement.value,
            "threshold": judgement.threshold,
            "level": judgement.level,
            "usual": "the norm it is clipped to" if clause == "clip" else "its usual level",
        }
        return Finding(
            rule=rule_id,
            layer=None,
            value=judgement.value,
            peak=hold.peak,
            threshold=judgement.threshold,
            facts=facts,
            evidence={"since": since, "level": judgement.level, "recent": list(hold.recent)},
        )

    def _nonfinite(self, record: ScalarRecord) -> list[AlertRecord]:
        bad = [
            name
            for name, value in record.values.items()
            if name.partition("/")[0] in _FINITE and not math.isfinite(value)
        ]
        if not bad:
            return []
        finding = Finding(
            rule="NONFINITE",
            layer=None,
            value=float(len(bad)),
            peak=float(len(bad)),
            threshold=0.0,
            facts={"name": ", ".join(bad), "step": record.step, "where": ""},
            evidence={"names": bad},
        )
        return self.episodes.raise_(finding, record.step)
