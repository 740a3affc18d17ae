"""Whether every engine, on one rank and on two, trains the run of plain torch: losses, loads, and every decision.

    python benchmarks/engines.py                            # fp32, 50 steps: plain torch, pipelines, ZeRO 0 to 3
    python benchmarks/engines.py --steps 10 --cases "torch, 2 ranks" --out engines.json

Each case is `moeviz train` in processes of its own, on the same steps of the same sequences: two ranks get half of
each, two stages of a pipeline half of the layers, four ranks are two such pipelines, and two ranks that share experts
have half of those of each layer. Compared with plain torch on one rank: the largest difference of a step's loss, the
rows of the load table that differ, and the share of decisions (token, layer, expert) that differ, over all steps.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from bench_report import Bar, machine, publish

from moeviz.store.queries_series import scalars
from moeviz.store.reader import open_run

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "torch, 1 rank"
CASES = {
    REFERENCE: ("--engine", "torch", "--batch-size", "4"),
    "torch, 2 ranks": ("--engine", "torch", "--batch-size", "2", "--num-ranks", "2"),
    "pipeline, 2 stages": (
        *("--batch-size", "2", "--gradient-accumulation-steps", "2"),
        *("--num-ranks", "2", "--pipeline-stages", "2"),
    ),
    "pipeline, 2 stages x 2": ("--batch-size", "2", "--num-ranks", "4", "--pipeline-stages", "2"),
    **{
        f"ZeRO {stage}, {ranks} rank{'s' if ranks > 1 else ''}": (
            *("--engine", "deepspeed", "--zero-stage", str(stage)),
            *("--batch-size", str(4 // ranks), "--num-ranks", str(ranks)),
        )
        for stage in range(4)
        for ranks in (1, 2)
    },
    **{
        f"ZeRO {stage}, 2 ranks, shared experts": (
            *("--engine", "deepspeed", "--zero-stage", str(stage), "--expert-parallel", "2"),
            *("--batch-size", "2", "--num-ranks", "2"),
        )
        for stage in range(3)
    },
}
_RUN = (
    "--preset smoke --dtype fp32 --device cpu --threads 1 --log-routing --route-every 1 --route-sequences all "
    "--eval-every 0 --probe-every 0 --save-every 0"
)


class Told(NamedTuple):
    """What a run recorded."""

    losses: list[float]
    loads: list[tuple[int, ...]]
    """(step, layer, tokens of each expert)."""
    decisions: Counter[tuple[Any, ...]]
    """(step, layer, the sequence's tokens, place, expert)."""


def run_case(name: str, steps: int, folder: Path) -> tuple[Told, float]:
    """Train, and read what was recorded. Returns it and the processor seconds of all ranks."""
    run = folder / name.replace(" ", "-")
    words = [*_RUN.split(), *CASES[name], "--max-steps", str(steps), "--run", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = _processor_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "moeviz.cli", "train", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr}{done.stdout}")
    return read(run), _processor_seconds() - before


def read(run: Path) -> Told:
    """The records of a run, in an order that does not depend on its ranks."""
    with open_run(run) as store:
        losses = scalars(store, ["loss"]).sort_values("step")["value"].tolist()
        loads = store.sql("SELECT step, layer, counts FROM expert_load ORDER BY step, layer")
        routed = store.sql(
            "SELECT step, layer, token_ids, k, experts FROM routing JOIN sequences USING (step, rank, seq)"
        )
    decisions: Counter[tuple[Any, ...]] = Counter()
    for step, layer, tokens, k, experts in routed.itertuples(index=False):
        text = tuple(tokens)
        decisions.update((step, layer, text, place // k, expert) for place, expert in enumerate(experts))
    return Told(
        losses, [(step, layer, *counts) for step, layer, counts in loads.itertuples(index=False)], decisions
    )


def compared(name: str, told: Told, reference: Told, seconds: float) -> dict[str, Any]:
    """A row of the table."""
    assert len(told.losses) == len(reference.losses), name
    assert told.decisions.total() == reference.decisions.total(), name
    pairs = zip(told.losses, reference.losses, strict=True)
    differ = (told.decisions - reference.decisions).total()
    rows = sum(one != other for one, other in zip(told.loads, reference.loads, strict=True))
    return {
        "engine": name,
        "last loss": told.losses[-1],
        "largest difference": max(abs(one - other) for one, other in pairs),
        "load rows that differ": f"{rows} of {len(reference.loads)}",
        "decisions that differ": f"{differ} of {reference.decisions.total()}",
        "processor seconds": round(seconds, 1),
    }


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    options = parser.parse_args()
    before, rows, bars = machine(), [], []
    with tempfile.TemporaryDirectory(prefix="moeviz-engines-") as folder:
        reference, seconds = run_case(REFERENCE, options.steps, Path(folder))
        rows.append(compared(REFERENCE, reference, reference, seconds))
        for name in [name for name in options.cases if name != REFERENCE]:
            told, seconds = run_case(name, options.steps, Path(folder))
            rows.append(compared(name, told, reference, seconds))
            bars.append(
                Bar(what=name, value=rows[-1]["largest difference"], at_most=1e-4, unit="nats of loss")
            )
            publish(f"engines, {options.steps} steps", rows, bars, before, options.out)


if __name__ == "__main__":
    main()
