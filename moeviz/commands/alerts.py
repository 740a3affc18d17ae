"""`moeviz alerts`: what went wrong in a run, where, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeviz.records import AlertRecord


@dataclass(frozen=True, kw_only=True)
class AlertsArguments:
    """List the alerts of a run with their remedies: open ones first, worst first."""

    run: Positional[str | None] = None
    """Run folder, or its name under ./runs; the newest run when left out."""
    open: bool = False
    """Only alerts that are not cleared."""
    json: bool = False
    """Print JSON instead of text."""


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(
        AlertsArguments, args=argv, prog="moeviz alerts", config=(tyro.conf.FlagCreatePairsOff,)
    )
    from moeviz.store.catalog import resolve_run
    from moeviz.store.queries import alert_records
    from moeviz.store.reader import open_run

    with open_run(resolve_run(arguments.run)) as store:
        alerts = [alert for alert in alert_records(store) if not arguments.open or alert.cleared_step is None]
        name = store.info.name
    if arguments.json:
        print(json.dumps([asdict(alert) for alert in alerts], indent=2, default=str))
        return 0
    from rich.console import Console

    console = Console()
    if alerts:
        console.print(alert_list(alerts))
    else:
        console.print(f"[bold green]✓[/] {name}: no {'open ' if arguments.open else ''}alerts")
    return 0


def alert_list(alerts: Sequence[AlertRecord]) -> RenderableType:
    """Alerts as text: mark and severity, where and since when, the message, the remedy."""
    from rich.table import Table
    from rich.text import Text

    from moeviz.colors import SEVERITY_COLORS, SEVERITY_MARKS

    table = Table.grid(padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for alert in alerts:
        is_open = alert.cleared_step is None
        style = f"bold {SEVERITY_COLORS[alert.severity]}" if is_open else "dim"
        until = f"open since step {alert.raised_step:,}"
        if not is_open:
            until = f"steps {alert.raised_step:,} to {alert.cleared_step:,}"
        body = Text(alert.message, style="" if is_open else "dim")
        body.append(
            f"\nnow {alert.value:.4g}, worst {alert.peak:.4g}, threshold {alert.threshold:.4g}", "dim"
        )
        if is_open and alert.remedy:
            body.append("\n→ ", "bold green")
            body.append(alert.remedy)
        where = Text("whole run" if alert.layer is None else f"layer {alert.layer}")
        where.append(f"\n{until}", "dim")
        mark = SEVERITY_MARKS[alert.severity]
        table.add_row(Text(f"{mark} {alert.severity.upper()}\n{alert.rule}", style=style), where, body)
    return table
