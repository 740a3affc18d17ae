"""Token shards: one flat array of ids per (split, domain) on disk, documents ended by EOS, read by memory
map.

The source is read three times, so that a large one never has to fit in memory: to decide which documents are
held out (a function of their content), to take the fingerprints of those, and to tokenise. The last pass writes
training tokens as they come and remembers which fingerprints of held-out documents it met: a held-out document
that is mostly in the training text is dropped, never moved.

    build_shards(source, tokenizer, validation_fraction=0.05) -> Shards      in the cache
    write_shards(folder, source, tokenizer, ...), load_shards(folder) -> Shards
    Shards.tokens(split, domain) -> (N,) uint16 or uint32, memory-mapped
    Shards.read(split, domain, start, stop) -> the same, compared with its checksums first
    Shards.starts(split, domain) -> (documents,) int64, the offset of each document's first token
    Shards.domains, .vocab_size, .eos_id, .num_tokens(split, domain=None), .path
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from moeviz.errors import MoevizError
from trainer.corpus import SPLITS, Document, Split
from trainer.corpus.documents import choose_held_out, without_copies
from trainer.corpus.overlap import NEAR_COPY, Found, fingerprints
from trainer.data_cache import cached, digest
from trainer.data_checksums import Checks, chunk_sums
from trainer.data_progress import Advance, progress
from trainer.data_sources import Source
from trainer.tokenizer import Tokenizer

log = logging.getLogger("moeviz.data")

_FORMAT = "moeviz-shards/2"
MANIFEST = "manifest.json"
_CHECKED_AT_ONCE = 32_000_000
"""Bytes of shards that are compared with their checksums when they are opened; larger ones as they are read."""
_BATCH_CHARS = 1 << 20
_FLUSH_TOKENS = 1 << 20
_MOST_DOMAINS = 256

Part = tuple[Split, str]


@dataclass(frozen=True)
class Shards:
    """Tokens of every split and domain."""

    arrays: Mapping[Part, tuple[np.ndarray, np.ndarray]]
    """(split, domain) -> tokens (N,), document starts (documents,)."""
    vocab_size: int
    eos_id: int | None
    key: str
    """Changes when the tokens do."""
    path: Path | None = None
    """The cache entry or prepared folder; None for token files that are read where they are."""
    checks: Mapping[Part, Checks] = field(default_factory=dict)
    """Checksums of the parts that have some."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain, in the order of the source."""
        return tuple(dict.fromkeys(domain for _, domain in self.arrays))

    def tokens(self, split: Split, domain: str) -> np.ndarray:
        """(N,) ids; empty when the domain has none on this side."""
        return (
            self.arrays[split, domain][0] if (split, domain) in self.arrays else np.empty(0, dtype=np.uint16)
        )

    def read(self, split: Split, domain: str, start: int, stop: int) -> np.ndarray:
        """Ids `start` to `stop`, as far as there are some.

        Raises:
            MoevizError: they do not match their checksum.
        """
        tokens = self.tokens(split, domain)
        if (split, domain) in self.checks:
            self.checks[split, domain].verify(tokens, start, stop)
        return tokens[start:stop]

    def starts(self, split: Split, domain: str) -> np.ndarray:
        """(documents,) int64 offsets into `tokens`."""
        return (
            self.arrays[split, domain][1] if (split, domain) in self.arrays else np.empty(0, dtype=np.int64)
        )

    def only(self, side: Split) -> dict[Part, tuple[np.ndarray, np.ndarray]]:
        """The arrays of one side; of the training side under the name of the other where that has none."""
        arrays = {part: value for part, value in self.arrays.items() if part[0] == side}
        if not arrays:
            arrays = {(side, domain): value for (_, domain), value in self.arrays.items()}
        return arrays

    def num_tokens(self, split: Split, domain: str | None = None) -> int:
        names = self.domains if domain is None else (domain,)
        return sum(len(self.tokens(split, name)) for name in names)


