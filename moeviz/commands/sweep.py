"""`moeviz sweep`: one `moeviz train` for each combination of values, compared at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moeviz.errors import MoevizError, require

if TYPE_CHECKING:
    from trainer.studies.outcome import Outcome
    from trainer.studies.trials import Trial

_DESCRIPTION = """Train one model for each combination of values, and compare them.

    moeviz sweep --preset smoke --vary learning-rate=1e-3,3e-4 --vary num-experts=4,8 -- --max-steps 100
    moeviz sweep --vary preset=mixtral-tiny,olmoe-tiny --vary balance=aux,bias -- --max-steps 500 --train-data mine/
    moeviz sweep --preset demo --random 20 --vary learning-rate=1e-4..1e-1 --vary top-k=1..4 --vary seed=0,1

NAME is any flag of `moeviz train`; flags behind -- are those of every run. Values are tried in all combinations; with
--random N, N of them are drawn: from lists all alike, from ranges LOW..HIGH evenly in the logarithm.

Each run is a process `moeviz train` with a folder RUNS/NAME=VALUE,... that tui, dash, show and query open; routing is
recorded. The same command again goes on: finished runs are read, begun ones continue from their newest checkpoint. A
run that fails, or whose flags contradict each other, is told and the others go on (exit status 1).

Early ends: at each evaluation (--eval-every) past a quarter of its steps, a run ends when its best validation loss so
far is above the median of the others at that step, once four others came that far (after the median stopping rule of
Vizier, Golovin et al. 2017). Learning rates whose curves cross late are judged too soon by it: --keep-all trains all.

At the end: a table, RUNS/comparison.parquet (a row for each run) and RUNS/curves.parquet (validation loss and MaxVio
over steps).
"""


@dataclass(frozen=True, kw_only=True)
class SweepArguments:
    """Train one model for each combination of values, and compare them."""

    preset: str | None = None
    """Preset of every run; the same as --preset behind --."""
    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE,VALUE ...: a flag of `moeviz train` and the values it takes; give it once for each flag."""
    random: int | None = None
    """Draw this many combinations in place of all of them."""
    sample_seed: int = 0
    """Decides what --random draws. A larger N begins with the same ones."""
    runs: Path = Path("runs/sweep")
    """Folder of the runs; name one for each sweep."""
    jobs: int = 2
    """Runs in training at the same time."""
    threads: int | None = None
    """CPU threads of each run (default: the cores divided by --jobs)."""
    keep_all: bool = False
    """Train every run to its end."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0; 1 when a run failed or was refused."""
    own, fixed = split(argv)
    arguments = tyro.cli(
        SweepArguments,
        args=own,
        prog="moeviz sweep",
        description=_DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    require("torch", "train", "training")
    from rich.console import Console

    from moeviz.commands.train import parse
    from trainer.studies.conduct import conduct
    from trainer.studies.median_rule import MedianRule

    outcomes = conduct(
        trials(arguments, fixed),
        arguments.runs,
        parse,
        jobs=arguments.jobs,
        threads=arguments.threads,
        rule=None if arguments.keep_all else MedianRule(),
        console=Console(stderr=True),
    )
    report(outcomes, arguments.runs, arguments.json)
    return 1 if any(outcome.state in ("failed", "refused") for outcome in outcomes) else 0


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words before and behind `--`."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def trials(arguments: SweepArguments, fixed: Sequence[str]) -> list[Trial]:
    """The runs that the arguments ask for.

    Raises:
        MoevizError: nothing to vary, or a flag that is both varied and fixed, or the sweep's own.
    """
    from trainer.studies.grid import draw, grid, parse_axes, trials_of

    axes = parse_axes(arguments.vary)
    if not axes:
        raise MoevizError(
            "nothing to vary; write --vary learning-rate=1e-3,3e-4, or train one model with `moeviz train`"
        )
    fixed = [*(("--preset", arguments.preset) if arguments.preset else ()), *fixed]
    given = {
        word.partition("=")[0].removeprefix("--").replace("_", "-") for word in fixed if word.startswith("--")
    }
    if both := sorted(given & set(axes)):
        raise MoevizError(f"--{both[0]} is both varied and the same for every run; leave one of them out")
    if own := sorted((given | set(axes)) & {"run", "out", "resume"}):
        raise MoevizError(f"--{own[0]} is the sweep's own: it names every run and resumes what was begun")
    if arguments.random is not None:
        if arguments.random < 1:
            raise MoevizError(f"--random {arguments.random} is below 1; give the number of runs")
        return trials_of(draw(axes, arguments.random, arguments.sample_seed), fixed)
    return trials_of(grid(axes), fixed)


def report(outcomes: Sequence[Outcome], folder: Path, as_json: bool) -> None:
    """Print the comparison, the least validation loss first."""
    from trainer.studies.comparison import comparison

    if as_json:
        print(comparison(outcomes).to_json(orient="records", indent=2))
        return
    from rich.console import Console

    from trainer.studies.display import outcome_table

    console = Console()
    ranked = sorted(outcomes, key=lambda outcome: (outcome.val_loss != outcome.val_loss, outcome.val_loss))
    console.print(outcome_table(ranked, f"{len(ranked)} runs in {folder}"))
    for outcome in ranked:
        if outcome.state in ("failed", "refused"):
            console.print(f"{outcome.run}: {outcome.state}, {outcome.why}", markup=False, soft_wrap=True)
    best = next((outcome for outcome in ranked if outcome.val_loss == outcome.val_loss), None)
    if best is not None:
        console.print(
            f"\n  moeviz show {best.path}    the best of them", markup=False, highlight=False, soft_wrap=True
        )
    console.print(
        f"  moeviz dash {folder}    side by side on its page Compare", markup=False, highlight=False
    )
    console.print(f"  {folder}/comparison.parquet, curves.parquet", markup=False, highlight=False)
