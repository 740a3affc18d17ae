"""A resumed run knows its past: the records as they were written, the alerts as they stood, without DuckDB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from metrics_routing import load_record
from store_runs import EXPERTS, E, Step, alert, event, model_info, new_run, write_steps

from moeviz.records import LoadRecord, ScalarRecord
from moeviz.session import deriving
from moeviz.store import run as run_module
from moeviz.store.compact import compact_run
from moeviz.store.pack import pack_run
from moeviz.store.past import read_past
from moeviz.store.queries import alert_records
from moeviz.store.reader import open_run
from moeviz.store.run import RunInfo, create_run, resume_run
from moeviz.store.writer import SegmentWriter


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_module, "write_views", lambda path: True)
    return new_run(tmp_path / "run")


def check(path: Path, before: int, steps: int) -> None:
    """Every number of the records is the one that was written."""
    past = read_past(path, before, steps=steps)
    loads = [record for record in past.records if isinstance(record, LoadRecord)]
    scalars = [record for record in past.records if isinstance(record, ScalarRecord)]
    expected = list(range(max(before - steps, 0), before))
    assert [record.step for record in loads] == [record.step for record in scalars] == expected
    own_LE = np.arange(E) < np.array(EXPERTS)[:, None]
    for load, scalar in zip(loads, scalars, strict=True):
        step = Step(load.step)
        assert scalar.values == pytest.approx({"loss": step.loss, "lr": 1e-3})
        assert (load.tokens, load.counts_LE.tolist()) == (step.tokens, step.counts_LE.tolist())
        assert load.bias_LE is not None
        np.testing.assert_array_equal(load.bias_LE, np.where(own_LE, step.bias_LE, 0))
        assert load.dropped_LE is None
        assert set(load.token_sums) == {"entropy_nats"}
        np.testing.assert_allclose(load.token_sums["entropy_nats"], step.entropy_L, rtol=1e-6)


def test_the_past_is_what_was_written(path: Path) -> None:
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(12), flush_every=5)
    writer.close()
    resume_run(path, 9)
    check(path, 9, 500)
    check(path, 9, 4)
    check(path, 0, 4)


def test_what_a_later_attempt_replaced_is_no_past(path: Path) -> None:
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(12), flush_every=12)
    write_steps(writer, range(9, 10), seed=99)
    writer.close()
    resume_run(path, 8)
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(8, 11))
    writer.close()
    resume_run(path, 11)
    check(path, 11, 6)


def test_merged_and_packed_runs_have_the_same_past(path: Path) -> None:
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(20))
    writer.write(event(20, "ended"))
    writer.close()
    compact_run(path)
    check(path, 20, 7)
    pack_run(path)
    resume_run(path, 15)
    check(path, 15, 7)


def test_alerts_stand_as_they_stood_before_the_step(path: Path) -> None:
    writer = SegmentWriter(path, flush_seconds=1e9)
    for record in (
        alert("A/1/2", 2),
        alert("B/1/3", 3),
        alert("A/1/2", 5, severity="critical"),
        alert("B/1/3", 6, cleared=6),
        alert("C/1/7", 7),
        alert("A/1/2", 9, cleared=9),
    ):
        writer.write(record)
    writer.close()
    resume_run(path, 6)
    assert [(one.episode, one.severity) for one in read_past(path, 6).open_alerts] == [
        ("A/1/2", "critical"),
        ("B/1/3", "error"),
    ]
    assert read_past(path, 3).open_alerts == [alert("A/1/2", 2)]


def test_a_damaged_segment_costs_its_own_rows(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(4))
    writer.close()
    (victim,) = (path / "expert_load").glob("*-s2.2-*")
    victim.write_bytes(b"PAR1 no more")
    steps = [one.step for one in read_past(path, 4).records if isinstance(one, LoadRecord)]
    assert steps == [0, 1, 3]
    assert victim.name in caplog.text


def test_reading_the_past_imports_no_query_engine() -> None:
    code = "import sys, moeviz.store.past; sys.exit('duckdb' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def collapsed(step: int, until: int) -> LoadRecord:
    """Layer 1 on two of eight experts from step 400 to `until`; layer 0 and the rest even."""
    rng = np.random.default_rng(step)
    even_E, bad_E = np.full(8, 1 / 8), np.r_[0.5, 0.5, np.zeros(6)]
    shares = [even_E, bad_E if 400 <= step < until else even_E]
    return load_record(step, np.stack([rng.multinomial(1024, share_E) for share_E in shares]), 2)


def test_an_alert_that_was_open_is_cleared_by_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 500, resumed at 480: no alert is raised twice, and each is cleared when it clears."""
    monkeypatch.setattr(run_module, "write_views", lambda path: True)
    info, path = model_info((8, 8)), tmp_path / "killed"
    create_run(path, RunInfo(name="killed", model=info))
    first = deriving(SegmentWriter(path, flush_seconds=1e9), path, info)
    for step in range(500):
        first.write(collapsed(step, 560))
    first.flush()
    open_then = {one.episode for one in first.open_alerts}
    assert {name.split("/")[0] for name in open_then} >= {"ROUTING_COLLAPSE", "LOAD_SKEW", "EXPERT_DEAD"}
    resume_run(path, 480)
    heard: list[str] = []
    second = deriving(
        SegmentWriter(path, flush_seconds=1e9),
        path,
        info,
        resume_from=480,
        on_alert=lambda one: heard.append(one.episode),
    )
    assert {one.episode for one in second.open_alerts} == open_then
    for step in range(480, 800):
        second.write(collapsed(step, 560))
    second.close()
    graver = {one for one in open_then if not one.startswith("LOAD_DRIFT")}
    with open_run(path) as store:
        states = {one.episode: one for one in alert_records(store)}
    assert {name for name in states if not name.startswith("LOAD_DRIFT")} == graver
    for name in graver:
        cleared = states[name].cleared_step
        assert cleared is not None, name
        assert 600 < cleared < 800, name
        assert heard.count(name) == 1, name