def build_shards(
    source: Source,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = 0.05,
    quiet: bool = False,
    workers: int | None = None,
    root: Path | None = None,
) -> Shards:
    """Shards of a source, from the cache when they are there.

    Raises:
        MoevizError: the source is empty or malformed, or the cache cannot be written.
    """
    key = shards_key(source, tokenizer, validation_fraction)

    def build(folder: Path) -> None:
        write_shards(folder, source, tokenizer, validation_fraction, quiet=quiet, workers=workers)

    return load_shards(cached("shards", key, build, root=root))


def shards_key(source: Source, tokenizer: Tokenizer, validation_fraction: float) -> str:
    """Changes when any token of the shards does."""
    return digest(
        {
            "format": _FORMAT,
            "source": source.key,
            "tokenizer": tokenizer.key,
            "validation_fraction": validation_fraction,
        }
    )


def write_shards(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    validation_fraction: float,
    *,
    quiet: bool = False,
    workers: int | None = None,
) -> None:
    """Fill an empty folder with the shards of a source.

    Args:
        folder: where they go.
        source: what is read, three times.
        tokenizer: what cuts it.
        validation_fraction: share of the documents that is held out.
        quiet: show no progress bar.
        workers: threads that tokenise; None: one for each CPU of this process. Their number changes nothing else.

    Raises:
        MoevizError: the source is empty or malformed.
    """
    _Builder(folder, source, tokenizer, validation_fraction, quiet, workers or num_cpus()).run()


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_shards(path: Path) -> Shards:
    """Shards that `write_shards` wrote.

    Raises:
        MoevizError: a file is missing, of another size than its manifest says, or does not match its checksum.
    """
    try:
        manifest = orjson.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']} instead of {_FORMAT}")
        arrays: dict[Part, tuple[np.ndarray, np.ndarray]] = {}
        checks: dict[Part, Checks] = {}
        for part in manifest["parts"]:
            name, file = (part["split"], part["domain"]), path / part["tokens"]
            expected = part["num_tokens"] * np.dtype(manifest["dtype"]).itemsize
            if file.stat().st_size != expected:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes instead of {expected}")
            tokens = np.memmap(file, dtype=manifest["dtype"], mode="r", shape=(part["num_tokens"],))
            arrays[name] = tokens, np.load(path / part["starts"])
            checks[name] = Checks(file, part["crc32"])
        shards = Shards(
            arrays, manifest["vocab_size"], manifest["eos_id"], manifest["key"], path, checks=checks
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MoevizError(
            f"the token shards in {path} are damaged ({error}); delete that folder to build them again"
        ) from error
    if sum(tokens.nbytes for tokens, _ in arrays.values()) <= _CHECKED_AT_ONCE:
        verify_shards(shards)
    return shards


def verify_shards(shards: Shards) -> None:
    """Compare every token with its checksum.

    Raises:
        MoevizError: names the file and the place of the first that differs.
    """
    for (split, domain), check in shards.checks.items():
        tokens = shards.tokens(split, domain)
        check.verify(tokens, 0, len(tokens))


class _Builder:
    """Fills one cache entry."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        tokenizer: Tokenizer,
        fraction: float,
        quiet: bool,
        workers: int,
    ) -> None:
        self.folder, self.source, self.tokenizer = folder, source, tokenizer
        self.fraction, self.quiet, self.workers = fraction, quiet, workers
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.writers: dict[Part, _Writer] = {}

    def run(self) -> None:
        held_out = choose_held_out(self._counted(), self.fraction)
        prints = {} if self.source.vetted else self._prints(held_out)
        found = Found(prints.values())
        waiting: list[tuple[Document, np.ndarray]] = []
        for document, ids in self._tokenised():
            if document.id in held_out:
                waiting.append((document, ids.astype(self.dtype)))
            else:
                self._write("train", document, ids)
                if prints:
                    found.add(fingerprints(document.text))
        copies = {name for name, own in prints.items() if found.share(own) > NEAR_COPY}
        for document, ids in waiting:
            if document.id not in copies:
                self._write("validation", document, ids)
        if waiting and len(copies) == len(waiting):
            log.warning(
                "all %d held-out documents repeat the training text: nothing to evaluate on", len(copies)
            )
        self._finish(len(copies))

    def _counted(self) -> Iterator[Document]:
        """The documents, with a refusal at the end if there were none, or too many kinds of them."""
        domains: set[str] = set()
        for document in without_copies(self.source.documents()):
            domains.add(document.domain)
            yield document
        if not domains:
            raise MoevizError(
                "the corpus is empty: no document with any text; check the path or use 'builtin'"
            )
        if len(domains) > _MOST_DOMAINS:
            raise MoevizError(
                f"{len(domains)} domains are more than {_MOST_DOMAINS}; give the documents coarser labels in 'domain'"
            )

    def _prints(self, held_out: set[str]) -> dict[str, np.ndarray]:
        return {d.id: fingerprints(d.text) for d in self.source.documents() if d.id in held_out}

    def _tokenised(self) -> Iterator[tuple[Document, np.ndarray]]:
        """Documents with their ids, in order: threads are ahead of the writer by a few megabytes."""
        waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
        with (
            progress("tokenising", total=self.source.num_bytes, quiet=self.quiet) as advance,
            ThreadPoolExecutor(self.workers, "tokenise") as pool,
        ):
            for batch in _batches(without_copies(self.source.documents())):
                texts = [document.text for document in batch]
                waiting.append((batch, pool.submit(self.tokenizer.encode_batch, texts, 1)))
                if len(waiting) > self.workers:
                    yield from _finished(*waiting.popleft(), advance)
            while waiting:
                yield from _finished(*waiting.popleft(), advance)

    def _write(self, split: Split, document: Document, ids: np.ndarray) -> None:
        part = (split, document.domain)
        if part not in self.writers:
            self.writers[part] = _Writer(self.folder / f"{split}-{len(self.writers):04d}", self.dtype)
        self.writers[part].add(ids, self.tokenizer.eos_id)

    def _finish(self, copies: int) -> None:
        order = {split: rank for rank, split in enumerate(SPLITS)}
        parts = []
        for (split, domain), writer in sorted(self.writers.items(), key=lambda item: order[item[0][0]]):
            parts.append({"split": split, "domain": domain, **writer.finish()})
        manifest: dict[str, Any] = {
            "format": _FORMAT,
            "key": shards_key(self.source, self.tokenizer, self.fraction),
            "vocab_size": self.tokenizer.vocab_size,
            "eos_id": self.tokenizer.eos_id,
            "tokenizer": self.tokenizer.name,
            "tokenizer_key": self.tokenizer.key,
            "validation_fraction": self.fraction,
            "dtype": self.dtype.name,
            "near_copies_dropped": copies,
            "parts": parts,
        }
        (self.folder / MANIFEST).write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))


class _Writer:
    """Appends documents to one token file."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.tokens_path, self.starts_path = path.with_suffix(".bin"), path.with_suffix(".starts.npy")
        self.dtype = dtype
        self.held: list[np.ndarray] = []
        self.held_tokens = self.num_tokens = 0
        self.starts: list[int] = []

    def add(self, ids: np.ndarray, eos_id: int) -> None:
        self.starts.append(self.num_tokens)
        self.held += [ids.astype(self.dtype), np.array([eos_id], dtype=self.dtype)]
        self.num_tokens += len(ids) + 1
        self.held_tokens += len(ids) + 1
        if self.held_tokens > _FLUSH_TOKENS:
            self._flush()

    def finish(self) -> dict[str, Any]:
        self._flush()
        np.save(self.starts_path, np.array(self.starts, dtype=np.int64))
        return {
            "tokens": self.tokens_path.name,
            "starts": self.starts_path.name,
            "num_tokens": self.num_tokens,
            "documents": len(self.starts),
            "crc32": chunk_sums(self.tokens_path),
        }

    def _flush(self) -> None:
        if self.held:
            with self.tokens_path.open("ab") as file:
                np.concatenate(self.held).tofile(file)
        self.held, self.held_tokens = [], 0


def _finished(
    batch: list[Document], encoded: Future[list[np.ndarray]], advance: Advance
) -> Iterator[tuple[Document, np.ndarray]]:
    yield from zip(batch, encoded.result(), strict=True)
    advance(sum(document.num_bytes for document in batch))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about a megabyte: enough for threads, little enough for memory."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
