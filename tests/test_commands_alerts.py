"""Alerts at the command line: following a run, an exit status, what was true around a step."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from store_runs import L, Step, alert, event, model_info, new_run, write_steps

from moeviz.cli import main
from moeviz.commands.alerts import follow
from moeviz.records import ModelInfo, ScalarRecord
from moeviz.store import run as run_module
from moeviz.store.queries import state_of
from moeviz.store.reader import open_run
from moeviz.store.run import resume_run
from moeviz.store.writer import SegmentWriter


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "160")
    return new_run(tmp_path / "one")


def write(path: Path, *records: object) -> None:
    writer = SegmentWriter(path, flush_seconds=1e9)
    for record in records:
        writer.write(record)  # type: ignore[arg-type]
    writer.close()


def run(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    assert main(list(argv)) == status
    captured = capsys.readouterr()
    return captured.out or captured.err


def test_following_prints_each_transition_once_and_ends_with_the_run(path: Path) -> None:
    """The writer moves on between two looks; a look that finds nothing new prints nothing."""
    life = [
        [alert("SKEW/1/5", 5, severity="warning")],
        [],
        [
            alert("SKEW/1/5", 8, severity="error", message="worse"),
            alert("DEAD/2/9", 9, severity="error"),
        ],
        [alert("SKEW/1/5", 12, cleared=12, severity="error"), event(13, "ended")],
    ]
    write(path, alert("SKEW/0/1", 1), *life[0])
    looks = iter(life[1:])
    with open_run(path) as store:
        got = [
            (one.episode, one.updated_step, one.cleared_step)
            for one in follow(store, 2, 1.0, sleep=lambda _: write(path, *next(looks)))
        ]
    assert got == [("SKEW/1/5", 5, None), ("SKEW/1/5", 8, None), ("DEAD/2/9", 9, None), ("SKEW/1/5", 12, 12)]
    assert next(looks, None) is None


def test_following_goes_on_after_a_resume(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "write_views", lambda path: True)
    write(path, alert("SKEW/1/5", 5), event(6, "ended", ts=1.0))

    def go_on(_: float) -> None:
        write(path, alert("SKEW/1/7", 7), event(8, "ended", ts=3.0))

    resume_run(path, 6)
    write(path, event(6, "resumed", ts=2.0))
    with open_run(path) as store:
        assert [one.episode for one in follow(store, 0, 1.0, sleep=go_on)] == ["SKEW/1/5", "SKEW/1/7"]


def test_following_an_ended_run_is_json_lines(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        path, alert("SKEW/1/5", 5), alert("DEAD/2/7", 7), alert("DEAD/2/7", 9, cleared=9), event(9, "ended")
    )
    lines = [json.loads(line) for line in run(capsys, "alerts", str(path), "--follow", "--json").splitlines()]
    assert [(line["episode"], line["cleared_step"]) for line in lines] == [
        ("SKEW/1/5", None),
        ("DEAD/2/7", None),
        ("DEAD/2/7", 9),
    ]
    text = run(capsys, "alerts", str(path), "--follow", "--open")
    assert "SKEW" in text
    assert "raise the balance loss" in text
    assert "DEAD" not in text


def test_following_a_silent_run_ends_with_a_line_that_says_so(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run was killed long ago: it never said that it ended, and its newest step is old."""
    write(path, *Step(5).records(), *Step(6).records(), alert("SKEW/1/5", 5))
    assert main(["alerts", str(path), "--follow", "--json"]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["episode"] for line in captured.out.splitlines()] == ["SKEW/1/5"]
    assert "at step 6, and presumed dead; 1 alerts open" in captured.err


def test_following_goes_on_while_a_run_is_only_late(path: Path) -> None:
    write(path, *Step(5).records(), *Step(6).records())
    clock = iter([Step(6).ts + late for late in (10, 60, 118, 122)])
    naps: list[float] = []
    with open_run(path) as store:
        assert list(follow(store, 0, 2.5, sleep=naps.append, now=lambda: next(clock))) == []
    assert naps == [2.5, 2.5, 2.5]
    assert next(clock, None) is None


def test_a_run_whose_process_is_gone_is_dead_as_soon_as_it_is_late(path: Path) -> None:
    """Of another machine, or of a process that runs, only a long silence tells."""
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    here, late = platform.node(), Step(6).ts + 60
    for ts, host, pid, expected in (
        (1.0, here, finished.pid, "dead"),
        (2.0, here, os.getpid(), "stale"),
        (3.0, "elsewhere", finished.pid, "stale"),
        (4.0, here, finished.pid, "dead"),
    ):
        write(path, event(5, "started", ts=ts, host=host, pid=pid), *Step(5 + int(ts)).records())
        with open_run(path) as store:
            assert state_of(store, Step(5 + int(ts)).ts + 60) == expected
            assert state_of(store, Step(5 + int(ts)).ts + 1) == "live"
            assert state_of(store, late + 1e6) == "dead"


