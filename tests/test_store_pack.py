"""Packing: one ordinary DuckDB file with the same rows; a crash or a doubt leaves the segments alone."""

from __future__ import annotations

import logging
from pathlib import Path

import duckdb
import pytest
from store_runs import L, N, event, new_run, write_steps

from moeviz.errors import CorruptRunError, MoevizError
from moeviz.store import pack as pack_module
from moeviz.store.pack import pack_run, unpack_run
from moeviz.store.queries import last_step
from moeviz.store.reader import open_run
from moeviz.store.run import finish_run, read_info, resume_run
from moeviz.store.schema import TABLES
from moeviz.store.writer import SegmentWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    run = new_run(tmp_path / "run")
    writer = SegmentWriter(run, flush_seconds=1e9)
    write_steps(writer, range(6))
    writer.write(event(6, "ended"))
    writer.close()
    return run


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*/*.parquet"))


def test_a_packed_file_is_plain_tables_for_any_client(path: Path) -> None:
    packed = pack_run(path)
    assert segments(path) == []
    assert packed.rows["routing"] == 6 * L * N
    assert packed.freed_bytes > 0
    with duckdb.connect(str(path / "run.duckdb"), read_only=True) as client:
        tables = {name for (name,) in client.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
        assert tables == {*TABLES, "vocab", "run_info"}
        for table, rows in packed.rows.items():
            assert client.execute(f"SELECT count(*) FROM {table}").fetchone() == (rows,)
        assert client.execute("SELECT count(*) FROM decisions").fetchone()[0] > 0  # type: ignore[index]


def test_an_open_store_goes_on_when_the_run_is_packed_and_unpacked_under_it(path: Path) -> None:
    with open_run(path) as store:
        before = store.sql("SELECT * FROM decisions ORDER BY ALL")
        pack_run(path)
        assert store.sql("SELECT * FROM decisions ORDER BY ALL").equals(before)
        assert store.info.packed
        unpack_run(path)
        assert store.sql("SELECT * FROM decisions ORDER BY ALL").equals(before)
        assert not store.info.packed


def test_a_run_that_is_still_written_is_not_packed(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    write_steps(SegmentWriter(path), range(2))
    with pytest.raises(MoevizError, match="did not say that it ended"):
        pack_run(path)
    assert len(segments(path)) > 0
    pack_run(path, force=True)
    assert read_info(path).packed


def test_a_run_that_fell_silent_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = new_run(tmp_path / "run")
    write_steps(SegmentWriter(path), range(2))
    monkeypatch.setattr(pack_module, "DEAD_SECONDS", 0.0)
    pack_run(path)
    assert read_info(path).packed


def test_packing_twice_says_so(path: Path) -> None:
    pack_run(path)
    with pytest.raises(MoevizError, match="packed already"):
        pack_run(path)


def test_unpacking_segments_says_so(path: Path) -> None:
    with pytest.raises(MoevizError, match="is not packed"):
        unpack_run(path)


def test_segments_can_be_kept(path: Path) -> None:
    before = segments(path)
    pack_run(path, keep_segments=True)
    assert set(before) <= set(segments(path))
    assert not read_info(path).packed
    with open_run(path) as store:
        assert last_step(store) == 5


@pytest.mark.parametrize("step", ["_count", "_sync_file"])
def test_a_crash_while_packing_leaves_a_run_that_opens(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = segments(path)

    def crash(*_: object) -> int:
        raise RuntimeError("power cut")

    monkeypatch.setattr(pack_module, step, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        pack_run(path)
    monkeypatch.undo()
    assert set(before) <= set(segments(path))
    with open_run(path) as store:
        assert last_step(store) == 5
    assert pack_run(path).rows["scalars"] == 12


def test_a_crash_between_the_copy_and_the_deletion_leaves_a_run_that_opens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> int:
        raise RuntimeError("power cut")

    monkeypatch.setattr(pack_module, "_delete", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        pack_run(path)
    with open_run(path) as store:
        assert store.info.packed
        assert store.sql("SELECT count(*) AS n FROM routing")["n"].iloc[0] == 6 * L * N


def test_a_copy_that_does_not_match_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(1000))
    monkeypatch.setattr(pack_module, "_count", lambda *_: next(counts))
    with pytest.raises(MoevizError, match="changed while it was packed"):
        pack_run(path)
    assert len(segments(path)) > 0
    assert not (path / ".run.duckdb.tmp").exists()


def test_damaged_segments_are_not_deleted(path: Path) -> None:
    victim = next(path.glob("routing/*-n3.3-*.parquet"))
    victim.write_bytes(victim.read_bytes()[:50])
    pack_run(path)
    assert segments(path) == [victim]


def test_a_packed_run_can_be_resumed(path: Path) -> None:
    finish_run(path)
    assert read_info(path).packed
    info = resume_run(path, 4)
    assert (info.attempt, info.packed) == (1, False)
    write_steps(SegmentWriter(path), range(4, 5), seed=1)
    with open_run(path) as store:
        assert store.sql("SELECT DISTINCT step FROM routing ORDER BY step")["step"].tolist() == [
            0,
            1,
            2,
            3,
            4,
        ]
        assert store.notes == []
    with duckdb.connect(str(path / "run.duckdb"), read_only=True) as client:
        assert client.execute("SELECT max(step) FROM expert_load").fetchone() == (4,)


def test_a_packed_run_whose_file_is_lost_cannot_be_resumed(path: Path) -> None:
    pack_run(path)
    (path / "run.duckdb").unlink()
    with pytest.raises(CorruptRunError, match="could not be unpacked"):
        resume_run(path, 3)


def test_a_failure_to_finish_is_logged_and_not_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = new_run(tmp_path / "run")
    write_steps(SegmentWriter(path), range(1))
    with caplog.at_level(logging.WARNING, logger="moeviz.store"):
        assert not finish_run(path)
    assert "did not say that it ended" in caplog.text
    with open_run(path) as store:
        assert last_step(store) == 0
