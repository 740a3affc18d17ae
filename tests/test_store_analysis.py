"""What an analysis found survives storing and packing; runs from before the table existed are whole and empty of it."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest
from dashboards_run import model_info

from moeviz.records import AnalysisRecord, AnalysisValue
from moeviz.store import open_run, queries
from moeviz.store.pack import pack_run
from moeviz.store.run import RunInfo, create_run, resume_run
from moeviz.store.writer import SegmentWriter

VALUES = (
    AnalysisValue(part="run", layer=-1, index=-1, name="tokens", value=90.0),
    AnalysisValue(part="layer", layer=1, index=-1, name="mi_token", value=0.5, null_mean=0.4, null_sd=0.05),
    AnalysisValue(
        part="expert",
        layer=1,
        index=3,
        name="domain_spec",
        value=0.9,
        null_mean=0.2,
        null_sd=0.1,
        label="code",
    ),
)


def written(path: Path) -> Path:
    create_run(path, RunInfo(name="probe", model=model_info()))
    writer = SegmentWriter(path)
    writer.write(AnalysisRecord(step=0, values=VALUES))
    writer.close()
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_values_come_back_beside_their_nulls(tmp_path: Path, packed: bool) -> None:
    run = written(tmp_path / "run")
    if packed:
        pack_run(run, force=True)
    with open_run(run) as store:
        found = queries.analysis(store).set_index("name")
        one = queries.analysis(store, part="expert", layer=1)
        none = queries.analysis(store, layer=0)
    assert len(found) == 3
    assert found.loc["tokens", ["layer", "unit", "null_mean"]].isna().all()
    assert found["hidden"].to_dict() == {"tokens": False, "mi_token": True, "domain_spec": False}
    assert one.loc[0, ["unit", "label", "value", "null_sd"]].tolist() == [3, "code", 0.9, 0.1]
    assert none.empty


def test_segments_from_before_the_table_are_whole(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    for file in (run / "analysis").iterdir():
        file.unlink()
    (run / "analysis").rmdir()
    with open_run(run) as store:
        assert store.notes == []
        assert queries.analysis(store).empty
        assert store.sql("SELECT count(*) AS n FROM analysis")["n"][0] == 0


def test_a_file_packed_before_the_table_opens_and_resumes(tmp_path: Path) -> None:
    run = written(tmp_path / "run")
    pack_run(run, force=True)
    connection = duckdb.connect(str(run / "run.duckdb"))
    connection.execute("DROP TABLE analysis")
    connection.close()
    with open_run(run) as store:
        assert queries.analysis(store).empty
        assert store.sql("SELECT count(*) AS n FROM analysis")["n"][0] == 0
    resume_run(run, from_step=1)
    with open_run(run) as store:
        assert store.notes == []
        assert queries.analysis(store).empty
