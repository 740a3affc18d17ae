"""`moeviz gc`: make room by deleting old runs, or their token-level samples."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import FlagCreatePairsOff, Positional

from moeviz.errors import MoevizError

if TYPE_CHECKING:
    from moeviz.store.retention import Holding

_SECONDS = {"m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True, kw_only=True)
class GcArguments:
    """Show which runs may go and what they take; delete them with --yes, or after asking at a terminal.

    A run goes if it meets every rule that is given. Its checkpoints go with it. Runs that are alive or cannot be
    read are never touched.

    moeviz gc runs --keep-last 10 --older-than 30d
    """

    runs: Positional[Path] = Path("runs")
    """Folder that holds run folders."""
    keep_last: int | None = None
    """Leave this many of the newest runs alone."""
    older_than: str | None = None
    """Only runs that were last written this long ago: 90m, 12h, 30d, 4w."""
    drop_samples: bool = False
    """Keep the runs, with loads, metrics and alerts; delete token-level rows and attention maps."""
    yes: bool = False
    """Do it without asking."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0, also when nothing was deleted."""
    import tyro

    arguments = tyro.cli(GcArguments, args=argv, prog="moeviz gc", config=(FlagCreatePairsOff,))
    from moeviz.store.retention import carry_out, plan

    if not arguments.runs.is_dir():
        raise MoevizError(f"no folder {arguments.runs}; give the folder that holds the runs")
    planned = plan(
        arguments.runs,
        keep_last=arguments.keep_last,
        older_than_seconds=None if arguments.older_than is None else seconds(arguments.older_than),
        drop_samples=arguments.drop_samples,
    )
    doomed = [holding for holding in planned if holding.verdict != "keep"]
    _print_plan(planned)
    if not doomed:
        print("nothing to delete")
        return 0
    if not arguments.yes and not _agreed(len(doomed)):
        print("nothing was deleted; --yes deletes")
        return 0
    print(f"{carry_out(doomed) / 1e6:,.1f} MB freed")
    return 0


def seconds(text: str) -> float:
    """`30d` -> seconds.

    Raises:
        MoevizError: no number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip())
    if match is None:
        raise MoevizError(f"--older-than {text!r} is no span of time; write 90m, 12h, 30d or 4w")
    return float(match[1]) * _SECONDS[match[2]]


def _agreed(count: int) -> bool:
    """Ask at a terminal; without one nobody agreed."""
    if not sys.stdin.isatty():
        return False
    answer = input(f"Do this to {count} run{'s' if count > 1 else ''}? It cannot be undone. [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def _print_plan(planned: list[Holding]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from moeviz.commands.runs import age

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", no_wrap=True)
    for name in ("written", "size", "checkpoints", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what happens")
    for holding in planned:
        keep = holding.verdict == "keep"
        table.add_row(
            Text(holding.path.name, style="dim" if keep else "bold"),
            age(holding.written),
            *(
                f"{size / 1e6:,.1f} MB" if size else "–"
                for size in (holding.bytes, holding.checkpoint_bytes, holding.sample_bytes)
            ),
            Text(f"kept: {holding.reason}" if keep else holding.verdict, style="dim" if keep else "bold red"),
        )
    Console().print(table)
