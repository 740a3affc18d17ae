"""Merging: the same rows in fewer files, nothing deleted while a reader may want it, one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_runs import L, N, event, new_run, write_steps

from moeviz.store import compact
from moeviz.store.compact import Compacted, Rules, compact_run, run_lock
from moeviz.store.cover import SegmentName
from moeviz.store.detail import write_detail
from moeviz.store.pack import pack_run
from moeviz.store.reader import open_run
from moeviz.store.run import resume_run, start_compactor
from moeviz.store.segments import segment_names
from moeviz.store.writer import SegmentWriter

RULES = Rules(fan_in=4, most=8)


def levels(path: Path, table: str) -> list[int]:
    parsed = [SegmentName.parse(name) for name in segment_names(path / table)]
    return sorted(name.level for name in parsed if name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    run = new_run(tmp_path / "run")
    write_steps(SegmentWriter(run, flush_seconds=1e9), range(11))
    return run


def test_merged_files_count_after_the_delay_and_parts_go_after_the_grace(path: Path) -> None:
    now = time.time()
    assert compact_run(path, RULES, now).deleted == 0
    assert levels(path, "routing") == [0] * 12 + [1, 1]
    assert compact_run(path, RULES, now + 60).deleted == 0, (
        "active for 55 s: a reader may still use the parts"
    )
    assert compact_run(path, RULES, now + 66).deleted > 0
    assert levels(path, "routing") == [1, 1]


def test_merging_again_climbs_to_the_top_level_and_stops(path: Path) -> None:
    rules = Rules(fan_in=2, most=2, delay_seconds=0.0, grace_seconds=0.0)
    for late in range(8):
        compact_run(path, rules, time.time() + late)
    assert max(levels(path, "routing")) == compact.TOP_LEVEL
    before = segment_names(path / "routing")
    assert compact_run(path, rules, time.time() + 20).merged == 0
    assert sorted(segment_names(path / "routing")) == sorted(before)
    with open_run(path) as store:
        assert store.sql("SELECT count(*) AS n FROM routing")["n"].iloc[0] == 11 * L * N
        assert store.notes == []


def test_merged_rows_are_sorted_within_their_tile(path: Path) -> None:
    compact_run(path, RULES)
    merged = next(path.glob("routing/*-l1-*.parquet"))
    rows = pq.read_table(merged, partitioning=None)
    keys = list(
        zip(rows["layer"].to_pylist(), rows["step"].to_pylist(), rows["seq"].to_pylist(), strict=True)
    )
    assert pq.ParquetFile(merged).metadata.num_row_groups == 1, "so few rows are one tile"
    assert keys == sorted(keys)


def test_big_files_are_left_alone(path: Path) -> None:
    assert compact_run(path, RULES._replace(max_bytes=100)) == Compacted(0, 0, 0)


def test_attempts_and_ranks_are_never_merged_into_one(path: Path) -> None:
    write_steps(SegmentWriter(path, rank=1, flush_seconds=1e9), range(6), rank=1)
    resume_run(path, 8)
    write_steps(SegmentWriter(path, flush_seconds=1e9), range(8, 14), seed=1)
    with open_run(path) as store:
        before = store.sql("SELECT * FROM decisions ORDER BY ALL")
        for late in range(3):
            compact_run(path, Rules(fan_in=2, delay_seconds=0.0, grace_seconds=0.0), time.time() + late)
        after = store.sql("SELECT * FROM decisions ORDER BY ALL")
    assert before.equals(after)
    merged = {
        (n.rank, n.attempt) for n in map(SegmentName.parse, segment_names(path / "routing")) if n and n.level
    }
    assert merged == {(0, 0), (0, 1), (1, 0)}


def test_a_damaged_file_is_neither_merged_nor_deleted(path: Path) -> None:
    victim = next(path.glob("routing/*-n6.6-*.parquet"))
    victim.write_bytes(victim.read_bytes()[:50])
    for late in range(3):
        compact_run(path, Rules(fan_in=2, delay_seconds=0.0, grace_seconds=0.0), time.time() + late)
    assert victim.exists()
    with open_run(path) as store:
        steps = store.sql("SELECT DISTINCT step FROM routing ORDER BY step")["step"].tolist()
    assert steps == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_what_a_killed_merge_left_half_written_is_cleaned(path: Path) -> None:
    leftover = path / "routing" / ".r0-a0.0-n1.8-s0.7-l1-9.parquet.tmp"
    leftover.write_bytes(b"half")
    flushing = path / "routing" / ".r0-a0.0-n12.12-s11.11-l0-9.parquet.tmp"
    flushing.write_bytes(b"the writer is at it")
    compact_run(path, RULES)
    assert not leftover.exists()
    assert flushing.exists()


def test_only_one_process_merges(path: Path) -> None:
    with run_lock(path) as held:
        assert held
        assert compact_run(path, RULES) == Compacted(0, 0, 0)
    assert compact_run(path, RULES).merged > 0


def test_a_packed_run_is_left_alone(path: Path) -> None:
    pack_run(path, force=True)
    assert compact_run(path, RULES) == Compacted(0, 0, 0)


def test_the_sidecar_runs_once_and_says_what_it_did(path: Path) -> None:
    writer = SegmentWriter(path, flush_seconds=1e9)
    for step in range(20):
        writer.write(event(step, "checkpoint"))
        writer.flush()
    command = [sys.executable, "-P", "-m", "moeviz.store.compact", str(path), "--once"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "21 files merged into 1, 0 deleted\n"


def test_the_sidecar_leaves_with_its_parent(path: Path) -> None:
    program = f"""
