"""Where documents come from: the embedded corpus, or the user's own text and JSON Lines files.

    CorpusSource(corpus), file_source(path) -> Source               (`data_mixed` joins and labels them)
    Source.key, .num_bytes, .vetted, .documents() -> Iterator[Document]

A text file is one document, or many when it carries `<|endoftext|>` marks, or sections cut at blank lines
when it is long. The domain of a file is the folder it lies in (below the one that was named), or its own
name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from moeviz.errors import MoevizError
from trainer.corpus import Corpus, Document
from trainer.data_cache import digest
from trainer.data_lines import COMPRESSED, open_lines, text_bytes

_MARKS = ("<|endoftext|>", "<|eos|>", "<|end_of_text|>")
_SECTION_CHARS = 4000
_FILE_DOMAINS = 32
"""Loose files up to this many are a domain each; more of them are one domain, their folder's name."""
TOKEN_SUFFIXES = (".npy", ".bin")
_JSON_SUFFIXES = tuple(f".{kind}{packed}" for kind in ("jsonl", "ndjson") for packed in ("", *COMPRESSED))
TEXT_FIELDS = ("text", "content")
"""Fields of a row that hold its text; `content` is CodeParrot's and The Stack's."""


class Source(Protocol):
    """Labelled documents that can be read again from the start, always in the same order."""

    @property
    def key(self) -> str:
        """Changes when the content does."""

    @property
    def num_bytes(self) -> int:
        """Size of all texts, for progress and sampling; an estimate where files are compressed."""

    @property
    def vetted(self) -> bool:
        """Whether its validation documents have been compared with its training text already."""

    def documents(self) -> Iterator[Document]: ...


@dataclass(frozen=True)
class CorpusSource:
    """The embedded corpus."""

    corpus: Corpus
    vetted: bool = True

    @property
    def key(self) -> str:
        return self.corpus.key

    @property
    def num_bytes(self) -> int:
        return self.corpus.num_bytes

    def documents(self) -> Iterator[Document]:
        return self.corpus.documents()


@dataclass(frozen=True)
class LabelledFile:
    """A file and the domain of what is in it."""

    path: Path
    domain: str


@dataclass(frozen=True)
class FileSource:
    """Text and JSON Lines files, plain, gzipped or in Zstandard."""

    files: tuple[LabelledFile, ...]
    vetted: bool = False

    @property
    def key(self) -> str:
        return digest([[file.domain, _file_digest(file.path)] for file in self.files])

    @property
    def num_bytes(self) -> int:
        return sum(text_bytes(file.path) for file in self.files)

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            reader = _json_documents if file.path.name.endswith(_JSON_SUFFIXES) else _text_documents
            yield from reader(file)


def file_source(path: Path) -> FileSource:
    """The text and JSON Lines files at a path.

    Raises:
        MoevizError: nothing there, or no text in it.
    """
    found = labelled_files(path)
    tokens = [file.path.name for file in found if file.path.suffix in TOKEN_SUFFIXES]
    if tokens:
        raise MoevizError(f"{path} mixes text with token files ({tokens[0]}); put them in separate folders")
    files = tuple(file for file in found if file.path.suffix in COMPRESSED or not _is_binary(file.path))
    if not files:
        raise MoevizError(f"no text in {path}; name a .txt or .jsonl file, or a folder that holds some")
    return FileSource(files)


def labelled_files(path: Path) -> list[LabelledFile]:
    """The file at a path, or every visible file below a folder, by name, with its domain.

    Raises:
        MoevizError: nothing there.
    """
    if path.is_file():
        return [LabelledFile(path, _stem(path))]
    if not path.is_dir():
        raise MoevizError(f"no file or folder at {path}; name one, or use the source 'builtin'")
    below = [p for p in sorted(path.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(path))]
    loose = sum(len(p.relative_to(path).parts) == 1 for p in below)
    return [LabelledFile(p, _domain(p, path, loose)) for p in below]


def _domain(path: Path, root: Path, loose: int) -> str:
    first, *rest = path.relative_to(root).parts
    if rest:
        return first
    return _stem(path) if loose <= _FILE_DOMAINS else root.resolve().name


def _stem(path: Path) -> str:
    return path.name.partition(".")[0] or path.name


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_documents(file: LabelledFile) -> Iterator[Document]:
    for section in sections(_decoded(file.path)):
        yield Document(file.domain, section)


def _decoded(path: Path) -> Iterator[str]:
    for number, line in enumerate(open_lines(path), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise MoevizError(
                f"{path} line {number} is not UTF-8 ({error.reason}); convert it: iconv -f latin1 -t utf-8"
            ) from error


def sections(lines: Iterable[str], limit: int = _SECTION_CHARS) -> Iterator[str]:
    """Documents of a text: cut at end-of-text marks, and at the first blank line after `limit` characters.

    A passage without blank lines is cut at a line end after four times the limit; nothing is lost but the
    marks.
    """
    held: list[str] = []
    size = 0
    for line in _short_lines(lines, 4 * limit):
        before, mark, after = _cut_at_mark(line)
        while mark:
            yield from _joined([*held, before])
            held, size = [], 0
            before, mark, after = _cut_at_mark(after)
        held.append(before)
        size += len(before)
        if size >= 4 * limit or (size >= limit and not before.strip()):
            yield from _joined(held)
            held, size = [], 0
    yield from _joined(held)


def _joined(parts: list[str]) -> Iterator[str]:
    text = "".join(parts).strip("\n")
    if text.strip():
        yield text + "\n"


def _cut_at_mark(line: str) -> tuple[str, str, str]:
    if "<|" not in line:
        return line, "", ""
    found = [(line.find(mark), mark) for mark in _MARKS if mark in line]
    return line.partition(min(found)[1]) if found else (line, "", "")


def _short_lines(lines: Iterable[str], limit: int) -> Iterator[str]:
    for line in lines:
        if len(line) <= limit:
            yield line
        else:
            yield from (line[start : start + limit] for start in range(0, len(line), limit))


def _json_documents(file: LabelledFile) -> Iterator[Document]:
    for number, line in enumerate(open_lines(file.path), start=1):
        if line.strip():
            yield _json_document(line, file, number)


def _json_document(line: bytes, file: LabelledFile, number: int) -> Document:
    where = f"{file.path} line {number}"
    try:
        row: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise MoevizError(
            f"{where} is not JSON: {error}; each line must be one object with a text field"
        ) from error
    text = text_of(row)
    if text is None:
        fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise MoevizError(
            f"{where} has no string field 'text' (found: {fields}); rename the field that holds the text"
        )
    domain = row.get("domain", row.get("source"))
    return Document(domain if isinstance(domain, str) and domain else file.domain, text)


def text_of(row: Any) -> str | None:
    """The text of a row, None where it has none."""
    if isinstance(row, dict):
        for name in TEXT_FIELDS:
            if isinstance(row.get(name), str):
                return str(row[name])
    return None
