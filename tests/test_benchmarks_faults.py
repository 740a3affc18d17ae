"""The fault trials themselves: their checker finds what is wrong, and in the short form nothing is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moeviz.records import LoadRecord
from moeviz.store.reader import open_run
from moeviz.store.writer import SegmentWriter

# Last, for scripts there share names with packages.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import faults_run
import faults_trials


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return faults_run.new_run(tmp_path / "run")


def written(path: Path, *records: LoadRecord) -> int:
    """Wrong steps of 0..3 after `records` were written."""
    writer = SegmentWriter(path, sidecar=False)
    for record in records:
        writer.write(record)
    writer.close()
    with open_run(path) as store:
        return faults_run.wrong_steps(store, 0, 3)


def test_the_checker_is_content_with_what_was_written(path: Path) -> None:
    assert written(path, *(faults_run.load(step, 0) for step in range(5))) == 0


def test_the_checker_finds_a_missing_a_repeated_and_a_torn_step(path: Path) -> None:
    torn = faults_run.load(2, 0)
    torn.counts_LE[1, 3] += 1
    steps = [faults_run.load(step, 0) for step in (0, 1, 1)]
    assert written(path, *steps, torn) == 3, "1 is there twice, 2 is wrong, 3 is missing"


def test_the_checker_finds_what_another_rank_should_have_written(path: Path) -> None:
    swapped = replace(faults_run.load(1, 1), rank=0)
    assert written(path, faults_run.load(0, 0), swapped, faults_run.load(2, 0), faults_run.load(3, 0)) == 1


@pytest.mark.parametrize(
    "trial",
    [
        lambda folder: faults_trials.killed_writers(folder, 2, seed=1, lanes=2),
        lambda folder: faults_trials.full_disk(folder, 0.5),
        lambda folder: faults_trials.slow_disk(folder, 0.5, file_seconds=0.1),
        lambda folder: faults_trials.dead_sidecar(folder, 1, seed=1),
        lambda folder: faults_trials.skewed_clocks(folder, 2.0),
        lambda folder: faults_trials.soak(folder, 3.0, writers=1, readers=1)[0],
    ],
    ids=["kills", "full", "slow", "sidecar", "clocks", "soak"],
)
def test_a_short_trial_finds_no_fault(tmp_path: Path, trial: object) -> None:
    row = trial(tmp_path)  # type: ignore[operator]
    assert row["times"] > 0, row
    assert row["steps checked"] > 0, row
    assert (row["wrong steps"], row["other faults"]) == (0, 0), row
