"""Which run to show: the one that was named, or the newest of a folder.

Named by `-- --run PATH` after `streamlit run dashboards/app.py`, by MOEVIZ_RUN, or not at all: then ./runs is looked
at. The address of a page carries only the run's folder name, never a path.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moeviz.store.catalog import RUNS_FOLDER, find_runs, resolve_run


class Runs(NamedTuple):
    """Runs to pick from."""

    paths: dict[str, Path]
    """Folder name -> path, newest first."""
    first: str
    """The one to open with."""


def asked_run(argv: Sequence[str] | None = None) -> str | None:
    """What the command line or the environment names; None for neither."""
    parser = argparse.ArgumentParser(prog="streamlit run dashboards/app.py --", allow_abbrev=False)
    parser.add_argument("--run", default=os.environ.get("MOEVIZ_RUN") or None)
    return parser.parse_known_args(sys.argv[1:] if argv is None else argv)[0].run


def available(asked: str | None) -> Runs:
    """The run that was asked for and those beside it.

    Raises:
        RunNotFoundError, CorruptRunError: nothing to show; the message says how to make a run.
    """
    first = resolve_run(asked).resolve()
    if first.is_file():
        return Runs({first.name: first}, first.name)
    beside = {path.name: path.resolve() for path, _ in find_runs(first.parent)}
    return Runs(beside | {first.name: first}, first.name)


__all__ = ["RUNS_FOLDER", "Runs", "asked_run", "available"]
