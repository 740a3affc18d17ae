"""Finding runs: from what a person typed to a run folder, and the list of runs in a folder."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from moeviz.errors import CorruptRunError, RunNotFoundError
from moeviz.store.run import DATABASE_FILE, RUN_FILE, RunInfo, read_info

RUNS_FOLDER = "runs"
"""Where runs are kept unless a path says otherwise."""


def locate_run(path: str | Path) -> Path:
    """The run that `path` names: a run folder, a folder of runs (its newest), or a packed file.

    Raises:
        RunNotFoundError: nothing of that kind; names the runs nearby.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".duckdb":
        return path.parent if (path.parent / RUN_FILE).exists() and path.name == DATABASE_FILE else path
    if (path / RUN_FILE).exists():
        return path
    if path.is_dir():
        runs = find_runs(path)
        if runs:
            return runs[0][0]
        if (path / DATABASE_FILE).exists():
            raise CorruptRunError(f"{path} has lost its {RUN_FILE}; restore it from a copy of the run")
    raise RunNotFoundError(f"no run at {path}; {_nearby(path)}")


def resolve_run(text: str | None, runs_folder: str | Path = RUNS_FOLDER) -> Path:
    """What the command line takes as RUN: a path, a name under ./runs, or nothing for the newest there."""
    if text is None:
        return locate_run(runs_folder)
    path = Path(text)
    named = Path(runs_folder) / text
    return locate_run(named if not path.exists() and named.exists() else path)


def find_runs(folder: str | Path) -> list[tuple[Path, RunInfo]]:
    """Runs directly in `folder`, newest first. Folders with an unreadable run.json are left out."""
    found: list[tuple[Path, RunInfo]] = []
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        if (path / RUN_FILE).exists():
            try:
                found.append((path, read_info(path)))
            except CorruptRunError:
                continue
    return sorted(found, key=lambda run: run[1].created, reverse=True)


def _nearby(path: Path) -> str:
    """A hint: runs with a similar name, or those beside the path, or how to make one."""
    names = {}
    for folder in dict.fromkeys((path.parent, Path(RUNS_FOLDER))):
        names.update({run.name: str(run) for run, _ in find_runs(folder)})
    close = get_close_matches(path.name, names, n=3, cutoff=0.5) or list(names)[:3]
    if close:
        return "did you mean " + " or ".join(names[name] for name in close) + "?"
    return "`moeviz demo` or `moeviz train --log-routing` makes one, `moeviz runs FOLDER` lists a folder's"