def test_a_run_that_was_killed_before_its_first_step_is_dead(tmp_path: Path) -> None:
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    path = new_run(tmp_path / "unborn", created=1000.0)
    with open_run(path) as store:
        assert state_of(store, 1000.0 + 600) == "waiting"
        assert state_of(store, 1000.0 + 3601) == "dead"
    write(path, event(0, "started", host=platform.node(), pid=finished.pid))
    with open_run(path) as store:
        assert state_of(store, 1010.0) == "waiting"
        assert state_of(store, 1031.0) == "dead"


def test_following_an_ended_run_says_how_it_ended(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, *Step(5).records(), alert("SKEW/1/5", 5), event(6, "ended", status="finished"))
    assert main(["alerts", str(path), "--follow"]) == 0
    assert "ended at step 5 (finished); 1 alerts open" in capsys.readouterr().err


def test_listing_since_a_step_keeps_what_changed_later(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(path, alert("SKEW/1/5", 5), alert("DEAD/2/7", 7), alert("DEAD/2/7", 9, cleared=9))
    for since, expected in (("0", 2), ("6", 1), ("9", 1), ("10", 0)):
        assert len(json.loads(run(capsys, "alerts", str(path), "--since", since, "--json"))) == expected
    assert "no alerts since step 10" in run(capsys, "alerts", str(path), "--since", "10")


@pytest.mark.parametrize(
    ("severity", "fails"),
    [
        ("info", ()),
        ("warning", ("warning",)),
        ("error", ("warning", "error")),
        ("critical", ("warning", "error", "critical")),
    ],
)
def test_check_fails_from_its_severity_on(
    path: Path, capsys: pytest.CaptureFixture[str], severity: str, fails: tuple[str, ...]
) -> None:
    write(path, *Step(5).records(), alert("SKEW/1/5", 5, severity=severity))
    for line in ("warning", "error", "critical"):
        text = run(capsys, "check", str(path), "--fail-on", line, status=int(line in fails))
        assert ("SKEW" in text) == (line in fails)
    assert main(["check", str(path)]) == int("error" in fails)


def test_check_forgives_what_was_cleared(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, *Step(5).records(), alert("SKEW/1/5", 5), alert("SKEW/1/5", 9, cleared=9))
    assert "no open alert" in run(capsys, "check", str(path))


def test_check_tells_one_rule_in_most_layers_as_one_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alerts = [alert(f"EXPERT_DEAD/{layer}/5", 5, layer=layer) for layer in range(L)]
    write(path, *Step(5).records(), *alerts)
    text = run(capsys, "check", str(path), status=1)
    assert f"in {L} of {L} layers" in text
    assert "1 open alert of" in text


def test_check_fails_a_run_that_ended_by_an_error(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, *Step(5).records(), event(6, "ended", status="failed"))
    assert "ended by an error" in run(capsys, "check", str(path), status=1)


def test_check_does_not_judge_a_run_without_a_step(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to judge" in run(capsys, "check", str(path), status=1)


def test_check_as_json_tells_what_fails_and_what_is_milder(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = [alert(f"EXPERT_DEAD/{layer}/5", 5, layer=layer, severity="error") for layer in range(L)]
    write(path, *Step(5).records(), *dead, alert("SKEW/1/5", 5, severity="info"))
    said = json.loads(run(capsys, "check", str(path), "--json", status=1))
    assert (said["passed"], said["ended_by_error"], said["step"]) == (False, False, 5)
    assert [(one["rule"], one["fails"], one["since"]) for one in said["alerts"]] == [
        ("EXPERT_DEAD", True, 5),
        ("SKEW", False, 5),
    ]
    assert said["alerts"][0]["layers"] == list(range(L))
    said = json.loads(run(capsys, "check", str(path), "--json", "--fail-on", "critical"))
    assert said["passed"]
    assert not any(one["fails"] for one in said["alerts"])


def test_check_says_that_a_run_is_presumed_dead(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, *Step(5).records())
    assert "presumed dead" in run(capsys, "check", str(path))
    assert json.loads(run(capsys, "check", str(path), "--json"))["state"] == "dead"


def test_a_snapshot_tells_spikes_and_clipping_from_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    loss, norm = rng.normal(3, 0.1, 1100), rng.normal(1, 0.1, 1100)
    loss[[1020, 1050, 1090]] = 9
    dense = ModelInfo(family="test", layers=())
    path = new_run(tmp_path / "spiky", model=dense, config={"optim": {"grad_clip": 1.0}})
    writer = SegmentWriter(path, flush_seconds=1e9)
    for step in range(1100):
        values = {"loss": float(loss[step]), "grad_norm": float(norm[step])}
        writer.write(ScalarRecord(step=step, rank=0, ts=float(step), values=values))
    writer.close()
    known = json.loads(run(capsys, "snapshot", str(path), "--around", "1099", "--json"))["stability"]
    assert known["spike_score/loss"] == pytest.approx(3 / 100)
    assert known["spike_score/grad_norm"] == 0
    assert known["clip_frac"] == pytest.approx((norm > 1).mean())
    early = json.loads(run(capsys, "snapshot", str(path), "--around", "1040", "--json"))["stability"]
    assert early["spike_score/loss"] == pytest.approx(1 / 41)
    assert early["clip_frac"] == pytest.approx((norm[:1041] > 1).mean())
    assert "Stability" in run(capsys, "snapshot", str(path))


def test_a_snapshot_says_what_the_records_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = SegmentWriter(path, flush_seconds=1e9)
    steps = write_steps(writer, range(20), flush_every=7)
    for record in (
        alert("SKEW/0/1", 1),
        alert("SKEW/0/1", 4, cleared=4),
        alert("SKEW/1/2", 2),
        alert("DEAD/2/9", 9),
        alert("SKEW/1/2", 15, cleared=15),
        event(3, "checkpoint"),
        event(11, "checkpoint", path="here"),
    ):
        writer.write(record)
    writer.close()
    facts = json.loads(run(capsys, "snapshot", str(path), "--around", "10", "--window", "3", "--json"))
    assert (facts["first"], facts["last"]) == (7, 13)
    (loss,) = [row for row in facts["scalars"] if row["name"] == "loss"]
    values = [one.loss for one in steps]
    assert loss["value"] == pytest.approx(values[10])
    assert loss["before"] == pytest.approx(sum(values[7:10]) / 3)
    assert loss["after"] == pytest.approx(sum(values[11:14]) / 3)
    assert (loss["lowest"], loss["highest"]) == pytest.approx((min(values[7:14]), max(values[7:14])))
    gini = {row["layer"]: row["value"] for row in facts["metrics"] if row["name"] == "gini"}
    assert gini == pytest.approx({layer: float(steps[10].entropy_L[layer]) / 7 for layer in range(L)})
    (maxvio,) = [row for row in facts["metrics"] if row["name"] == "maxvio"]
    assert (maxvio["layer"], maxvio["value"]) == (None, 2.5)
    states = [(one["episode"], one["cleared_step"]) for one in facts["alerts"]]
    assert sorted(states) == [("DEAD/2/9", None), ("SKEW/1/2", None)], "as of the window's last step"
    assert [one["episode"] for one in facts["transitions"]] == ["DEAD/2/9"]
    assert [(one["step"], one["detail"]) for one in facts["events"]] == [(11, {"path": "here"})]


def test_a_snapshot_is_a_page_that_names_the_worst_layer_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeviz.derive import DeriveSink

    monkeypatch.setenv("COLUMNS", "160")
    path = new_run(tmp_path / "derived")
    sink = DeriveSink(SegmentWriter(path, flush_seconds=1e9), model_info())
    write_steps(sink, range(3), flush_every=3)
    sink.close()
    facts = json.loads(run(capsys, "snapshot", str(path), "--json"))
    entropy = {row["layer"]: row["value"] for row in facts["metrics"] if row["name"] == "load_entropy"}
    assert facts["step"] == 2
    assert sorted(facts["worst_layers"]) == list(range(L))
    assert all(entropy[low] <= entropy[high] for low, high in pairwise(facts["worst_layers"]))
    text = run(capsys, "snapshot", str(path), "--window", "1")
    for part in ("derived", "looking at steps 1 to 2", "loss", "load_entropy", "Alerts", "Events"):
        assert part in text


def test_a_snapshot_of_steps_that_were_not_recorded_says_which_were(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no step yet" in run(capsys, "snapshot", str(path), status=1)
    write(path, *Step(5).records())
    assert "newest step is 5" in run(capsys, "snapshot", str(path), "--around", "900", status=1)
    assert "window=-1" in run(capsys, "snapshot", str(path), "--window", "-1", status=1)
