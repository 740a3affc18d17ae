"""`moeviz alerts`: what went wrong in a run, where, and what to do about it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

from moeviz.errors import MoevizError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeviz.records import AlertRecord, Severity
    from moeviz.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class AlertsArguments:
    """List the alerts of a run with their remedies: open ones first, worst first."""

    run: Positional[str | None] = None
    """Run folder, or its name under ./runs; the newest run when left out."""
    open: bool = False
    """Only alerts that are not cleared."""
    since: int | None = None
    """Only what happened at this step or later."""
    follow: bool = False
    """Print every transition (raised, worse, graver, cleared) once, as it happens, until the run has ended, or has
    been silent for so long that it is presumed dead (then the exit status is 1)."""
    poll_seconds: float = 1.0
    """Pause between two looks at the run (with --follow)."""
    json: bool = False
    """Print JSON instead of text; with --follow JSON Lines, one transition a line."""
    rules: bool = False
    """Print the rules instead: with the thresholds of the run when one is named, else the defaults."""
    markdown: bool = False
    """With --rules: print the documentation page (docs/alerts.md)."""


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(
        AlertsArguments, args=argv, prog="moeviz alerts", config=(tyro.conf.FlagCreatePairsOff,)
    )
    if arguments.poll_seconds <= 0:
        raise MoevizError(f"poll_seconds={arguments.poll_seconds} is not positive; 1 is usual")
    if arguments.rules or arguments.markdown:
        _print_rules(arguments)
        return 0
    from moeviz.store.catalog import resolve_run
    from moeviz.store.reader import open_run

    with open_run(resolve_run(arguments.run)) as store:
        if arguments.follow:
            for alert in follow(store, arguments.since or 0, arguments.poll_seconds, arguments.open):
                line = json.dumps(asdict(alert), default=str) if arguments.json else _followed(alert)
                print(line, flush=True)
            return _farewell(store)
        _list(store, arguments)
    return 0


def _print_rules(arguments: AlertsArguments) -> None:
    from moeviz.alerts import RULES, AlertConfig
    from moeviz.alerts.conditions import condition_of
    from moeviz.alerts.page import markdown_page, severity_of
    from moeviz.store.catalog import resolve_run
    from moeviz.store.run import read_info

    if not arguments.rules:
        raise MoevizError("--markdown prints the page of the rules; give --rules with it")
    stored = {} if arguments.run is None else read_info(resolve_run(arguments.run)).config.get("alert_rules")
    config = AlertConfig.from_dict(stored if isinstance(stored, Mapping) else {})
    if arguments.markdown:
        sys.stdout.write(markdown_page(config))
        return
    rows = [
        (rule, condition_of(rule.id, config)) for rule in RULES if config.circulating or not rule.circulating
    ]
    if arguments.json:
        facts = [
            {"rule": rule.id, "version": rule.version, "severity": rule.severity, **condition._asdict()}
            for rule, condition in rows
        ]
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for rule, condition in rows:
        console.print(Text.assemble((rule.id, "bold"), f"  {severity_of(rule)}"))
        for label, text in (
            ("raised", condition.raises),
            ("cleared", condition.clears),
            ("remedy", rule.remedy),
        ):
            console.print(Text.assemble((f"  {label:<8}", "dim"), text))


def _farewell(store: Store) -> int:
    """Say on standard error why following is over. Returns the exit status: 0 when the run said that it ended."""
    from moeviz.store.queries import alerts, end_status, last_step

    status, step = end_status(store), last_step(store)
    at = "before its first step" if step is None else f"at step {step}"
    still = f"{len(alerts(store, open_only=True))} alerts open"
    if status is not None:
        print(f"{store.info.name}: ended {at}{f' ({status})' if status else ''}; {still}", file=sys.stderr)
        return 0
    print(
        f"{store.info.name}: silent since it stood {at}, and presumed dead; {still}. It never said that it ended: "
        "follow it again when it was resumed",
        file=sys.stderr,
    )
    return 1


def _list(store: Store, arguments: AlertsArguments) -> None:
    from moeviz.store.queries import alert_records

    alerts = [
        alert
        for alert in alert_records(store)
        if alert.updated_step >= (arguments.since or 0)
        and not (arguments.open and alert.cleared_step is not None)
    ]
    if arguments.json:
        print(json.dumps([asdict(alert) for alert in alerts], indent=2, default=str))
        return
    from rich.console import Console

    console = Console()
    if alerts:
        console.print(alert_list(alerts))
    else:
        since = "" if arguments.since is None else f" since step {arguments.since}"
        console.print(
            f"[bold green]✓[/] {store.info.name}: no {'open ' if arguments.open else ''}alerts{since}"
        )


def follow(
    store: Store,
    since: int,
    poll_seconds: float,
    open_only: bool = False,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.time,
) -> Iterator[AlertRecord]:
    """Every transition from step `since` on, once each, those that are stored already first.

    Ends when the run says that it ended, or is presumed dead.

    Args:
        open_only: leave out the transitions of alerts that are cleared by the time they are seen.
        sleep: waits between two looks.
        now: seconds since the epoch.
    """
    from moeviz.store.queries import alert_transitions, state_of

    seen: set[tuple[str, int, Severity, int | None, str]] = set()
    revision: int | None = None
    while True:
        # In this order: what was stored before the run was over is read after that was seen.
        over, current = state_of(store, now()) in ("ended", "dead"), store.revisions()["alerts"]
        if current != revision:
            revision = current
            transitions = alert_transitions(store, since)
            cleared = {alert.episode for alert in transitions if alert.cleared_step is not None}
            for alert in transitions:
                key = (alert.episode, alert.updated_step, alert.severity, alert.cleared_step, alert.message)
                if key not in seen and not (open_only and alert.episode in cleared):
                    yield alert
                seen.add(key)
        if over:
            return
        sleep(poll_seconds)


def _followed(alert: AlertRecord) -> str:
    from moeviz.alerts import alert_line

    remedy = f"\n    → {alert.remedy}" if alert.remedy and alert.updated_step == alert.raised_step else ""
    return alert_line(alert) + (remedy if alert.cleared_step is None else "")


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
