"""Token shards: one flat array of ids per (split, domain) on disk, documents ended by EOS, read by memory
map.

The source is read three times, so that a large one never has to fit in memory: to decide which documents are
held out (a function of their content), to take the fingerprints of those, and to tokenise. The last pass writes
training tokens as they come and remembers which fingerprints of held-out documents it met: a held-out document
that is mostly in the training text is dropped, never moved.

    build_shards(source, tokenizer, validation_fraction=0.05) -> Shards
    Shards.tokens(split, domain) -> (N,) uint16 or uint32, memory-mapped
    Shards.starts(split, domain) -> (documents,) int64, the offset of each document's first token
    Shards.domains, .vocab_size, .eos_id, .num_tokens(split, domain=None), .path
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from moeviz.errors import MoevizError
from trainer.corpus import SPLITS, Document, Split
from trainer.corpus.documents import choose_held_out, without_copies
from trainer.corpus.overlap import NEAR_COPY, Found, fingerprints
from trainer.data_cache import cached, digest
from trainer.data_progress import progress
from trainer.data_sources import Source
from trainer.tokenizer import Tokenizer

log = logging.getLogger("moeviz.data")

_FORMAT = 1
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
    """The cache entry; None for token files that are read where they are."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain, in the order of the source."""
        return tuple(dict.fromkeys(domain for _, domain in self.arrays))

    def tokens(self, split: Split, domain: str) -> np.ndarray:
        """(N,) ids; empty when the domain has none on this side."""
        return (
            self.arrays[split, domain][0] if (split, domain) in self.arrays else np.empty(0, dtype=np.uint16)
        )

    def starts(self, split: Split, domain: str) -> np.ndarray:
        """(documents,) int64 offsets into `tokens`."""
        return (
            self.arrays[split, domain][1] if (split, domain) in self.arrays else np.empty(0, dtype=np.int64)
        )

    def num_tokens(self, split: Split, domain: str | None = None) -> int:
        names = self.domains if domain is None else (domain,)
        return sum(len(self.tokens(split, name)) for name in names)


def build_shards(
    source: Source,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = 0.05,
    quiet: bool = False,
    root: Path | None = None,
) -> Shards:
    """Shards of a source, from the cache when they are there.

    Raises:
        MoevizError: the source is empty or malformed, or the cache cannot be written.
    """
    identity = {
        "format": _FORMAT,
        "source": source.key,
        "tokenizer": tokenizer.key,
        "validation_fraction": validation_fraction,
    }
    path = cached(
        "shards",
        digest(identity),
        lambda folder: _Builder(folder, source, tokenizer, validation_fraction, quiet).run(),
        root=root,
    )
    return load_shards(path)


def load_shards(path: Path) -> Shards:
    """Shards that `build_shards` wrote.

    Raises:
        MoevizError: a file is missing or shorter than its manifest says.
    """
    try:
        manifest = orjson.loads((path / "manifest.json").read_bytes())
        arrays: dict[Part, tuple[np.ndarray, np.ndarray]] = {}
        for part in manifest["parts"]:
            tokens = np.memmap(
                path / part["tokens"], dtype=manifest["dtype"], mode="r", shape=(part["num_tokens"],)
            )
            arrays[part["split"], part["domain"]] = tokens, np.load(path / part["starts"])
        return Shards(arrays, manifest["vocab_size"], manifest["eos_id"], path.name, path)
    except (OSError, ValueError, KeyError) as error:
        raise MoevizError(
            f"the token shards in {path} are damaged ({error}); delete that folder to rebuild"
        ) from error


class _Builder:
    """Fills one cache entry."""

    def __init__(
        self, folder: Path, source: Source, tokenizer: Tokenizer, fraction: float, quiet: bool
    ) -> None:
        self.folder, self.source, self.tokenizer = folder, source, tokenizer
        self.fraction, self.quiet = fraction, quiet
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
        with progress("tokenising", total=self.source.num_bytes, quiet=self.quiet) as advance:
            for batch in _batches(without_copies(self.source.documents())):
                yield from zip(batch, self.tokenizer.encode_batch([d.text for d in batch]), strict=True)
                advance(sum(document.num_bytes for document in batch))

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
            "vocab_size": self.tokenizer.vocab_size,
            "eos_id": self.tokenizer.eos_id,
            "tokenizer": self.tokenizer.name,
            "dtype": self.dtype.name,
            "near_copies_dropped": copies,
            "parts": parts,
        }
        (self.folder / "manifest.json").write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))


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
        }

    def _flush(self) -> None:
        if self.held:
            with self.tokens_path.open("ab") as file:
                np.concatenate(self.held).tofile(file)
        self.held, self.held_tokens = [], 0


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
