"""The comparison of trackers: its jobs are the same for all, moeviz's curve comes back, what is missing is named."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

# Last, for scripts there share names with packages.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import tracker_cases
import trackers
from tracker_cases import Shape

SHAPE = Shape(layers=6, experts=20, tokens=8, top_k=3)


def options(**changes: object) -> argparse.Namespace:
    facts = {
        "python": Path(sys.executable),
        "steps": 4,
        "token_steps": 2,
        "shape": list(SHAPE),
        "timeout": 120.0,
    }
    return argparse.Namespace(**{**facts, **changes})


def test_the_jobs_are_what_top_k_routers_make() -> None:
    loads = list(tracker_cases.payloads("loads", SHAPE, 3))
    assert [one.shape for one in loads] == [(6, 20)] * 3
    assert all((one.sum(1) == 8 * 3).all() for one in loads)
    assert not np.array_equal(loads[0], loads[1])
    for ids_TLK in tracker_cases.payloads("tokens", SHAPE, 2):
        assert ids_TLK.shape == (8, 6, 3)
        assert (np.diff(np.sort(ids_TLK, axis=-1), axis=-1) > 0).all()
        assert ids_TLK.max() < 20


@pytest.mark.parametrize("payload", ["loads", "tokens"])
def test_moeviz_does_its_job(payload: str) -> None:
    row = trackers.run_case(payload, "moeviz", options())
    assert row["note"] == ""
    assert row["kB a step"] > 0
    assert row["CPU ms a step"] >= 0
    assert (row["curve back ms"] == "-") == (payload == "tokens")


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path, shape: Shape) -> tracker_cases.Job:
        raise AssertionError("never called here")

    monkeypatch.setitem(tracker_cases.CASES["loads"], "absent", ("no_such_tracker", broken))
    row = trackers.run_case("loads", "absent", options())
    assert row["note"].startswith("left out: no_such_tracker is not installed in python")
    monkeypatch.setitem(tracker_cases.CASES["loads"], "unknown", ("numpy", broken))
    assert "left out: KeyError: 'unknown'" in trackers.run_case("loads", "unknown", options())["note"]
    slow = trackers.run_case("loads", "moeviz", options(timeout=0.01))
    assert slow["note"] == "left out: not done after 0.01 s"


def test_ratios_are_to_moeviz_of_the_same_job() -> None:
    base = {"blocked ms": 0.5, "CPU ms a step": 2.0, "kB a step": 4.0, "curve back ms": "-"}
    rows = [
        {"job": "loads", "tracker": "moeviz", **base},
        {"job": "loads", "tracker": "x", **base, "kB a step": 10.0, "curve back ms": 3.0},
    ]
    assert trackers.relative(rows)[1] == {
        "job": "loads",
        "tracker": "x",
        "blocked ms, x": 1.0,
        "CPU ms a step, x": 1.0,
        "kB a step, x": 2.5,
        "curve back ms, x": "-",
    }
