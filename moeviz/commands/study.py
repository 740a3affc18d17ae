"""`moeviz study`: comparisons that are ready to run, and whether what was expected of them holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from moeviz.errors import MoevizError, require

if TYPE_CHECKING:
    from trainer.studies.outcome import Outcome
    from trainer.studies.study import Finding, Study

Name = Literal["balance", "architecture", "learning-rate", "experts"]

_DESCRIPTION = """Train the models of a comparison that is ready to run, and say what came out.

    moeviz study balance                    no balancing, auxiliary loss, selection bias; seeds 3, 4, 5; about 5 minutes
    moeviz study balance --all              also ten times the loss, and a bias step that is far too large
    moeviz study architecture --seeds 0 1   GPT-2, dense, MLA + dense, MoE, MLA + MoE at equal cost of a token
    moeviz study learning-rate              one MoE at five learning rates
    moeviz study experts                    4 to 32 experts of 32 to 256 at equal active parameters

Two runs train at a time, with one thread each, which suits two cores; --jobs 4 is twice as fast on four. The same
command again goes on from what the folder holds: finished runs are read and not trained again. Every run is a folder
that tui, dash, show and query open, and RUNS/comparison.parquet and curves.parquet hold the comparison.

A study ends with what it was asked: the numbers that came out, and `holds` or `does not hold` where something was
expected in advance. That something does not hold is a result, not an error (exit status 0); a run that failed is 1.
"""


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Train the models of a comparison that is ready to run, and say what came out."""

    name: Positional[Name]
    """Which study."""
    seeds: tuple[int, ...] = ()
    """One run of every arm for each of them (default: 3 4 5 for balance, 0 for the others)."""
    steps: int | None = None
    """Optimizer steps of each run (default: 800 for balance, 300 for the others)."""
    runs: Path | None = None
    """Folder of the runs (default: runs/study-NAME)."""
    all: bool = False
    """balance: also the arms `aux 1e-2` and `bias 0.1`."""
    jobs: int = 2
    """Runs in training at the same time, one thread each."""
    json: bool = False
    """Print JSON instead of tables."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0; 1 when a run failed."""
    import tyro

    arguments = tyro.cli(
        StudyArguments,
        args=argv,
        prog="moeviz study",
        description=_DESCRIPTION,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    require("torch", "train", "training")
    from rich.console import Console

    from moeviz.commands.train import parse
    from trainer.studies.conduct import conduct

    folder = arguments.runs or Path("runs") / f"study-{arguments.name}"
    study = study_of(arguments, folder)
    console = Console(stderr=True)
    console.print(study.about, soft_wrap=True, highlight=False)
    study.prepare(folder)
    outcomes = conduct(study.trials, folder, parse, jobs=arguments.jobs, threads=1, console=console)
    report(outcomes, study.findings(outcomes), folder, arguments.json)
    return 1 if any(outcome.state != "finished" for outcome in outcomes) else 0


def study_of(arguments: StudyArguments, folder: Path) -> Study:
    """The study that the arguments ask for.

    Raises:
        MoevizError: no step to train, a seed twice, or --all where there is nothing more.
    """
    from trainer.studies.balance import SEEDS, STEPS, balance_study
    from trainer.studies.recipes import RECIPES
    from trainer.studies.recipes import STEPS as RECIPE_STEPS

    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise MoevizError(f"--seeds {' '.join(map(str, arguments.seeds))} repeats one; give each once")
    if arguments.steps is not None and arguments.steps < 1:
        raise MoevizError(f"--steps {arguments.steps} is below 1; give the number of steps")
    if arguments.name == "balance":
        return balance_study(folder, arguments.seeds or SEEDS, arguments.steps or STEPS, arguments.all)
    if arguments.all:
        raise MoevizError(
            f"--all with {arguments.name}: only the study of balancing has more arms; leave it out"
        )
    return RECIPES[arguments.name](arguments.seeds or (0,), arguments.steps or RECIPE_STEPS)


def report(outcomes: Sequence[Outcome], findings: Sequence[Finding], folder: Path, as_json: bool) -> None:
    """Print the runs in the order of the study, then what it was asked."""
    if as_json:
        import json

        runs = [{name: _known(value) for name, value in outcome.row().items()} for outcome in outcomes]
        print(json.dumps({"runs": runs, "findings": [finding._asdict() for finding in findings]}, indent=2))
        return
    from rich.console import Console

    from trainer.studies.display import findings_table, outcome_table

    console = Console()
    console.print(outcome_table(outcomes, f"{len(outcomes)} runs in {folder}"))
    for outcome in outcomes:
        if outcome.state != "finished":
            console.print(f"{outcome.run}: {outcome.state}, {outcome.why}", markup=False, soft_wrap=True)
    console.print(findings_table(findings))
    console.print(
        f"  moeviz dash {folder}    side by side on its page Compare", markup=False, highlight=False
    )
    console.print(f"  {folder}/comparison.parquet, curves.parquet", markup=False, highlight=False)


def _known(value: object) -> object:
    """JSON has no NaN."""
    return None if isinstance(value, float) and value != value else value
