"""Progress of long work on the terminal, on stderr; silent when nobody watches or when asked.

A finished bar stays: it says what was built, and where.

    with progress("tokenising", total=7_300_000, quiet=False) as advance:
        advance(4096)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress(
    what: str, *, total: int | None, unit: Literal["bytes", "items"] = "bytes", quiet: bool
) -> Iterator[Advance]:
    """A bar for one piece of work; yields `advance(amount)`."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda amount: None
        return
    amount: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)
        bar.update(task, completed=total)
