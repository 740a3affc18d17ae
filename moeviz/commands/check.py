"""`moeviz check`: a run's alerts as an exit status, for CI and for the script that starts the next job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from moeviz.errors import MoevizError

if TYPE_CHECKING:
    from moeviz.alerts import AlertGroup
    from moeviz.live import RunState
    from moeviz.records import Severity


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    """Exit with 0 when a run has no open alert of a severity, or a graver one; else with 1.

    A run that ended by an error fails as well.
    """

    run: Positional[str | None] = None
    """Run folder, or its name under ./runs; the newest run when left out."""
    fail_on: Literal["warning", "error", "critical"] = "error"
    """Mildest severity that fails the check."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(
        CheckArguments, args=argv, prog="moeviz check", config=(tyro.conf.FlagCreatePairsOff,)
    )
    verdict = judge(arguments.run, arguments.fail_on)
    if arguments.json:
        print(json.dumps(verdict.as_json(), indent=2, default=str))
    else:
        _print(verdict)
    return 0 if verdict.passed else 1


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run's open alerts say at its newest step."""

    name: str
    step: int | None
    state: RunState
    failed: bool
    """Whether the run ended by an error."""
    fail_on: Severity
    grave: tuple[AlertGroup, ...]
    milder: tuple[AlertGroup, ...]

    @property
    def passed(self) -> bool:
        return not self.grave and not self.failed

    def as_json(self) -> dict[str, Any]:
        """Plain data: every group of alerts with its layers, and which of them fail the check."""
        rows = [(group, group in self.grave) for group in (*self.grave, *self.milder)]
        return {
            "name": self.name,
            "step": self.step,
            "state": self.state,
            "passed": self.passed,
            "ended_by_error": self.failed,
            "fail_on": self.fail_on,
            "alerts": [
                {
                    "rule": group.rule,
                    "severity": group.severity,
                    "fails": fails,
                    "since": group.first_step,
                    "layers": group.layers,
                    "message": group.message,
                    "remedy": group.remedy,
                }
                for group, fails in rows
            ],
        }


def judge(run: str | None, fail_on: Severity) -> Verdict:
    """Look at the open alerts of a run.

    Raises:
        MoevizError: no such run, or one without a step that did not fail either.
    """
    import time

    from moeviz.alerts import SEVERITIES, grouped
    from moeviz.store.catalog import resolve_run
    from moeviz.store.queries import alert_records, end_status, last_step, state_of
    from moeviz.store.reader import open_run

    with open_run(resolve_run(run)) as store:
        name, step, failed = store.info.name, last_step(store), end_status(store) == "failed"
        groups = grouped(alert_records(store), store.info.model.num_layers)
        state = state_of(store, time.time())
    if step is None and not failed:
        raise MoevizError(f"{name} has recorded no step; there is nothing to judge yet")
    line = SEVERITIES.index(fail_on)
    return Verdict(
        name=name,
        step=step,
        state=state,
        failed=failed,
        fail_on=fail_on,
        grave=tuple(group for group in groups if SEVERITIES.index(group.severity) >= line),
        milder=tuple(group for group in groups if SEVERITIES.index(group.severity) < line),
    )


def _print(verdict: Verdict) -> None:
    name, step, above = verdict.name, verdict.step, f"of severity {verdict.fail_on} or above"
    for group in verdict.grave:
        print(_line(group))
    if verdict.failed:
        print(f"✗ {name}: the run ended by an error")
    milder = f" ({len(verdict.milder)} milder)" if verdict.milder else ""
    dead = "; the run is silent and presumed dead" if verdict.state == "dead" else ""
    if verdict.passed:
        print(f"✓ {name}: no open alert {above} at step {step}{milder}{dead}")
    elif verdict.grave:
        plural = "s" if len(verdict.grave) > 1 else ""
        print(f"✗ {name}: {len(verdict.grave)} open alert{plural} {above}{milder}{dead}")


def _line(group: AlertGroup) -> str:
    from moeviz.colors import SEVERITY_MARKS

    mark = SEVERITY_MARKS[group.severity]
    said = f"{mark} {group.severity}: {group.rule}, open since step {group.first_step}: {group.message}"
    return said + (f"\n    → {group.remedy}" if group.remedy else "")
