"""`moeviz runs`: the runs of a folder, newest first."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from moeviz.errors import RunNotFoundError

STATE_STYLES = {
    "live": "bold green",
    "waiting": "yellow",
    "stale": "yellow",
    "ended": "cyan",
    "dead": "dim",
    "unreadable": "red",
}
STATE_MARKS = {"live": "●", "waiting": "○", "stale": "◐", "ended": "■", "dead": "×", "unreadable": "!"}


@dataclass(frozen=True, kw_only=True)
class RunsArguments:
    """List the runs of a folder, newest first."""

    folder: Positional[Path] = Path("runs")
    """Folder that holds run folders."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(RunsArguments, args=argv, prog="moeviz runs", config=(tyro.conf.FlagCreatePairsOff,))
    from moeviz.store.queries import list_runs

    runs = list_runs(arguments.folder)
    if arguments.json:
        print(runs.to_json(orient="records", indent=2))
        return 0
    if runs.empty:
        raise RunNotFoundError(
            f"no runs in {arguments.folder}; `moeviz demo` or `moeviz train --log-routing` makes one"
        )
    _print_table(runs.to_dict("records"), arguments.folder)
    return 0


def _print_table(runs: list[dict[str, Any]], folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=f"{len(runs)} runs in {folder}", title_justify="left")
    for name in ("run", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "loss", "worst entropy", "open alerts", "created"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        entropy, alerts = run["worst_entropy"], run["open_alerts"]
        table.add_row(
            Text(str(run["name"]), style="bold"),
            Text(f"{STATE_MARKS[run['state']]} {run['state']}", style=STATE_STYLES[run["state"]]),
            progress(run["last_step"], run["planned_steps"]),
            number(run["loss"], "{:.4f}"),
            Text(number(entropy, "{:.3f}"), style="bold red" if is_number(entropy) and entropy < 0.7 else ""),
            Text(number(alerts, "{:.0f}"), style="bold red" if is_number(alerts) and alerts > 0 else "dim"),
            age(run["created"]),
        )
    console = Console()
    console.print(table)
    console.print(f"[dim]moeviz show {runs[0]['path']}    details of one run[/dim]")


def is_number(value: object) -> bool:
    """Whether `value` is there: neither None nor NaN."""
    return isinstance(value, int | float) and value == value


def number(value: object, form: str) -> str:
    """`value` by a format, or a dash where there is none."""
    return form.format(value) if is_number(value) else "–"


def progress(step: object, planned: object) -> str:
    """`123 / 600`, `123`, or a dash before the first step."""
    done = number(step, "{:,.0f}")
    return f"{done} / {number(planned, '{:,.0f}')}" if is_number(planned) else done


def age(created: object) -> str:
    """How long ago a time in seconds since the epoch was, in the unit a person would use."""
    if not isinstance(created, int | float) or created != created:
        return "–"
    seconds = max(0.0, time.time() - created)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
