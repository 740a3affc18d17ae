"""The writer: nothing acknowledged is lost, nothing is torn, a full disk costs nothing that fits in memory."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from store_runs import Step, event, new_run, write_steps

from moeviz.errors import MoevizError, RunNotFoundError
from moeviz.records import AttentionRecord
from moeviz.store import writer as writer_module
from moeviz.store.cover import SegmentName
from moeviz.store.encode_samples import held_bytes
from moeviz.store.reader import open_run
from moeviz.store.run import resume_run
from moeviz.store.writer import SegmentWriter

TESTS = Path(__file__).parent


def steps_of(path: Path) -> list[int]:
    with open_run(path) as store:
        return store.sql("SELECT step FROM expert_load WHERE layer = 0 ORDER BY step")["step"].tolist()


def test_a_killed_writer_loses_nothing_that_was_flushed_and_tears_nothing(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    program = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from store_runs import Step
        from moeviz.store.writer import SegmentWriter
        writer = SegmentWriter({str(path)!r}, flush_seconds=1e9)
        for step in range(10_000):
            for record in Step(step).records():
                writer.write(record)
            writer.flush()
            print(step, flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(40)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    acknowledged = int(lines[-1])
    found = steps_of(path)
    assert found[: acknowledged + 1] == list(range(acknowledged + 1))
    assert len(found) <= acknowledged + 2
    with open_run(path) as store:
        assert store.notes == []
        for table in ("routing", "sequences", "scalars", "metrics"):
            newest = store.sql(f"SELECT max(step) AS step FROM {table}")["step"].iloc[0]
            assert newest >= acknowledged


def test_leftovers_of_a_killed_writer_are_never_read_and_cleaned_at_the_next_start(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    write_steps(SegmentWriter(path), range(3))
    leftover = path / "expert_load" / ".r0-a0.0-n4.4-s3.3-l0-9.parquet.tmp"
    leftover.write_bytes(b"PAR1 half a file")
    other = path / "expert_load" / ".r1-a0.0-n4.4-s3.3-l0-9.parquet.tmp"
    other.write_bytes(b"another rank is writing this")
    assert steps_of(path) == [0, 1, 2]
    SegmentWriter(path)
    assert not leftover.exists()
    assert other.exists()


def test_a_second_writer_goes_on_after_the_first(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    write_steps(SegmentWriter(path), range(3))
    write_steps(SegmentWriter(path), range(3, 5))
    assert steps_of(path) == [0, 1, 2, 3, 4]
    with open_run(path) as store:
        assert store.notes == []


def test_ranks_write_side_by_side(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run", ranks=2)
    for rank in (0, 1):
        write_steps(SegmentWriter(path, rank=rank), range(4), rank=rank)
    with open_run(path) as store:
        seen = store.sql(
            "SELECT rank, count(DISTINCT step) AS steps FROM routing GROUP BY rank ORDER BY rank"
        )
        assert store.notes == []
    assert seen.to_numpy().tolist() == [[0, 4], [1, 4]]


def test_loads_become_visible_after_everything_else_of_their_step(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    order: list[str] = []
    original = writer_module.write_segment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            writer_module,
            "write_segment",
            lambda folder, *rest, **how: order.append(folder.name) or original(folder, *rest, **how),
        )
        write_steps(SegmentWriter(path), range(1))
    assert order[-1] == "expert_load"
    assert set(order) == {"routing", "sequences", "attention", "scalars", "metrics", "expert_load"}


def test_it_flushes_by_itself_when_enough_has_gathered(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    small = SegmentWriter(path, flush_seconds=1e9, flush_bytes=1)
    small.write(event(1, "checkpoint"))
    assert small.stats.segments == 1
    late = SegmentWriter(path, flush_seconds=0.0, flush_bytes=1e9)
    late.write(event(2, "checkpoint"))
    assert late.stats.segments == 1
    patient = SegmentWriter(path, flush_seconds=1e9, flush_bytes=1e9)
    patient.write(event(3, "checkpoint"))
    assert patient.stats.segments == 0
    patient.close()
    assert patient.stats.segments == 1


def test_samples_that_wait_are_bounded_and_those_that_are_no_rows_cost_themselves_alone(
    tmp_path: Path,
) -> None:
    path = new_run(tmp_path / "run")
    writer = SegmentWriter(path, flush_seconds=1e9, flush_bytes=1e9)
    most = 0
    for step in range(100):
        shape = (100,) if step == 99 else (100, 200)
        record = AttentionRecord(
            step=step, rank=0, layer=0, head=0, seq=0, map_QC=np.ones(shape, np.float32), q_len=100, k_len=200
        )
        writer.write(record)
        most = max(most, sum(held_bytes(each) for each in writer._samples))
    assert 100_000 < most <= 2_000_000
    assert writer._pending_bytes < 100 * 80_000 / 2
    with pytest.raises((ValueError, IndexError)):
        writer.flush()
    writer.close()
    with open_run(path) as store:
        assert store.sql("SELECT step FROM attention ORDER BY step")["step"].tolist() == list(range(99))


def test_names_say_the_steps_that_are_inside(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    write_steps(SegmentWriter(path, flush_seconds=1e9), range(5, 12), flush_every=3)
    parsed = sorted(SegmentName.parse(one.name) for one in (path / "routing").glob("*.parquet"))
    assert [(n.first_flush, n.first_step, n.last_step) for n in parsed if n] == [
        (0, 0, 0),
        (1, 5, 7),
        (2, 8, 10),
        (3, 11, 11),
    ]


class FullDisk:
    """write_segment that fails with ENOSPC while `full`."""

    def __init__(self, tables: set[str] | None = None) -> None:
        self.full, self.tables, self.original = True, tables, writer_module.write_segment

    def __call__(self, folder: Path, *rest: Any, **how: Any) -> Path:
        if self.full and (self.tables is None or folder.name in self.tables):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.original(folder, *rest, **how)


def test_a_full_disk_loses_nothing_once_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, disk = new_run(tmp_path / "run"), FullDisk()
    monkeypatch.setattr(writer_module, "write_segment", disk)
    writer = SegmentWriter(path, flush_seconds=1e9)
    for step in range(4):
        for record in Step(step).records():
            writer.write(record)
        with pytest.raises(OSError, match="No space left"):
            writer.flush()
    assert steps_of(path) == []
    disk.full = False
    writer.close()
    assert steps_of(path) == [0, 1, 2, 3]
    assert writer.stats.dropped_rows == 0
    with open_run(path) as store:
        assert store.sql("SELECT count(*) AS n FROM routing")["n"].iloc[0] == 4 * 3 * 3


def test_small_tables_pass_while_a_large_one_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_run(tmp_path / "run")
    monkeypatch.setattr(writer_module, "write_segment", FullDisk({"routing"}))
    with pytest.raises(OSError, match="No space left"):
        write_steps(SegmentWriter(path), range(1))
    assert steps_of(path) == [0]


def test_memory_stays_bounded_and_samples_go_before_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, disk = new_run(tmp_path / "run"), FullDisk()
    monkeypatch.setattr(writer_module, "write_segment", disk)
    writer = SegmentWriter(path, flush_seconds=1e9, retry_bytes=20_000)
    for step in range(30):
        for record in Step(step).records():
            writer.write(record)
        with pytest.raises(OSError, match="No space left"):
            writer.flush()
        assert writer._pending_bytes <= 20_000
    disk.full = False
    writer.close()
    assert writer.stats.dropped_rows > 0
    assert steps_of(path) == list(range(30))
    with open_run(path) as store:
        assert store.sql("SELECT count(*) AS n FROM routing")["n"].iloc[0] < 30 * 9


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def _fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_a_really_full_disk_leaves_whole_files_only(small_disk: Path) -> None:
    path = new_run(small_disk / "run")
    ballast = small_disk / "ballast"
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(1))
    _fill(ballast)
    with pytest.raises(OSError, match="No space left"):
        write_steps(writer, range(1, 3), flush_every=2)
    assert list(path.glob("*/.*.tmp")) == []
    assert steps_of(path) == [0]
    ballast.unlink()
    writer.close()
    assert steps_of(path) == [0, 1, 2]
    with open_run(path) as store:
        assert store.notes == []


def test_closing_twice_is_allowed_and_writing_after_it_is_not(tmp_path: Path) -> None:
    writer = SegmentWriter(new_run(tmp_path / "run"))
    writer.close()
    writer.close()
    with pytest.raises(MoevizError, match="is closed"):
        writer.write(event(1, "late"))


def test_a_writer_wants_a_run_and_a_known_attempt(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no run at"):
        SegmentWriter(tmp_path)
    path = new_run(tmp_path / "run")
    resume_run(path, 3)
    assert SegmentWriter(path)._attempt.number == 1
    with pytest.raises(MoevizError, match=r"attempt 7 is not one of the run's \(0, 1\)"):
        SegmentWriter(path, attempt=7)


def test_a_long_run_gets_a_sidecar_that_leaves_with_its_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_SIDECAR_SEGMENTS", 12)
    path = new_run(tmp_path / "run", ranks=2)
    other = SegmentWriter(path, rank=1, flush_seconds=1e9)
    without = SegmentWriter(path, flush_seconds=1e9, sidecar=False)
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(other, range(4), rank=1)
    write_steps(without, range(4))
    write_steps(writer, range(4, 5))
    assert other._sidecar is without._sidecar is writer._sidecar is None
    write_steps(writer, range(5, 8))
    sidecar = writer._sidecar
    assert sidecar is not None
    assert sidecar.poll() is None
    writer.close()
    assert sidecar.poll() is not None


def test_a_full_disk_is_not_tried_again_at_every_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, disk = new_run(tmp_path / "run"), FullDisk()
    tries: list[str] = []
    monkeypatch.setattr(
        writer_module,
        "write_segment",
        lambda folder, *rest, **how: tries.append("") or disk(folder, *rest, **how),
    )
    writer = SegmentWriter(path, flush_seconds=1e9, flush_bytes=1)
    with pytest.raises(OSError, match="No space left"):
        writer.write(event(0, "checkpoint"))
    for step in range(50):
        writer.write(event(step, "checkpoint"))
    assert len(tries) == 1
    disk.full = False
    writer.flush()
    assert writer.stats.rows == 51
    writer.write(event(51, "checkpoint"))
    assert len(tries) == 3


def test_on_a_slow_disk_half_of_the_time_is_left_for_taking_in_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushes, now = new_run(tmp_path / "run"), list[float](), [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr(writer_module, "time", clock)
    writer = SegmentWriter(path, flush_seconds=1.0, sidecar=False)
    original = writer._write_table

    def four_seconds(table: str, rows: pa.Table) -> None:
        flushes.append(now[0])
        original(table, rows)
        now[0] += 4.0

    monkeypatch.setattr(writer, "_write_table", four_seconds)
    for moment in (0.5, 1.0, 5.5, 8.9, 9.0, 13.5):
        now[0] = max(now[0], moment)
        writer.write(event(0, "checkpoint"))
    assert flushes == [1.0, 9.0], "a flush of 1 to 5 s is followed by one at 9 s, not at 6 s"
