"""Reading while another process writes, on damaged, moved and half-copied folders, and never writing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import duckdb
import numpy as np
import pytest
from store_runs import EXPERTS, K, L, N, event, new_run, write_steps

from moeviz.errors import CorruptRunError, MoevizError, RunNotFoundError
from moeviz.store import reader
from moeviz.store.queries import last_step, load_matrix
from moeviz.store.reader import open_run
from moeviz.store.run import RUN_FILE, read_info, resume_run, write_info, write_views
from moeviz.store.schema import TABLES
from moeviz.store.views import write_database
from moeviz.store.writer import SegmentWriter

TESTS = Path(__file__).parent
RECOUNT = """
    SELECT step, layer, expert, count(*) AS count FROM decisions GROUP BY ALL
    EXCEPT SELECT step, layer, expert, count FROM
    (SELECT step, layer, unnest(range(len(counts))) AS expert, unnest(counts) AS count FROM expert_load)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps in ten flushes."""
    run = new_run(tmp_path_factory.mktemp("template") / "run")
    write_steps(SegmentWriter(run), range(10))
    return run


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    """A copy of the template with views of its own."""
    shutil.copytree(template, tmp_path / "run")
    write_database(tmp_path / "run")
    return tmp_path / "run"


def test_loads_equal_a_recount_of_every_token(template: Path) -> None:
    with open_run(template) as store:
        assert store.sql(RECOUNT).empty
        total = store.sql("SELECT sum(list_sum(counts)) AS n FROM expert_load")["n"].iloc[0]
        tokens = store.sql("SELECT sum(tokens) AS n FROM expert_load WHERE layer = 0")["n"].iloc[0]
        decisions = store.sql("SELECT count(*) AS n FROM decisions")["n"].iloc[0]
    assert total == tokens * K * L == decisions


def writing(path: Path, steps: int) -> subprocess.Popen[str]:
    program = f"""
        import sys, time
        sys.path.insert(0, {str(TESTS)!r})
        from store_runs import Step
        from moeviz.store.compact import Rules, compact_run
        from moeviz.store.writer import SegmentWriter
        writer = SegmentWriter({str(path)!r}, flush_seconds=1e9)
        print("ready", flush=True)
        for step in range({steps}):
            for record in Step(step).records():
                writer.write(record)
            writer.flush()
            if step % 18 == 17:
                compact_run({str(path)!r}, Rules(delay_seconds=0.3, grace_seconds=2.0))
            time.sleep(0.01)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_hundred_looks_at_a_run_that_is_written_and_merged_see_every_step_once(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    newest_seen = -1
    with writing(path, steps=45) as process, open_run(path) as store:
        looks, grew = 0, 0
        while looks < 100 or process.poll() is None:
            steps = store.sql("SELECT step FROM expert_load WHERE layer = 1 ORDER BY step")["step"].to_numpy()
            assert steps.tolist() == list(range(len(steps)))
            newest = -1 if last_step(store) is None else last_step(store)
            assert newest >= len(steps) - 1 >= newest_seen
            if newest >= 0:
                assert (
                    store.sql("SELECT count(*) AS n FROM routing WHERE step = ?", [newest])["n"].iloc[0]
                    == L * N
                )
            looks, grew, newest_seen = looks + 1, grew + (len(steps) - 1 > newest_seen), len(steps) - 1
        assert process.wait() == 0
        assert last_step(store) == 44
        assert store.notes == []
        assert store.sql(RECOUNT).empty
    assert grew > 5, "the run grew while it was watched"


def test_a_plain_duckdb_client_sees_every_step_once_while_a_run_is_written(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    looks = 0
    with writing(path, steps=25) as process:
        while looks < 10 or process.poll() is None:
            with duckdb.connect(str(path / "run.duckdb"), read_only=True) as client:
                try:
                    rows = client.execute(
                        "SELECT step FROM expert_load WHERE layer = 1 ORDER BY step"
                    ).fetchall()
                except (
                    duckdb.IOException
                ):  # a merged file was deleted under the view: rare, and said so; ask again
                    continue
            assert [step for (step,) in rows] == list(range(len(rows)))
            looks += 1
    with duckdb.connect(str(path / "run.duckdb"), read_only=True) as client:
        assert client.execute("SELECT count(*) FROM expert_load").fetchone() == (25 * L,)
        assert client.execute(RECOUNT).fetchall() == []


def test_views_written_by_the_process_of_its_own_are_the_same(path: Path) -> None:
    (path / "run.duckdb").unlink()
    assert write_views(path)
    with duckdb.connect(str(path / "run.duckdb"), read_only=True) as client, open_run(path) as store:
        for table in [*TABLES, "decisions", "vocab"]:
            ours = store.sql(f"SELECT count(*) AS n FROM {table}")["n"].iloc[0]
            assert client.execute(f"SELECT count(*) FROM {table}").fetchone() == (ours,)


def test_a_resumed_run_shows_each_step_of_its_newest_attempt(path: Path) -> None:
    with open_run(path) as store:
        info = resume_run(path, from_step=6)
        assert (info.attempt, last_step(store)) == (1, 5)
        written = write_steps(SegmentWriter(path, flush_seconds=1e9), range(6, 8), seed=1)
        steps = store.sql("SELECT DISTINCT step FROM routing ORDER BY step")["step"].tolist()
        assert steps == [0, 1, 2, 3, 4, 5, 6, 7]
        counts = load_matrix(store, 6)["count"].tolist()
    assert counts == [
        count for layer, size in enumerate(EXPERTS) for count in written[0].counts_LE[layer, :size]
    ]
    with duckdb.connect(str(path / "run.duckdb"), read_only=True) as client:
        assert client.execute("SELECT max(step), count(*) FROM expert_load").fetchone() == (7, 8 * L)


def test_a_cut_inside_a_file_is_exact(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    write_steps(SegmentWriter(path, flush_seconds=1e9), range(10), flush_every=10)
    resume_run(path, from_step=4)
    write_steps(SegmentWriter(path, flush_seconds=1e9), range(4, 5), seed=1)
    with open_run(path) as store:
        for table in ("expert_load", "routing", "sequences", "scalars", "metrics"):
            steps = store.sql(f"SELECT step, count(*) AS n FROM {table} GROUP BY step ORDER BY step")
            assert steps["step"].tolist() == [0, 1, 2, 3, 4]
            assert steps["n"].nunique() == 1


@pytest.mark.parametrize("keep", [0, 5, 11, 400, -1])
def test_a_truncated_segment_is_skipped_and_named(path: Path, keep: int) -> None:
    victim = next(path.glob("expert_load/*-n4.4-*.parquet"))
    data = victim.read_bytes()
    victim.write_bytes(data[:keep])
    with open_run(path) as store:
        steps = store.sql("SELECT DISTINCT step FROM expert_load ORDER BY step")["step"].tolist()
        assert steps == [0, 1, 2, 4, 5, 6, 7, 8, 9]
        assert f"expert_load/{victim.name} is damaged and skipped" in store.notes
        assert len(load_matrix(store)) == sum(EXPERTS)


def test_a_segment_damaged_in_the_middle_is_found_when_it_is_read(path: Path) -> None:
    victim = next(path.glob("routing/*-n4.4-*.parquet"))
    data = bytearray(victim.read_bytes())
    data[4:-200] = bytes(len(data) - 204)
    victim.write_bytes(data)
    with open_run(path) as store:
        steps = store.sql(
            "SELECT DISTINCT step FROM (SELECT step, experts FROM routing ORDER BY experts) ORDER BY step"
        )
        assert 3 not in steps["step"].tolist()
        assert len(steps) == 9
        assert any(victim.name in note for note in store.notes)


def test_a_lost_file_is_noted_and_the_rest_is_read(path: Path) -> None:
    next(path.glob("routing/*-n4.4-*.parquet")).unlink()
    with open_run(path) as store:
        assert store.notes == ["routing: flush 4 of rank 0, attempt 0 are missing"]
        assert store.sql("SELECT count(DISTINCT step) AS n FROM routing")["n"].iloc[0] == 9


def test_a_half_copied_run_opens_with_what_is_there(path: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(path / RUN_FILE, half)
    shutil.copytree(path / "expert_load", half / "expert_load")
    with open_run(half) as store:
        assert last_step(store) == 9
        assert store.sql("FROM routing").empty
        assert store.sql("FROM vocab").empty
        assert "routing has no readable files" in store.notes


def test_a_moved_run_opens(path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "else where's"
    path.rename(moved)
    with open_run(moved) as store:
        assert last_step(store) == 9
        assert len(store.sql("FROM vocab")) == 11
    with duckdb.connect(str(moved / "run.duckdb"), read_only=True) as client:
        client.execute("SET VARIABLE moeviz_run = $place", {"place": str(moved)})
        assert client.execute("SELECT max(step) FROM expert_load").fetchone() == (9,)


def test_a_path_that_looks_like_a_partition_is_no_column(tmp_path: Path) -> None:
    path = new_run(tmp_path / "lr=0.1" / "step=5")
    write_steps(SegmentWriter(path), range(2))
    with open_run(path) as store:
        assert store.sql("SELECT step FROM scalars WHERE name = 'loss' ORDER BY step")["step"].tolist() == [
            0,
            1,
        ]
        assert "lr" not in store.sql("FROM scalars").columns
    with duckdb.connect(str(path / "run.duckdb"), read_only=True) as client:
        assert client.execute("SELECT DISTINCT step FROM scalars ORDER BY step").fetchall() == [(0,), (1,)]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("INSERT INTO routing VALUES (1)", "INSERT is refused"),
        ("DELETE FROM routing", "DELETE is refused"),
        ("CREATE TABLE mine AS SELECT 1", "CREATE is refused"),
        ("DROP VIEW routing", "DROP is refused"),
        ("COPY (SELECT 1) TO 'out.csv'", "COPY is refused"),
        ("ATTACH 'other.db'", "ATTACH is refused"),
        ("SET threads = 64", "SET is refused"),
        ("INSTALL httpfs", "LOAD is refused"),
        ("PRAGMA enable_profiling", "refused"),
        ("EXPLAIN ANALYZE INSERT INTO routing VALUES (1)", "INSERT is refused"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("", "0 statements"),
        ("SELEC 1", "syntax error"),
        ("FROM read_csv('/etc/passwd')", "read_csv() is refused"),
        ("SELECT (SELECT content FROM read_text('/etc/passwd'))", "read_text() is refused"),
        ("FROM glob('/*')", "glob() is refused"),
        ("FROM parquet_metadata('x')", "parquet_metadata() is refused"),
        ("FROM query('DROP VIEW routing')", "query() is refused"),
        ("FROM '/etc/passwd.csv'", "access to files is refused"),
        ("FROM nowhere", "the tables are routing"),
        ("SELECT nothing FROM scalars", "nothing"),
        ("PIVOT scalars ON name USING first(value)", "PIVOT"),
    ],
)
def test_sql_that_does_more_than_read_the_tables_is_refused(template: Path, query: str, reason: str) -> None:
    before = {file: file.stat().st_mtime_ns for file in template.rglob("*")}
    with open_run(template) as store, pytest.raises(MoevizError) as refusal:
        store.sql(query)
    assert reason in str(refusal.value)
    assert {file: file.stat().st_mtime_ns for file in template.rglob("*")} == before


def test_the_engine_itself_refuses_other_files_when_the_first_wall_is_passed(
    path: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    with open_run(path) as store:
        for sql in (
            f"FROM read_text('{outside}')",
            f"FROM read_text('{path}/../secret.txt')",
            f"ATTACH '{tmp_path}/x.db'",
        ):
            with pytest.raises(duckdb.Error):
                store.frame(lambda sql=sql: sql)
        with pytest.raises(duckdb.Error, match="locked"):
            store.frame(lambda: "SET enable_external_access = true")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 AS one",
        "WITH a AS (FROM scalars) SELECT count(*) AS n FROM a",
        "DESCRIBE routing",
        "SHOW TABLES",
        "SUMMARIZE scalars",
        "EXPLAIN SELECT * FROM routing WHERE step = 3",
        "EXPLAIN ANALYZE SELECT * FROM routing WHERE step = 3",
        "SELECT * FROM range(3)",
        "VALUES (1), (2)",
    ],
)
def test_sql_that_reads_is_answered(template: Path, query: str) -> None:
    with open_run(template) as store:
        assert not store.sql(query).empty


def test_parameters_are_bound_and_not_spliced(template: Path) -> None:
    with open_run(template) as store:
        rows = store.sql("SELECT count(*) AS n FROM scalars WHERE name = ?", ["loss' OR '1' = '1"])
        assert rows["n"].iloc[0] == 0
        rows = store.sql("SELECT count(*) AS n FROM scalars WHERE name = $name", {"name": "loss"})
        assert rows["n"].iloc[0] == 10


def test_reading_changes_nothing_on_disk(template: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in template.rglob("*")}
    with open_run(template) as store:
        for table in [*TABLES, "decisions", "vocab"]:
            store.sql(f"SELECT count(*) FROM {table}")
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in template.rglob("*")} == before


def test_open_run_takes_a_run_a_folder_of_runs_and_a_database(tmp_path: Path) -> None:
    old, new = new_run(tmp_path / "old", created=1.0), new_run(tmp_path / "new", created=2.0)
    for place, name in ((old, "old"), (new, "new"), (tmp_path, "new"), (old / "run.duckdb", "old")):
        with open_run(place) as store:
            assert store.info.name == name


def test_a_run_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    new_run(tmp_path / "olmo-small")
    with pytest.raises(RunNotFoundError, match=r"did you mean .*olmo-small\?"):
        open_run(tmp_path / "olmo-smal")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunNotFoundError, match="olmo-small"):
        open_run(tmp_path / "empty")
    with pytest.raises(RunNotFoundError, match="no run at"):
        open_run(tmp_path / "nowhere" / "deep")


def test_a_damaged_or_newer_description_is_an_error_with_a_remedy(path: Path) -> None:
    write_info(path, read_info(path))
    text = (path / RUN_FILE).read_text()
    (path / RUN_FILE).write_text(text.replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(CorruptRunError, match="upgrade moeviz"):
        open_run(path)
    (path / RUN_FILE).write_text(text[: len(text) // 2])
    with pytest.raises(CorruptRunError, match="restore it"):
        open_run(path)
    (path / RUN_FILE).unlink()
    with pytest.raises(CorruptRunError, match="has lost its run"):
        open_run(path)


def test_the_description_survives(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run", config={"lr": 3e-4, "nested": {"a": [1, 2]}}, tokenizer="bytes", ranks=4)
    with open_run(path) as store:
        info = store.info
    assert (info.config, info.tokenizer, info.ranks) == ({"lr": 3e-4, "nested": {"a": [1, 2]}}, "bytes", 4)
    assert info.model.layers[2].num_experts == EXPERTS[2]
    assert (info.attempt, info.attempts[0].from_step) == (0, 0)


def test_a_run_is_not_overwritten(path: Path) -> None:
    with pytest.raises(MoevizError, match="already holds a run"):
        new_run(path)


def test_a_closed_store_says_so(path: Path) -> None:
    store = open_run(path)
    store.close()
    store.close()
    with pytest.raises(MoevizError, match="is closed"):
        store.sql("SELECT 1")


def test_events_before_the_first_step_are_kept(path: Path) -> None:
    writer = SegmentWriter(path)
    writer.write(event(-1, "started"))
    writer.close()
    with open_run(path) as store:
        assert store.sql("SELECT step FROM events")["step"].tolist() == [-1]


def test_threads_take_turns(template: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with open_run(template) as store, ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda step: load_matrix(store, step)["count"].sum(), [n % 10 for n in range(64)])
        )
        expected = [int(np.sum(load_matrix(store, step)["count"])) for step in range(10)]
    assert answers == [expected[n % 10] for n in range(64)]


def test_an_answer_can_be_bounded_in_rows_and_seconds(template: Path) -> None:
    with open_run(template) as store:
        for most in (1, 5, 2500, 5000):
            rows = store.sql("SELECT i FROM range(10_000) t(i)", max_rows=most)
            assert rows["i"].tolist() == list(range(most))
        assert store.sql("SELECT 1 AS one WHERE false", max_rows=3).columns.tolist() == ["one"]
        assert len(store.sql("FROM range(7)", max_rows=100)) == 7
        with pytest.raises(MoevizError, match=r"more than 0.2 s"):
            store.sql(
                "SELECT count(*) FROM range(100_000_000) a, range(1000) b WHERE a.range % 7 = b.range",
                max_seconds=0.2,
            )
        assert store.sql("SELECT 1 AS one", max_seconds=120.0)["one"].tolist() == [1]


def test_a_folder_with_too_many_files_says_what_to_do(
    template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeviz.store.listing._MANY_FILES", 5)
    with open_run(template) as store:
        assert any(note.startswith("routing has 11 files") for note in store.notes)


def test_a_store_survives_a_change_of_the_working_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_run("run") as store:
        monkeypatch.chdir("/")
        write_steps(SegmentWriter(path), range(10, 11))
        assert last_step(store) == 10
        assert not store.sql("FROM scalars").empty


def test_a_reader_that_has_seen_many_files_connects_anew_and_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_MOST_FOOTERS", 20)
    path = new_run(tmp_path / "run")
    writer = SegmentWriter(path, sidecar=False)
    with open_run(path) as store:
        connections = []
        for first in range(0, 30, 5):
            write_steps(writer, range(first, first + 5))
            assert store.sql("SELECT count(DISTINCT step) AS n FROM expert_load")["n"].iloc[0] == first + 5
            connections.append(store._connection)
    assert len({id(connection) for connection in connections}) > 1
