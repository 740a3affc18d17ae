"""One folder for what is built once and used often: corpora, tokenizers, token shards.

Every entry is made in a temporary folder beside its final place and renamed when it is complete, so a reader
never meets half an entry, a crash leaves nothing that looks finished, and several builders (ranks, tests) can
work at the same time: the first one to rename wins and the others throw their copy away.

    cache_folder() -> Path                          MOEVIZ_CACHE, XDG_CACHE_HOME/moeviz or ~/.cache/moeviz
    cached(kind, key, build, root=None) -> Path     the finished folder, built if it was not there
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from moeviz.errors import MoevizError

log = logging.getLogger("moeviz.data")

_ABANDONED_SECONDS = 24 * 3600.0
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


def cache_folder() -> Path:
    """Where built data is kept; nothing is created."""
    if chosen := os.environ.get("MOEVIZ_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moeviz"


def digest(config: Any) -> str:
    """Twenty hex digits of the sha256 of a JSON value: the key of a cache entry."""
    return hashlib.sha256(orjson.dumps(config, option=orjson.OPT_SORT_KEYS)).hexdigest()[:20]


def cached(kind: str, key: str, build: Callable[[Path], None], *, root: Path | None = None) -> Path:
    """The folder `root/kind/key`, filled by `build(folder)` if it does not exist yet.

    Raises:
        MoevizError: the cache cannot be written; says where and what to do.
    """
    target = (root or cache_folder()) / kind / key
    if target.is_dir():
        return target
    log.info("building %s in %s", kind, target)
    with writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent)
        work = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".tmp", dir=target.parent))
        try:
            build(work)
            _publish(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path` into one sentence with a remedy.

    Raises:
        MoevizError: the disk is full, or the place is read-only or not permitted.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
        ):
            raise
        raise MoevizError(
            f"cannot write {path}: {error.strerror}; free space, or point MOEVIZ_CACHE at another folder"
        ) from error


def _publish(work: Path, target: Path) -> None:
    work.chmod(0o755)
    try:
        work.rename(target)
    except OSError as error:
        if error.errno not in _TAKEN or not target.is_dir():
            raise


def _remove_abandoned(folder: Path) -> None:
    """Temporary folders of builders that died more than a day ago."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
