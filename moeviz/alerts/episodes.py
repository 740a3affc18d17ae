"""The life of alerts: raised, updated sparingly, escalated, cleared.

One episode per rule and layer at a time.

A detector says what is true now; this turns it into AlertRecords, which are the only thing that leaves. While
a run starts, imbalance is normal: rules that say so are capped at warning until `startup_end`, and what is
still open then is promoted to its full severity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moeviz.alerts.rules import SEVERITIES, rule
from moeviz.records import AlertRecord, Severity

_CHANGE = 0.05
"""A peak must worsen by this share to be worth an update."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a detector knows about a rule that holds in a layer now."""

    rule: str
    layer: int | None
    value: float
    peak: float
    """Worst value since the rule began to hold."""
    threshold: float
    experts: tuple[int, ...] = ()
    facts: Mapping[str, Any]
    """Fills the rule's message and remedy."""
    evidence: Mapping[str, Any]


class Episodes:
    """Open episodes of a run. Every method returns the AlertRecords to write."""

    def __init__(self, startup_end: int = 0, update_every: int = 50) -> None:
        self._startup_end, self._update_every = startup_end, update_every
        self._open: dict[tuple[str, int | None], AlertRecord] = {}
        self._full: dict[tuple[str, int | None], Severity] = {}
        self._looked: dict[tuple[str, int | None], int] = {}
        self._records = 0
        self._due = 0
        """No open episode is due for an update before this record."""
        self._capped = True
        """Whether an open episode may have less than its full severity."""

    @property
    def open_alerts(self) -> tuple[AlertRecord, ...]:
        """Latest state of every open episode, in the order in which they were raised."""
        return tuple(self._open.values())

    def is_open(self, rule_id: str, layer: int | None) -> bool:
        return (rule_id, layer) in self._open

    def raised_step(self, rule_id: str, layer: int | None, default: int) -> int:
        """Step at which an open episode was raised; `default` when there is none."""
        record = self._open.get((rule_id, layer))
        return default if record is None else record.raised_step

    def raise_(self, finding: Finding, step: int) -> list[AlertRecord]:
        """Open an episode at `step`; nothing when it is open already."""
        key = (finding.rule, finding.layer)
        if key in self._open:
            return []
        row = rule(finding.rule)
        self._full[key] = row.severity
        record = AlertRecord(
            episode=f"{row.id}/{'run' if finding.layer is None else finding.layer}/{step}",
            rule=row.id,
            rule_version=row.version,
            layer=finding.layer,
            experts=finding.experts,
            severity=self._severity(key, step),
            raised_step=step,
            updated_step=step,
            cleared_step=None,
            value=finding.value,
            peak=finding.peak,
            threshold=finding.threshold,
            message=self._message(finding, step),
            remedy=row.remedy.format_map(finding.facts),
            evidence=finding.evidence,
        )
        return [self._keep(key, record)]

    def tick(self) -> list[tuple[str, int | None]]:
        """Count one record; returns (rule, layer) of the open episodes that are due for an `update`."""
        self._records += 1
        if self._records < self._due:
            return []
        due = [key for key, last in self._looked.items() if self._records - last >= self._update_every]
        if not due:
            self._due = min(self._looked.values(), default=self._records) + self._update_every
        return due

    def has_news(self, rule_id: str, layer: int | None, peak: float, experts: Iterable[int]) -> bool:
        """Whether an open episode got worse, or concerns further experts, since it was last reported."""
        record = self._open[rule_id, layer]
        self._looked[rule_id, layer] = self._records
        worse = abs(_worst(record, peak) - record.peak) > _CHANGE * abs(record.peak)
        return worse or not set(record.experts).issuperset(experts)

    def update(self, finding: Finding, step: int) -> list[AlertRecord]:
        """Report an open episode again if there is news of it."""
        key = (finding.rule, finding.layer)
        if not self.has_news(*key, finding.peak, finding.experts):
            return []
        return [self._keep(key, self._restate(self._open[key], finding, step))]

    def escalate(self, finding: Finding, step: int) -> list[AlertRecord]:
        """Give an open episode the harder severity of its rule."""
        key = (finding.rule, finding.layer)
        severity = rule(finding.rule).escalated
        if key not in self._open or severity is None or self._full[key] == severity:
            return []
        self._full[key] = severity
        record = self._open[key]
        stated = self._restate(record, finding, step)
        return [self._keep(key, replace(stated, severity=self._severity(key, step)))]

    def promote(self, step: int) -> list[AlertRecord]:
        """End of the start-up window: capped episodes that are still open get their full severity."""
        if step < self._startup_end or not self._capped:
            return []
        self._capped = False
        promoted = []
        for key, record in list(self._open.items()):
            if record.severity != self._severity(key, step):
                promoted.append(
                    replace(
                        record,
                        severity=self._severity(key, step),
                        updated_step=step,
                        message=record.message.removeprefix(_STARTUP) + " It outlasted the start of the run.",
                    )
                )
                self._keep(key, promoted[-1])
        return promoted

    def clear(self, rule_id: str, layer: int | None, step: int, value: float) -> list[AlertRecord]:
        """Close an episode; nothing when it is not open. `value` is the quantity as it is now."""
        record = self._open.pop((rule_id, layer), None)
        if record is None:
            return []
        del self._looked[rule_id, layer], self._full[rule_id, layer]
        return [replace(record, updated_step=step, cleared_step=step, value=value)]

    def restore(self, alerts: Iterable[AlertRecord]) -> None:
        """Adopt episodes that an earlier attempt of the run left open, instead of those that are open here."""
        self._open, self._full, self._looked = {}, {}, {}
        self._capped = True
        for record in alerts:
            if record.cleared_step is None:
                key = (record.rule, record.layer)
                row = rule(record.rule)
                harder = row.escalated is not None and record.severity == row.escalated
                self._full[key] = record.severity if harder else row.severity
                self._open[key], self._looked[key] = record, self._records

    def rewind(self, step: int, last_step: int) -> list[AlertRecord]:
        """Training went back to `step`: close what was raised later, at the last step it was seen."""
        undone = [key for key, record in self._open.items() if record.raised_step >= step]
        return [
            closed
            for rule_id, layer in undone
            for closed in self.clear(rule_id, layer, last_step, self._open[rule_id, layer].value)
        ]

    def _keep(self, key: tuple[str, int | None], record: AlertRecord) -> AlertRecord:
        self._open[key], self._looked[key] = record, self._records
        return record

    def _severity(self, key: tuple[str, int | None], step: int) -> Severity:
        full = self._full[key]
        if not rule(key[0]).startup_capped or step >= self._startup_end:
            return full
        self._capped = True
        return SEVERITIES[min(SEVERITIES.index(full), SEVERITIES.index("warning"))]

    def _message(self, finding: Finding, step: int) -> str:
        row = rule(finding.rule)
        prefix = _STARTUP if row.startup_capped and step < self._startup_end else ""
        return prefix + row.message.format_map(finding.facts)

    def _restate(self, record: AlertRecord, finding: Finding, step: int) -> AlertRecord:
        return replace(
            record,
            updated_step=step,
            value=finding.value,
            peak=_worst(record, finding.peak),
            threshold=finding.threshold,
            experts=finding.experts,
            message=self._message(finding, step),
            evidence=finding.evidence,
        )


def _worst(record: AlertRecord, value: float) -> float:
    """The peak of an episode with another value; a detector that was restarted no longer knows the old one."""
    return max(record.peak, value) if rule(record.rule).worse == "higher" else min(record.peak, value)


_STARTUP = "Start-up imbalance. "
