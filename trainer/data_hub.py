"""Data sets of the Hugging Face hub, by name: streamed once into the cache, read from there ever after.

    hf:NAME[:CONFIG][@DOCUMENTS]        hf:HuggingFaceFW/fineweb-edu:sample-10BT@50000, hf:codeparrot/codeparrot-clean

A stream may end early, be cut, or begin again. What has arrived is kept in parts, so a cut costs nothing: the same
command goes on behind the last document. A stream that only repeats what it brought is ended there.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from moeviz.errors import MoevizError, require
from trainer.corpus.documents import document_id
from trainer.data_cache import cache_folder, digest, writable
from trainer.data_lines import open_lines
from trainer.data_progress import Advance, progress
from trainer.data_sources import FileSource, LabelledFile, text_of

log = logging.getLogger("moeviz.data")

PREFIX = "hf:"
_PATTERN = re.compile(r"hf:(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<documents>\d+))?")
_DEFAULT_DOCUMENTS = 100_000
_PART_ROWS = 2_000
_FEWEST_REPEATS = 1_000
"""A stream counts as repeating after as many copies in a row as it had documents, and this many at least."""
_DONE = "done.json"

Rows = Callable[[int], Iterable[Mapping[str, Any]]]
"""Rows of a stream from number n on."""


@dataclass(frozen=True)
class HubName:
    """What `hf:NAME:CONFIG@DOCUMENTS` says."""

    name: str
    config: str | None
    documents: int
    """At most so many are taken."""

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Raises MoevizError for anything else."""
        match = _PATTERN.fullmatch(text)
        if match is None or not int(match["documents"] or 1):
            raise MoevizError(
                f"{text!r} is not hf:NAME[:CONFIG][@DOCUMENTS]; hf:roneneldan/TinyStories@20000 is"
            )
        return cls(match["name"], match["config"], int(match["documents"] or _DEFAULT_DOCUMENTS))

    @property
    def domain(self) -> str:
        return self.name.rstrip("/").rpartition("/")[2]

    def rows(self, skip: int) -> Iterable[Mapping[str, Any]]:
        """The training rows from number `skip` on, as they arrive."""
        datasets = require("datasets", "hub", f"the source hf:{self.name}")
        try:
            stream = datasets.load_dataset(self.name, self.config, split="train", streaming=True)
        except Exception as error:  # the hub's client has a dozen kinds of its own
            raise MoevizError(
                f"the data set {self.name} cannot be opened ({type(error).__name__}: {error}); check its name, its "
                "configuration (hf:NAME:CONFIG) and the network, or download it and name its files"
            ) from error
        rows: Iterable[Mapping[str, Any]] = stream.skip(skip) if skip else stream
        return rows


def hub_source(text: str, *, quiet: bool = False, root: Path | None = None) -> FileSource:
    """The documents of a data set of the hub, fetched as far as they are not here yet.

    Raises:
        MoevizError: no such data set, a stream that was cut (what came is kept), rows without text, a full disk.
    """
    wanted = HubName.parse(text)
    folder = (root or cache_folder()) / "hub" / digest([wanted.name, wanted.config, wanted.documents])
    with progress(f"fetching {wanted.name}", total=wanted.documents, unit="items", quiet=quiet) as advance:
        fetch(folder, wanted.rows, wanted.documents, text, advance)
    return FileSource(tuple(LabelledFile(path, wanted.domain) for path in _parts(folder)))


def fetch(
    folder: Path, rows: Rows, documents: int, name: str, advance: Advance = lambda amount: None
) -> None:
    """Fill a folder with parts of a stream, going on behind those that are there.

    Args:
        folder: where parts are kept; made if needed.
        rows: the stream.
        documents: how many different ones are wanted.
        name: of the stream, for messages.
        advance: told how many documents came.

    Raises:
        MoevizError: see `hub_source`.
    """
    if (folder / _DONE).exists():
        return
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    spool = _Spool(folder, name)
    advance(len(spool.seen))
    try:
        stream = iter(rows(spool.rows_read))
        while len(spool.seen) < documents and not spool.repeats:
            some: list[str] = []
            try:
                some.extend(_texts(islice(stream, _PART_ROWS), spool))
            finally:
                if some:
                    spool.keep(some, documents, advance)
            if not some:
                break
    except MoevizError:
        raise
    except Exception as error:  # whatever the network raises; what came before it was kept
        raise MoevizError(
            f"the stream of {name} was cut after {len(spool.seen)} documents ({type(error).__name__}: {error}); "
            "they are kept: run the same command again to go on"
        ) from error
    if not spool.seen:
        raise MoevizError(f"the stream of {name} brought no document with any text; check its name")
    if spool.repeats:
        log.warning("the stream of %s repeats itself after %d documents: ended there", name, len(spool.seen))
    elif len(spool.seen) < documents:
        log.warning("the stream of %s ended after %d of %d documents", name, len(spool.seen), documents)
    with writable(folder):
        (folder / _DONE).write_bytes(orjson.dumps({"documents": len(spool.seen), "rows": spool.rows_read}))


def _texts(rows: Iterable[Mapping[str, Any]], spool: _Spool) -> Iterator[str]:
    for row in rows:
        text = text_of(row)
        if text is None:
            raise MoevizError(
                f"a row of {spool.name} has no text (found: {', '.join(row)}); save the data set as JSON Lines with "
                "a field 'text', and name those files"
            )
        yield text


class _Spool:
    """The parts of one stream on disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.seen: set[str] = set()
        self.rows_read = self.repeated = 0
        for part in _parts(folder):
            self.seen |= {document_id(orjson.loads(line)["text"]) for line in open_lines(part)}
            self.rows_read += int(part.name.split("-")[2])

    @property
    def repeats(self) -> bool:
        return self.repeated >= max(_FEWEST_REPEATS, len(self.seen))

    def keep(self, texts: list[str], documents: int, advance: Advance) -> None:
        """Write what is new in some rows as one part, whole or not at all."""
        new: list[str] = []
        for text in texts:
            name = document_id(text)
            self.repeated = self.repeated + 1 if name in self.seen else 0
            if text.strip() and not self.repeated and len(self.seen) < documents:
                self.seen.add(name)
                new.append(text)
        self.rows_read += len(texts)
        number = len(_parts(self.folder))
        target = self.folder / f"part-{number:05d}-{len(texts)}-rows.jsonl.zst"
        with writable(target):
            work = target.with_name(f".{target.name}.{os.getpid()}")
            with pa.CompressedOutputStream(str(work), "zstd") as file:
                for text in new:
                    file.write(orjson.dumps({"text": text}) + b"\n")
            work.replace(target)
        advance(len(new))


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.jsonl.zst")) if folder.is_dir() else []
