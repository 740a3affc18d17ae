"""Exported tables hold what readers of the run see, in every format, and nothing half-made is left."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest
from store_runs import EXPERTS, K, L, event, new_run, write_steps

from moeviz.cli import main
from moeviz.errors import MoevizError
from moeviz.store import export
from moeviz.store.pack import pack_run
from moeviz.store.queries import load_matrix, token_flow
from moeviz.store.reader import open_run
from moeviz.store.run import resume_run
from moeviz.store.schema import TABLES
from moeviz.store.writer import SegmentWriter

STEPS = range(4)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 0 to 3, where 2 and 3 were trained twice."""
    path = new_run(tmp_path_factory.mktemp("runs") / "one")
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(4), seed=7)
    writer.close()
    resume_run(path, 2)
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(2, 4), seed=8)
    writer.write(event(4, "ended"))
    writer.close()
    return path


@pytest.mark.parametrize("table_format", ["parquet", "csv", "duckdb"])
def test_loads_are_those_that_readers_see(
    resumed: Path, tmp_path: Path, table_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(resumed), "--format", table_format, "--out", str(out)]) == 0
    assert "rows of" in capsys.readouterr().out
    if table_format == "parquet":
        made = pq.read_table(out / "expert_load.parquet").to_pandas()
    elif table_format == "csv":
        made = pd.read_csv(out / "expert_load.csv")
        made["counts"] = made["counts"].map(json.loads)
    else:
        with duckdb.connect(str(out / "run.duckdb"), read_only=True) as connection:
            made = connection.execute("SELECT * FROM expert_load").df()
    assert len(made) == len(STEPS) * L, "a step trained twice counts once"
    with open_run(resumed) as store:
        for step in STEPS:
            seen = load_matrix(store, step)
            rows = made[made["step"] == step].sort_values("layer")
            assert [c for counts in rows["counts"] for c in counts] == seen["count"].tolist()
    assert not list(tmp_path.glob(".*")), "nothing hidden is left"


def test_an_exported_database_opens_as_a_run(resumed: Path, tmp_path: Path) -> None:
    with open_run(resumed) as store:
        export.export_run(store, tmp_path / "all", "duckdb")
        export.export_run(store, tmp_path / "loads", "duckdb", ["expert_load"])
        expected = load_matrix(store)
        flow = token_flow(store, 3, 0)
    with open_run(tmp_path / "all" / "run.duckdb") as again:
        pd.testing.assert_frame_equal(load_matrix(again), expected)
        pd.testing.assert_frame_equal(token_flow(again, 3, 0), flow)
    with open_run(tmp_path / "loads" / "run.duckdb") as part:
        pd.testing.assert_frame_equal(load_matrix(part), expected)
        assert token_flow(part, 3, 0).empty


def test_a_packed_run_exports_the_same(resumed: Path, tmp_path: Path) -> None:
    path = new_run(tmp_path / "packed")
    writer = SegmentWriter(path, flush_seconds=1e9)
    steps = write_steps(writer, range(2))
    writer.write(event(2, "ended"))
    writer.close()
    pack_run(path)
    with open_run(path) as store:
        made = export.export_run(store, tmp_path / "out", "parquet", ["decisions", "vocab"])
    assert made.rows["decisions"] == sum(step.tokens for step in steps) * L * K
    table = pq.read_table(tmp_path / "out" / "decisions.parquet").to_pandas()
    first = table[(table["step"] == 0) & (table["layer"] == 1)]
    counts = first.groupby("expert").size().reindex(range(EXPERTS[1]), fill_value=0)
    assert counts.tolist() == steps[0].counts_LE[1, : EXPERTS[1]].tolist()


def test_nothing_is_overwritten_and_unknown_tables_are_named(
    resumed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert main(["export", str(resumed), str(tmp_path / "out"), "--format", "csv"]) == 1
    assert "is not overwritten" in capsys.readouterr().err
    assert main(["export", str(resumed), "--format", "csv", "--tables", "loads", "--out", "x"]) == 1
    assert "no table loads; a run has" in capsys.readouterr().err
    assert main(["export", str(resumed), "--tables", "routing", "--out", "x"]) == 1
    assert "--tables goes with" in capsys.readouterr().err


def test_a_broken_export_leaves_nothing(
    resumed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(table: str, done: int, total: int) -> None:
        if table == "metrics":
            raise MoevizError("the disk is gone")

    with open_run(resumed) as store, pytest.raises(MoevizError, match="the disk is gone"):
        export.export_run(store, tmp_path / "out", "parquet", progress=broken)
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_all_rows(resumed: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with open_run(resumed) as store:
        made = export.export_run(
            store, tmp_path / "out", "parquet", progress=lambda *facts: told.append(facts)
        )
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2] == sum(made.rows.values())
    assert set(made.rows) == {*TABLES, "vocab"}
