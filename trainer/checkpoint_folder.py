"""A folder of files that appears at once and is checked before it is believed.

Rename is atomic, so a reader meets a finished folder or none; a crash at any moment leaves a hidden temporary
that the next save removes. Sizes and hashes of all files are in manifest.json, the last file to be written,
so damage that happens later (a truncated copy, a bad disk) is named instead of loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from moeviz.errors import MoevizError

MANIFEST_FILE = "manifest.json"
BEST = "best"
"""A link to the checkpoint with the least validation loss, where a run keeps it."""
_NAME = re.compile(r"step-(\d{8,})")


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a `checkpoints` folder, oldest step first; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Steps done, from the folder's name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def prepare(work: Path) -> None:
    """Make an empty temporary folder, and remove the ones that a killed process left beside it."""
    for leftover in work.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    work.mkdir(parents=True)


def commit(work: Path, target: Path) -> None:
    """Seal the files of `work` with a manifest, make them durable and rename the folder to `target`."""
    manifest = {str(path.relative_to(work)): [path.stat().st_size, _sha256(path)] for path in _files(work)}
    (work / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    for path in _files(work):
        _sync(path)
    _sync(work)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(old)
    work.rename(target)
    _sync(target.parent)
    discard(old)


def discard(folder: Path) -> None:
    """Remove a folder if it is there; under a hidden name first: half of one is no checkpoint."""
    if not folder.exists():
        return
    if not folder.name.startswith("."):
        folder = folder.rename(folder.with_name(f".{folder.name}.old"))
    shutil.rmtree(folder, ignore_errors=True)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the `count` newest checkpoints, and the best one."""
    best = (folder / BEST).resolve()
    for path in list_checkpoints(folder)[:-count]:
        if path.resolve() != best:
            discard(path)


def mark_best(checkpoint: Path) -> None:
    """Point `best` to a checkpoint, at once."""
    link = checkpoint.with_name(BEST)
    fresh = link.with_name(f".{BEST}.tmp")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(checkpoint.name)
    fresh.replace(link)


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps: training went back before them, so they are no longer the newest.

    Returns:
        Their new paths, `superseded-step-N`, of which the trainer removes none.
    """
    moved = []
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"superseded-{path.name}")
            discard(aside)
            moved.append(path.rename(aside))
    if (folder / BEST).is_symlink() and not (folder / BEST).exists():
        (folder / BEST).unlink()
    return moved


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        MoevizError: no checkpoint at `path`, or a file of it is missing, cut short or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
        expected = {name: (int(size), str(digest)) for name, (size, digest) in manifest.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise MoevizError(
            f"no checkpoint at {path}: it has no {MANIFEST_FILE}; name a step-N folder"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{MANIFEST_FILE} cannot be read ({error})") from error
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != size:
            raise _damaged(path, f"{name} has {file.stat().st_size} bytes instead of {size}")
        if _sha256(file) != digest:
            raise _damaged(path, f"{name} does not match its checksum")


def _damaged(path: Path, reason: str) -> MoevizError:
    others = [other for other in list_checkpoints(path.parent) if step_of(other) < _step_or_end(path)]
    remedy = f"the one before is {others[-1]}" if others else "there is no earlier one"
    return MoevizError(f"checkpoint {path} is damaged: {reason}; {remedy}")


def _step_or_end(path: Path) -> float:
    return step_of(path) if _NAME.fullmatch(path.name) else float("inf")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
