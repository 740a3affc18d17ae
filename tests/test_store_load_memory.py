"""Counts that were read once: always those of a fresh look, whatever is flushed, merged, deleted or resumed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from store_runs import EXPERTS, E, new_run, write_steps

from moeviz.store import queries
from moeviz.store.compact import Rules, compact_run
from moeviz.store.cover import Covered, SegmentName
from moeviz.store.load_memory import LoadMemory, flushes_of
from moeviz.store.reader import Store, open_run
from moeviz.store.run import resume_run
from moeviz.store.writer import SegmentWriter

LAYER = 0


def file(first: int, last: int, rank: int = 0, attempt: int = 0, level: int = 0) -> Covered:
    return Covered(SegmentName(rank, attempt, 0, first, last, first, last, level, 0), None)


def rows(files: list[Covered]) -> pa.Table:
    """A row per flush; its step is the flush's number, its counts say who wrote it."""
    flushes = [
        (n, one.name.rank) for one in files for n in range(one.name.first_flush, one.name.last_flush + 1)
    ]
    return pa.table(
        {
            "step": pa.array([n for n, _ in flushes], pa.int32()),
            "counts": pa.array([[n, rank] for n, rank in flushes], pa.list_(pa.uint32())),
        }
    )


def look(memory: LoadMemory, files: list[Covered]) -> tuple[int, list[list[int]]]:
    """How many files a look reads, and all rows it gives."""
    new = memory.unread(0, files)
    steps_R, counts_RE = memory.extend(0, 2, files, rows(new))
    assert steps_R.tolist() == counts_RE[:, 0].tolist() == sorted(steps_R.tolist())
    return len(new), sorted(counts_RE.tolist())


def every(files: list[Covered]) -> list[list[int]]:
    return sorted(rows(files)["counts"].to_pylist())


def test_only_new_files_are_read_and_merging_makes_none_new() -> None:
    memory = LoadMemory()
    files = [file(n, n, rank) for rank in (0, 1) for n in range(6)]
    assert look(memory, files) == (12, every(files))
    files = [file(0, 3, level=1), file(4, 4), file(5, 5), file(6, 6), *files[6:]]
    assert look(memory, files) == (1, every(files))
    files = [file(0, 6, level=2), *files[4:], file(6, 7, 1)]
    assert look(memory, files) == (1, every(files))
    assert look(memory, files) == (0, every(files))


def test_rows_that_are_gone_are_forgotten() -> None:
    memory = LoadMemory()
    files = [file(n, n) for n in range(6)]
    look(memory, files)
    kept = files[2:]
    assert look(memory, kept) == (4, every(kept))


def test_a_file_that_holds_known_rows_and_new_ones_makes_all_be_read_again() -> None:
    memory = LoadMemory()
    look(memory, [file(0, 0), file(1, 1), file(3, 3)])
    merged = [file(0, 3, level=1), file(4, 4)]
    assert look(memory, merged) == (2, every(merged))


def test_a_new_attempt_makes_all_be_read_again() -> None:
    memory = LoadMemory()
    look(memory, [file(0, 0), file(1, 1)])
    resumed = [file(0, 0), file(1, 1), file(0, 0, attempt=1)]
    assert look(memory, resumed)[0] == 3


def test_stretches_without_a_gap_are_one() -> None:
    files = [file(0, 3), file(4, 4), file(6, 6), file(0, 1, rank=1)]
    assert flushes_of(files) == {(0, 0): [(0, 4), (6, 6)], (1, 0): [(0, 1)]}


def test_layers_that_nobody_asks_for_leave() -> None:
    memory = LoadMemory()
    files = [file(0, 0)]
    for layer in range(20):
        memory.extend(layer, 2, files, rows(files))
    assert memory.unread(0, files) == files
    assert memory.unread(19, files) == []


def curve(store: Store) -> np.ndarray:
    """Shares of LAYER by step, [T, E]."""
    frame = queries.load_over_time(store, LAYER, points=10_000)
    return frame["share"].to_numpy().reshape(-1, EXPERTS[LAYER])


def recounted(written: dict[int, np.ndarray]) -> np.ndarray:
    counts_TE = np.stack([written[step][LAYER, : EXPERTS[LAYER]] for step in sorted(written)])
    return (counts_TE / counts_TE.sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_a_reader_that_looks_again_and_again_sees_what_was_written(tmp_path: Path, seed: int) -> None:
    assert EXPERTS[LAYER] < E, "columns past a layer's own experts must not appear"
    rng = np.random.default_rng(seed)
    path = new_run(tmp_path / "run")
    writer, late = SegmentWriter(path, sidecar=False), 0.0
    written: dict[int, np.ndarray] = {}
    rules = Rules(fan_in=3, most=4, delay_seconds=0.0, grace_seconds=0.0)
    with open_run(path) as store:
        for _ in range(12):
            first = max(written, default=-1) + 1
            for step in write_steps(writer, range(first, first + int(rng.integers(1, 4))), seed=seed):
                written[step.step] = step.counts_LE
            if rng.random() < 0.5:
                late += 1
                compact_run(path, rules, time.time() + late)
            if rng.random() < 0.2:
                writer.close()
                back = int(rng.integers(1, max(written) + 1))
                resume_run(path, back)
                written = {step: counts_LE for step, counts_LE in written.items() if step < back}
                writer = SegmentWriter(path, sidecar=False)
                seed += 100
            np.testing.assert_array_equal(curve(store), recounted(written))
            with open_run(path) as fresh:
                np.testing.assert_array_equal(curve(fresh), curve(store))
