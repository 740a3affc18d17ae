"""`moeviz pack`: a finished run as one ordinary DuckDB file."""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class PackArguments:
    """Pack a finished run into one ordinary DuckDB file, run.duckdb, that any client reads.

    The segments are deleted after the copy was checked. A packed run can still be resumed.
    """

    run: Positional[str | None] = None
    """Run folder, or its name under ./runs; the newest run when left out."""
    keep_segments: bool = False
    """Leave the segments in place."""
    force: bool = False
    """Pack a run that did not say it ended, when you know that its process is gone."""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(PackArguments, args=argv, prog="moeviz pack", config=(tyro.conf.FlagCreatePairsOff,))
    from moeviz.store.catalog import resolve_run
    from moeviz.store.pack import pack_run

    packed = pack_run(
        resolve_run(arguments.run), keep_segments=arguments.keep_segments, force=arguments.force
    )
    freed = f", {packed.freed_bytes / 1e6:,.1f} MB of segments deleted" if packed.freed_bytes else ""
    print(
        f"{packed.path}: {sum(packed.rows.values()):,} rows in {packed.bytes / 1e6:,.1f} MB, "
        f"{packed.seconds:.1f} s{freed}"
    )
    return 0
