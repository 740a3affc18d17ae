"""Three ways to balance a small MoE, trained from scratch: what collapses, what the alerts say, what the loss hides.

    python benchmarks/balance.py --seeds 3 4 5 --runs runs/study-balance --out balance.json

is `moeviz study balance` (trainer/studies/balance.py says what is trained and expected) with the machine, the processor
time and the wall time beside the outcomes. Runs that are in the folder already are read and not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bench_report import machine
from rich.console import Console

from moeviz.commands.study import report
from moeviz.commands.train import parse
from trainer.studies.balance import SEEDS, STEPS, balance_study
from trainer.studies.conduct import conduct


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"optimizer steps of each run (default {STEPS})"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs in training at the same time (default 2)")
    parser.add_argument("--all", action="store_true", help="also ten times the loss, and a bias step of 0.1")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and do not train those that are")
    parser.add_argument("--out", type=Path, help="write the outcomes as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, options.runs or Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Train and judge every arm and seed, print the tables, write the JSON."""
    study = balance_study(folder, options.seeds, options.steps, options.all)
    study.prepare(folder)
    began = time.monotonic()
    outcomes = conduct(
        study.trials, folder, parse, jobs=options.jobs, threads=1, console=Console(stderr=True)
    )
    seconds = time.monotonic() - began
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    findings = study.findings(outcomes)
    report(outcomes, findings, folder, as_json=False)
    print(f"{seconds:.0f} s, of which processors worked {children.ru_utime + children.ru_stime:.0f} s")
    if options.out is not None:
        told = {
            "machine": machine(),
            "wall_seconds": seconds,
            "cpu_seconds": children.ru_utime + children.ru_stime,
            "runs": [outcome.row() for outcome in outcomes],
            "findings": [finding._asdict() for finding in findings],
        }
        options.out.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