import sys, time
from moeviz.store.run import start_compactor
print(start_compactor({str(path)!r}).pid, flush=True)
time.sleep(1.5)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    sidecar = int(done.stdout)
    deadline = time.monotonic() + 240  # it runs at the lowest priority
    while time.monotonic() < deadline:
        try:
            os.kill(sidecar, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(sidecar, 9)
    pytest.fail("the sidecar outlived its parent by 240 s")


def test_starting_the_sidecar_does_not_wait_for_it(path: Path) -> None:
    process = start_compactor(path)
    assert process.poll() is None  # it runs as long as this process does
    process.terminate()
    process.wait()


def test_levels_of_detail_survive_a_resume_inside_a_bucket(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    loads = _loads(range(250), seed=0)
    _write_loads(path, loads)
    assert write_detail(path) == 2
    assert write_detail(path) == 0, "nothing new, nothing written"
    resume_run(path, 150)
    again = _loads(range(150, 330), seed=1)
    _write_loads(path, again)
    assert write_detail(path) == 2, "the bucket of the cut is made anew, and the next one"
    expected = (
        np.stack([record.counts_LE[1] for record in [*loads[:150], *again]])[:300].reshape(3, 100, -1).sum(1)
    )
    with open_run(path) as store:
        lod = store.sql("SELECT step, counts FROM load_lod WHERE layer = 1 AND span = 100 ORDER BY step")
    assert lod["step"].tolist() == [0, 100, 200]
    assert np.stack(lod["counts"].to_list()).tolist() == expected.tolist()


def test_wide_buckets_are_sums_of_narrow_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeviz.store.detail.SPANS", (10, 50))
    path = new_run(tmp_path / "run")
    loads = _loads(range(130), seed=0)
    _write_loads(path, loads[:70])
    assert write_detail(path) == 7 + 1
    _write_loads(path, loads[70:])
    assert write_detail(path) == 6 + 1
    with open_run(path) as store:
        lod = store.sql("SELECT * FROM load_lod WHERE layer = 2 AND span = 50 ORDER BY step")
    counts = np.stack([record.counts_LE[2, :4] for record in loads])[:100].reshape(2, 50, 4)
    rel = counts / counts.sum(-1, keepdims=True) * 4
    assert lod["steps"].tolist() == [50, 50]
    assert np.stack(lod["counts"].to_list()).tolist() == counts.sum(1).tolist()
    np.testing.assert_allclose(np.stack(lod["hi"].to_list()), rel.max(1), rtol=1e-6)


def _loads(steps: range, seed: int) -> list:
    from moeviz.records import LoadRecord

    rng = np.random.default_rng(seed)
    own = np.arange(7) < np.array([5, 7, 4])[:, None]
    return [
        LoadRecord(
            step=s, rank=0, ts=float(s), tokens=50, counts_LE=np.where(own, rng.integers(1, 99, (3, 7)), 0)
        )
        for s in steps
    ]


def _write_loads(path: Path, loads: list) -> None:
    writer = SegmentWriter(path, flush_seconds=1e9)
    for at, record in enumerate(loads):
        writer.write(record)
        if at % 30 == 29:
            writer.flush()
    writer.close()
