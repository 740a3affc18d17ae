"""What the alert rules promise, as bars over the rows of `alerts.py`; every bar is about the worst replicate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench_report import Bar

Row = Mapping[str, Any]
_NOTES = {"LOAD_DRIFT"}
"""Rules of severity info: a note is no alarm."""
_DELAYS = (
    ("dead1", "EXPERT_STARVED", 90),
    ("dead1", "EXPERT_DEAD", 140),
    ("oscillate", "BIAS_OSCILLATION", 20),
)
"""Scenario, rule, steps from onset at most."""


def alert_bars(quiet: Sequence[Row], loud: Sequence[Row]) -> list[Bar]:
    """Calm of the balanced scenarios, delays of the others. Parts that were not run have no bar."""
    return [*_calm(quiet), *_critical(loud), *_delays(loud), *_lead(loud)]


def _calm(quiet: Sequence[Row]) -> Iterator[Bar]:
    rows = [row for row in quiet if row["scenario"] == "balanced"]
    if rows:
        alarms = sum(count for row in rows for rule, count in row["alarms"].items() if rule not in _NOTES)
        steps = min(row["steps"] for row in rows)
        what = f"false alarms in {len(rows)} x {steps:,} balanced steps"
        yield Bar(what=what, value=alarms, at_most=0, unit="alarms")


def _critical(loud: Sequence[Row]) -> Iterator[Bar]:
    for row in loud:
        if row["scenario"] == "sudden":
            yield Bar(
                what=_what(row, "critical"), value=_or_never(row["critical_max"]), at_most=30, unit="steps"
            )


def _delays(loud: Sequence[Row]) -> Iterator[Bar]:
    for scenario, rule, at_most in _DELAYS:
        for row in loud:
            if row["scenario"] == scenario:
                cell = row["delays"].get(rule)
                worst = cell["max"] if cell and cell["found"] == 1 else None
                yield Bar(what=_what(row, rule), value=_or_never(worst), at_most=at_most, unit="steps")


def _lead(loud: Sequence[Row]) -> Iterator[Bar]:
    """LOAD_DRIFT before the collapse alert; written as a delay, so that smaller is better as in the other bars."""
    for row in loud:
        if row["scenario"] == "slow":
            lead = -1 if row["lead"] is None else row["lead"]
            yield Bar(what=_what(row, "drift note, minus lead"), value=-lead, at_most=-300, unit="steps")


def _what(row: Row, rule: str) -> str:
    return "{} {},{},{}: {}".format(row["scenario"], *row["shape"], rule)


def _or_never(steps: float | None) -> float:
    return float("inf") if steps is None else steps
