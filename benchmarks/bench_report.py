"""What every benchmark says besides its numbers: the machine, how busy it was, and which bars hold.

A time without the load of the machine means nothing, so both stand in one table and one JSON file.

Scripts here are named after what they measure, some of them after packages. Python looks beside the script first, so
this module, which every one of them imports before those packages, lets it look there before.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_LIBRARIES = ("torch", "duckdb", "pyarrow", "numpy")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A promise about one number, and what was measured."""

    what: str
    value: float
    at_most: float
    unit: str

    @property
    def holds(self) -> bool:
        return self.value <= self.at_most


def machine() -> dict[str, Any]:
    """Processor, cores, versions, and the load average now (1, 5 and 15 minutes)."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def publish(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    bars: Sequence[Bar],
    before: Mapping[str, Any],
    out: Path | None,
) -> None:
    """Print the rows (columns: the keys of the first) and the bars; write all of it as JSON to `out`.

    Args:
        before: what `machine()` said when the measuring began; the load average is taken again now.
    """
    facts = {**before, "load_average_after": [round(load, 2) for load in os.getloadavg()]}
    console = Console(width=None if Console().is_terminal else 160)
    table = Table(title=title, caption=_caption(facts))
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console.print(table)
    if bars:
        console.print(bar_table(bars))
    save(title, rows, bars, facts, out)


def save(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    bars: Sequence[Bar],
    facts: Mapping[str, Any],
    out: Path | None,
) -> None:
    """Write rows and bars as JSON to `out`, if any. Long benchmarks call it after each row: what is cut short is kept.

    Args:
        facts: what `machine()` said.
    """
    if out is not None:
        verdicts = [{**asdict(bar), "holds": bar.holds} for bar in bars]
        data = {"title": title, "machine": dict(facts), "rows": list(rows), "bars": verdicts}
        out.write_text(json.dumps(data, indent=2) + "\n")


def bar_table(bars: Sequence[Bar]) -> Table:
    """The bars as a table with a verdict each."""
    table = Table(title="bars")
    for name in ("what", "measured", "at most", "verdict"):
        table.add_column(name, justify="right" if name in ("measured", "at most") else "left")
    for bar in bars:
        verdict = "[green]holds[/]" if bar.holds else "[red]missed[/]"
        table.add_row(bar.what, f"{_text(bar.value)} {bar.unit}", f"{_text(bar.at_most)} {bar.unit}", verdict)
    return table


def _caption(facts: Mapping[str, Any]) -> str:
    libraries = ", ".join(f"{name} {facts[name]}" for name in _LIBRARIES)
    return (
        f"{facts['processor']}, {facts['cores']} cores, load average {facts['load_average'][0]} before and "
        f"{facts['load_average_after'][0]} after; python {facts['python']}, {libraries}; {facts['time']}"
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
