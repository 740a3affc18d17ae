"""The store's benchmark: what it asks has one answer, live, compacted and packed, and its run repeats nothing."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moeviz.store.reader import open_run

# Last, for scripts there share names with packages.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import store as benchmark


@pytest.fixture(scope="module")
def steps() -> benchmark.Steps:
    return benchmark.Steps(pool=2)


def test_a_step_is_the_same_every_time_and_no_two_are(steps: benchmark.Steps) -> None:
    assert np.array_equal(steps.routing(3).experts_LNSK, steps.routing(3).experts_LNSK)
    others = [steps.routing(step).experts_LNSK for step in (0, 2, 4)]  # of the same pool entry
    assert not any(np.array_equal(one, two) for one, two in pairwise(others))
    assert steps.routing(0).experts_LNSK.flags.c_contiguous


def test_every_question_has_one_answer_in_every_state(tmp_path: Path, steps: benchmark.Steps) -> None:
    decisions = 6 * benchmark.A_STEP
    rows = list(benchmark.query_rows(tmp_path, steps, decisions, repeats=1))
    assert [row["what"] for row in rows if row["unit"] == "ms"] == 3 * list(benchmark._questions(6))
    paths = [tmp_path / f"{state}{decisions}" for state in ("live", "compacted", "packed")]
    for question in benchmark._questions(6).values():
        answers = []
        for path in paths:
            with open_run(path) as store:
                answers.append(pd.DataFrame(question(store)))  # type: ignore[call-overload]
        assert len(answers[0]) > 0
        for other in answers[1:]:
            pd.testing.assert_frame_equal(answers[0], other, check_dtype=False)


def test_co_activation_is_that_of_the_records(tmp_path: Path, steps: benchmark.Steps) -> None:
    benchmark.ingest(tmp_path / "run", iter([steps.routing(step) for step in range(3)]), 2)
    counts = np.zeros((benchmark.E, benchmark.E), dtype=np.int64)
    for step in range(3):
        for chosen in steps.routing(step).experts_LNSK[benchmark.LAYER, 0]:
            counts[np.ix_(chosen, chosen)] += 1
    with open_run(tmp_path / "run") as store:
        np.testing.assert_array_equal(benchmark.coactivation(store, benchmark.LAYER), counts)


def test_a_run_that_was_kept_is_used_again(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(new: Path) -> None:
        new.mkdir()
        made.append(new)

    for _ in range(2):
        benchmark._made(tmp_path, "run", make)
    assert len(made) == 1
    assert (tmp_path / "run").is_dir()


def test_the_curve_of_a_long_run_comes_from_levels_of_detail(tmp_path: Path, steps: benchmark.Steps) -> None:
    rows = list(benchmark.curve_rows(tmp_path, steps, 260, repeats=1))
    assert [row["bar"] for row in rows] == [benchmark.CURVE_MS] * 2
    with open_run(tmp_path / "curve260") as store:
        shares = benchmark.load_over_time(store, benchmark.LAYER, points=2)
        assert len(store.frame(lambda: f"FROM {store.source('load_lod')}")) == 2 * benchmark.L
    counts_TE = np.stack(
        [np.roll(steps.load(t % 64).counts_LE[benchmark.LAYER], t) for t in range(260)]
    ).astype(np.int64)
    expected = [counts_TE[:200].sum(0), counts_TE[200:].sum(0)]
    np.testing.assert_allclose(
        shares["share"].to_numpy().reshape(2, -1), [one / one.sum() for one in expected], rtol=1e-6
    )
