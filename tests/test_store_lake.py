"""A lake says what its runs say, row for row, whatever was merged, resumed, packed or cleaned up meanwhile."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from lake_machine import LakeMachine
from store_runs import new_run, write_steps

from moeviz.cli import main
from moeviz.errors import MoevizError
from moeviz.store import lake_catalog
from moeviz.store.compact import Rules, compact_run
from moeviz.store.lake_catalog import load_extension, packaged_extension, parse_catalog
from moeviz.store.pack import pack_run
from moeviz.store.reader import open_run
from moeviz.store.run import resume_run
from moeviz.store.schema import TABLES
from moeviz.store.writer import SegmentWriter

ROOT = Path(__file__).parent.parent
MERGE_NOW = Rules(fan_in=3, most=4, delay_seconds=-1.0, grace_seconds=0.0)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LakeMachine]:
    """A process with the pins of the extra `lake`, in this Python or beside it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if packaged_extension("ducklake") is None:
        env["PYTHONPATH"] = os.pathsep.join([str(installed_pins()), str(ROOT)])
    else:
        env["PYTHONPATH"] = str(ROOT)
    machine = LakeMachine([sys.executable], env)
    yield machine
    machine.close()


def installed_pins() -> Path:
    """A folder with the packages of the extra `lake` alone, kept for the next time; skips where pip cannot get them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = project["project"]["optional-dependencies"]["lake"]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moeviz-tests"
    folder = cache / f"lake-{sys.version_info.minor}-{hashlib.sha256(repr(pins).encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            temporary = Path(tempfile.mkdtemp(dir=cache))
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--quiet"]
            try:
                done = subprocess.run(
                    [*pip, "--target", temporary, *pins], capture_output=True, text=True, timeout=240
                )
            except subprocess.TimeoutExpired:
                pytest.skip("pip did not get the packages of the extra `lake` in four minutes")
            if done.returncode:
                shutil.rmtree(temporary)
                last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
                pytest.skip(f"the extra `lake` cannot be installed here: {last}")
            temporary.rename(folder)
    return folder


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Address of a Postgres server of this test's own, on a socket."""
    found = [shutil.which("initdb"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    programs = [Path(one).resolve().parent for one in found if one]
    if not programs:
        pytest.skip("no Postgres here: initdb is neither on PATH nor under /usr/lib/postgresql")
    folder = Path(tempfile.mkdtemp(prefix="moeviz-pg-", dir="/tmp"))
    server: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    if os.geteuid() == 0:  # Postgres refuses to run as root
        names = {user.pw_name: user for user in pwd.getpwall()}
        user = names.get("postgres") or names["nobody"]
        os.chown(folder, user.pw_uid, user.pw_gid)
        server |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data, control = str(folder / "data"), str(programs[-1] / "pg_ctl")
    options = f"-c listen_addresses= -c fsync=off -k {folder}"
    try:
        create = [programs[-1] / "initdb", "-D", data, "-A", "trust", "-U", "moeviz", "--no-sync"]
        subprocess.run(create, check=True, timeout=120, **server)
        log = str(folder / "log")
        subprocess.run(
            [control, "-D", data, "-o", options, "-l", log, "-w", "start"], check=True, timeout=120, **server
        )
        yield f"postgresql://moeviz:hidden-word@/postgres?host={folder}"
    finally:
        subprocess.run([control, "-D", data, "-m", "immediate", "stop"], timeout=60, **server)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:{tmp_path / 'lake.sqlite'}"
    url = request.getfixturevalue("postgres")
    request.getfixturevalue("machine")  # skips before a database is made
    base = f"test_{tmp_path.name}"[:60].lower().replace("-", "_").replace("[", "").replace("]", "")
    with_base = url.replace("/postgres?", f"/{base}?")
    psql = [Path(shutil.which("psql") or "psql"), url, "-q", "-c", f'CREATE DATABASE "{base}"']
    subprocess.run(psql, check=True, capture_output=True, timeout=60)
    return with_base


def in_the_run(run: Path) -> dict[str, list[Any]]:
    """What the run itself says, by its own reader: rows of each table, and its decisions."""
    with open_run(run) as store:
        asked = {**{table: f"SELECT count(*) FROM {table}" for table in TABLES}, "sums": SUMS, "steps": STEPS}
        return {
            name: [list(row) for row in store.sql(sql).to_numpy().tolist()] for name, sql in asked.items()
        }


SUMS = (
    "SELECT count(*)::INT n, sum(step * 7 + layer * 3 + seq + pos + slot)::INT a, sum(expert * (step + 1))::INT b "
    "FROM decisions"
)
STEPS = "SELECT step, layer, list_sum(counts)::INT n, tokens FROM expert_load ORDER BY ALL"


def in_the_lake(machine: LakeMachine, catalog: str, schema: str, **options: str) -> dict[str, list[Any]]:
    asked = {**{table: f"SELECT count(*) FROM {table}" for table in TABLES}, "sums": SUMS, "steps": STEPS}
    rows = machine.sql(catalog, f"USE elsewhere.{schema}", *asked.values(), **options)
    return dict(zip(asked, rows[1:], strict=True))


def test_a_lake_follows_its_runs(machine: LakeMachine, catalog: str, tmp_path: Path) -> None:
    run = new_run(tmp_path / "runs" / "mine-1")

    def register(*words: object) -> str:
        status, out, err = machine.moeviz("lake", run, "--catalog", catalog, *words)
        assert status == 0, err
        assert "hidden-word" not in out + err
        return out

    writer = SegmentWriter(run, sidecar=False)
    write_steps(writer, range(4))
    assert " 0 replaced; " in register()
    assert in_the_lake(machine, catalog, "mine_1") == in_the_run(run)
    snapshots = machine.sql(catalog, "SELECT count(*) FROM ducklake_snapshots('elsewhere')")
    assert "0 files added with 0 rows, 0 replaced" in register()
    assert machine.sql(catalog, "SELECT count(*) FROM ducklake_snapshots('elsewhere')") == snapshots

    write_steps(writer, range(4, 6))
    out = register()  # only what is new: two steps' files, one of each table that has rows
    assert f"{2 * 6} files added" in out
    assert " 0 replaced; " in out
    assert compact_run(run, MERGE_NOW).merged > 0
    assert compact_run(run, MERGE_NOW, now=time.time() + 90).deleted > 0
    assert " 0 replaced; " not in register()
    assert in_the_lake(machine, catalog, "mine_1") == in_the_run(run)
    writer.close()

    resume_run(run, 3)  # in the middle of a merged file: rows 3 to 5 count no more
    writer = SegmentWriter(run, sidecar=False)
    write_steps(writer, range(3, 5), seed=1)
    register()
    inside = in_the_run(run)
    assert [row[0] for row in inside["steps"]] == [step for step in range(5) for _ in range(3)]
    writer.close()

    # What the lake's own clean-up deletes was superseded, and the run never notices.
    files = sorted(run.rglob("*.parquet"))
    deleted = machine.sql(
        catalog,
        "CREATE TEMP TABLE expired AS FROM ducklake_expire_snapshots('elsewhere', "
        "older_than => now()::TIMESTAMP + INTERVAL 1 DAY)",
        "CREATE TEMP TABLE deleted AS FROM ducklake_cleanup_old_files('elsewhere', cleanup_all => true)",
        "SELECT count(*) FROM deleted",
        options="DATA_INLINING_ROW_LIMIT 0",
    )[-1]
    assert deleted[0][0] > 0
    assert sorted(run.rglob("*.parquet")) == files
    pack_run(run, force=True)
    assert in_the_lake(machine, catalog, "mine_1") == in_the_run(run) == inside  # not the lake's files
    assert " 0 replaced" not in register()
    assert "0 files added" in register()
    shutil.rmtree(run)
    assert in_the_lake(machine, catalog, "mine_1") == inside


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system where there is one: links to it are impossible."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_a_lake_holds_many_runs_and_moves(machine: LakeMachine, tmp_path: Path, other_disk: Path) -> None:
    catalog, lake, moved = f"sqlite:{tmp_path / 'lake.sqlite'}", other_disk / "files", tmp_path / "mounted"
    runs = [new_run(tmp_path / parent / "x") for parent in ("a", "b")]
    for at, run in enumerate(runs):
        writer = SegmentWriter(run, sidecar=False)
        write_steps(writer, range(at + 1), seed=at)
        writer.close()
    status, _, err = machine.moeviz("lake", runs[0], "--catalog", catalog, "--data-path", lake)
    assert status == 0
    assert ("files take space of their own" in err) == (lake.stat().st_dev != tmp_path.stat().st_dev)
    status, _, err = machine.moeviz("lake", runs[1], "--catalog", catalog)
    assert status == 1
    assert "the lake has another x; give this run another name with --name" in err
    assert machine.moeviz("lake", runs[1], "--catalog", catalog, "--name", "y")[0] == 0
    shutil.move(lake, moved)
    status, _, err = machine.moeviz("lake", runs[1], "--catalog", catalog)
    assert status == 1
    assert "give --data-path" in err
    status, out, _ = machine.moeviz("lake", runs[1], "--catalog", catalog, "--data-path", moved)
    assert f"schema y of {catalog}: 0 files added" in out
    there = f"READ_ONLY, DATA_PATH '{moved}/', OVERRIDE_DATA_PATH true"
    for schema, run in zip("xy", runs, strict=True):
        assert in_the_lake(machine, catalog, schema, options=there) == in_the_run(run)
    counts, names = machine.sql(
        catalog,
        "SELECT run, count(DISTINCT step) FROM elsewhere.decisions GROUP BY 1 ORDER BY 1",
        "SELECT run, path FROM elsewhere.runs ORDER BY run",
        options=there,
    )
    assert counts == [["x", 1], ["y", 2]]
    assert names == [["x", str(runs[0])], ["y", str(runs[1])]]


@pytest.mark.parametrize("catalog", ["postgres"], indirect=True)
def test_registrations_at_the_same_time_add_a_file_once(
    machine: LakeMachine, catalog: str, tmp_path: Path
) -> None:
    runs = [new_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        writer = SegmentWriter(run, sidecar=False)
        write_steps(writer, range(2))
        writer.close()
    assert machine.moeviz("lake", runs[0], "--catalog", catalog)[0] == 0
    writer = SegmentWriter(runs[0], sidecar=False)
    write_steps(writer, range(2, 3))
    assert machine.at_once([(run, catalog) for run in (*runs, runs[0])]) == [""] * 3
    writer.close()
    for run in runs:
        assert in_the_lake(machine, catalog, run.name) == in_the_run(run)


@pytest.mark.parametrize(
    ("url", "label", "extension"),
    [
        (
            "postgresql://me:s3cret@db:5432/lake",
            "postgres:postgresql://me:***@db:5432/lake",
            "postgres_scanner",
        ),
        ("postgres://me@db/lake", "postgres:postgres://me@db/lake", "postgres_scanner"),
        (
            "postgres:host=db password=s3cret user=me",
            "postgres:host=db password=*** user=me",
            "postgres_scanner",
        ),
        ("sqlite:/tmp/x.any", "sqlite:/tmp/x.any", "sqlite_scanner"),
        ("sqlite:///tmp/x.db", "sqlite:/tmp/x.db", "sqlite_scanner"),
        ("/tmp/x.sqlite", "sqlite:/tmp/x.sqlite", "sqlite_scanner"),
    ],
)
def test_addresses_are_understood_and_passwords_kept(url: str, label: str, extension: str) -> None:
    catalog = parse_catalog(url)
    assert (catalog.label, catalog.extension) == (label, extension)
    assert catalog.masked(f"{catalog.target} refused {catalog.secret}.").startswith(f"{label} refused ")
    assert "s3cret" not in catalog.masked(url)
    assert catalog.target.endswith(url.partition("sqlite:")[2].removeprefix("//") or url)


@pytest.mark.parametrize("url", ["lake", "mysql://me@db/lake", "s3://bucket/lake", ""])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(MoevizError, match="is no catalogue; give postgresql://"):
        parse_catalog(url)


def test_a_missing_extension_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Offline:
        def execute(self, sql: str) -> None:
            raise duckdb.IOException('Failed to download extension "ducklake"\nCould not connect')

        def close(self) -> None: ...

    monkeypatch.setattr(lake_catalog, "packaged_extension", lambda name: None)
    with pytest.raises(MoevizError, match=r"no extension ducklake .* pip install \"moeviz\[lake\]\""):
        load_extension(Offline(), "ducklake")  # type: ignore[arg-type]
    monkeypatch.setattr(lake_catalog, "connect", Offline)
    run = new_run(tmp_path / "mine")
    assert main(["lake", str(run), "--catalog", f"sqlite:{tmp_path / 'x'}"]) == 1
    assert "moeviz lake: DuckDB " in capsys.readouterr().err
    assert not (tmp_path / ".lake").exists()
    assert main(["lake", str(run), "--catalog", str(tmp_path / "no" / "x.db")]) == 1
    assert "a folder that does not exist" in capsys.readouterr().err
