"""`moeviz lake`: put a run into a DuckLake catalogue, for queries from other machines."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import FlagCreatePairsOff, Positional

from moeviz.errors import MoevizError


@dataclass(frozen=True, kw_only=True)
class LakeArguments:
    """Register what a run holds in a DuckLake catalogue (Postgres or SQLite), so that other machines query it.

    moeviz lake runs/mine --catalog postgresql://me@db/lake --data-path /shared/lake

    moeviz lake runs/mine --catalog sqlite:lake.sqlite

    Needs DuckDB's ducklake extension: pip install "moeviz[lake]" brings it with the DuckDB that it is built for.
    Call it as often as you like, also while the run is written: only what is new is added, files that were merged
    meanwhile are replaced. The files are hard links in --data-path, or copies where that is another file system;
    the run itself is never touched. A run is a schema of the lake; the views in `main` hold all runs, with a
    column `run`. On another machine that mounts the same folder, in any DuckDB:

    INSTALL ducklake; INSTALL postgres;

    ATTACH 'ducklake:postgres:postgresql://me@db/lake' AS lake (READ_ONLY);

    SELECT run, step, avg(entropy_nats) FROM lake.expert_load GROUP BY ALL ORDER BY run, step;

    SELECT expert, count(*) FROM lake.mine.decisions WHERE layer = 3 GROUP BY expert;

    If it is mounted elsewhere there: (READ_ONLY, DATA_PATH '/its/mount/', OVERRIDE_DATA_PATH true).
    """

    run: Positional[Path | None] = None
    """A run folder, or a name under ./runs; the newest run there when left out."""
    catalog: str
    """postgresql://USER@HOST:PORT/DATABASE, postgres:host=... dbname=..., or sqlite:FILE. PGPASSWORD works."""
    name: str | None = None
    """Schema of the run in the lake; its name when left out."""
    data_path: Path | None = None
    """Folder of the lake's files: .lake beside the run for a new catalogue, or where this machine mounts it."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0."""
    import tyro

    arguments = tyro.cli(LakeArguments, args=argv, prog="moeviz lake", config=(FlagCreatePairsOff,))
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from moeviz.store.catalog import resolve_run
    from moeviz.store.lake import register_run

    path = resolve_run(None if arguments.run is None else str(arguments.run))
    if path.is_file():
        raise MoevizError(f"{path} is a file without its run folder; give the folder of a run")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("register")
        made = register_run(
            path,
            arguments.catalog,
            name=arguments.name,
            files=arguments.data_path,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if made.copied:
        print(f"moeviz lake: {made.copied} files take space of their own in {made.files}", file=sys.stderr)
    print(
        f"{path} is schema {made.schema} of {made.label}: {made.added:,} files added with {made.rows:,} rows, "
        f"{made.removed:,} replaced; the files are in {made.files}"
    )
    print(f"  ATTACH 'ducklake:{made.label}' AS lake (READ_ONLY); FROM lake.{made.schema}.expert_load;")
    return 0
