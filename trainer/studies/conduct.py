"""Carrying out a study or a sweep: check the flags, train what is not trained, read and keep what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moeviz.errors import MoevizError
from trainer.studies import comparison
from trainer.studies.display import Bars
from trainer.studies.median_rule import MedianRule
from trainer.studies.outcome import Outcome, outcome_of
from trainer.studies.pool import Pool
from trainer.studies.trials import Parser, Trial, checked, named


def conduct(
    trials: Sequence[Trial],
    folder: Path,
    parse: Parser,
    *,
    jobs: int = 2,
    threads: int | None = None,
    rule: MedianRule | None = None,
    console: Console | None = None,
) -> list[Outcome]:
    """Train all trials in FOLDER/<name> and write the comparison tables beside them.

    Args:
        parse: flags of `moeviz train` -> config.
        jobs: runs in training at the same time.
        threads: CPU threads of each; None: the cores divided by `jobs`.
        rule: ends runs early; None: none is.
        console: where progress goes; None: nowhere.

    Returns:
        Outcomes in the order of the trials, those that failed or were refused included.

    Raises:
        MoevizError: no trial has flags that fit together, or a folder holds a run with other flags.
    """
    if jobs < 1:
        raise MoevizError(f"jobs={jobs} is below 1; give the number of runs to train at the same time")
    trials = [checked(trial, parse) for trial in trials]
    named(trials)
    if not any(trial.config for trial in trials):
        raise MoevizError(f"no run has flags that fit together: {trials[0].problem}")
    with Bars(console or Console(quiet=True), len(trials)) as bars:
        pool = Pool(folder=folder, parse=parse, watcher=bars, jobs=jobs, threads=threads, rule=rule)
        states, reasons = pool.run(trials)
    outcomes = [
        replace(outcome, why=reasons.get(outcome.run) or outcome.why)
        for outcome in (outcome_of(trial, folder, states[trial.name]) for trial in trials)
    ]
    comparison.save(outcomes, folder)
    return outcomes
