"""`moeviz check`: a run's alerts as an exit status, for CI and for the script that starts the next job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from moeviz.errors import MoevizError

if TYPE_CHECKING:
    from moeviz.alerts import AlertGroup


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    """Exit with 0 when a run has no open alert of a severity, or a graver one; else with 1.

    A run that ended by an error fails as well.
    """

    run: Positional[str | None] = None
    """Run folder, or its name under ./runs; the newest run when left out."""
    fail_on: Literal["warning", "error", "critical"] = "error"
    """Mildest severity that fails the check."""


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(CheckArguments, args=argv, prog="moeviz check")
    from moeviz.alerts import SEVERITIES, grouped
    from moeviz.store.catalog import resolve_run
    from moeviz.store.queries import alert_records, end_status, last_step
    from moeviz.store.reader import open_run

    with open_run(resolve_run(arguments.run)) as store:
        name, step, failed = store.info.name, last_step(store), end_status(store) == "failed"
        groups = grouped(alert_records(store), store.info.model.num_layers)
    if step is None and not failed:
        raise MoevizError(f"{name} has recorded no step; there is nothing to judge yet")
    line = SEVERITIES.index(arguments.fail_on)
    grave = [group for group in groups if SEVERITIES.index(group.severity) >= line]
    for group in grave:
        print(_line(group))
    if failed:
        print(f"✗ {name}: the run ended by an error")
    milder = _milder(len(groups) - len(grave))
    if not grave and not failed:
        print(f"✓ {name}: no open alert of severity {arguments.fail_on} or above at step {step}{milder}")
        return 0
    if grave:
        plural = "s" if len(grave) > 1 else ""
        print(f"✗ {name}: {len(grave)} open alert{plural} of severity {arguments.fail_on} or above{milder}")
    return 1


def _line(group: AlertGroup) -> str:
    from moeviz.colors import SEVERITY_MARKS

    mark = SEVERITY_MARKS[group.severity]
    said = f"{mark} {group.severity}: {group.rule}, open since step {group.first_step}: {group.message}"
    return said + (f"\n    → {group.remedy}" if group.remedy else "")


def _milder(count: int) -> str:
    return f" ({count} milder)" if count else ""
