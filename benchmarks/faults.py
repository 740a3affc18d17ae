"""What the store survives: kill -9 at random moments, full and slow disks, dead sidecars, skewed clocks, many readers.

Every row of the made-up loads follows from its step and rank, so a checker recomputes what it reads: nothing
torn, nothing twice, nothing missing that was acknowledged. "Steps checked" counts a step as often as it was read.

    python benchmarks/faults.py                                                # a short form, about two minutes
    python benchmarks/faults.py --kills 200 --soak-seconds 600 --out faults.json
    python benchmarks/faults.py --trials clocks sidecar                        # only these
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench_report import Bar, machine, publish, save
from faults_trials import Row, dead_sidecar, full_disk, killed_writers, skewed_clocks, slow_disk, soak

STALE_SECONDS = 1.0
TITLE = "faults: what the store survives"


def trials(folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], Row | tuple[Row, float]]]:
    """Name of each trial -> what runs it; a second value is the lag of its readers."""
    return {
        "kills": partial(killed_writers, folder, options.kills, options.seed),
        "full": partial(full_disk, folder, 3.0),
        "slow": partial(slow_disk, folder, 6.0),
        "sidecar": partial(dead_sidecar, folder, max(3, options.kills // 10), options.seed),
        "clocks": partial(skewed_clocks, folder, options.clock_seconds),
        "soak": partial(soak, folder, options.soak_seconds, options.writers, options.readers),
    }


def bars_of(row: Row, lag: float | None) -> list[Bar]:
    faults = row["wrong steps"] + row["other faults"]
    bars = [Bar(what=f"{row['trial']}: faults", value=faults, at_most=0, unit="")]
    if lag is not None:
        bars.append(Bar(what="lag of a reader, p95", value=lag, at_most=STALE_SECONDS, unit="s"))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(trials(Path(), argparse.Namespace(**dict.fromkeys(_NUMBERS, 0))))
    parser.add_argument("--trials", nargs="+", choices=names, default=names, help="which (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="of the writer (default 20)")
    parser.add_argument("--soak-seconds", type=float, default=30, help="with readers attached (default 30)")
    parser.add_argument("--clock-seconds", type=float, default=20, help="with skewed clocks (default 20)")
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--readers", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON, after each trial")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    before, rows, bars = machine(), list[dict[str, Any]](), list[Bar]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, run in trials(Path(folder), options).items():
            if name in options.trials:
                said = run()
                row, lag = said if isinstance(said, tuple) else (said, None)
                rows.append(row)
                bars += bars_of(row, lag)
                print("; ".join(f"{key}: {value}" for key, value in row.items()), file=sys.stderr, flush=True)
                save(TITLE, rows, bars, before, options.out)
    publish(TITLE, rows, bars, before, options.out)
    if any(row["wrong steps"] or row["other faults"] for row in rows):
        raise SystemExit(1)


_NUMBERS = ("kills", "seed", "clock_seconds", "soak_seconds", "writers", "readers")

if __name__ == "__main__":
    main()
