"""Domains found in the Python that runs this: its code, its manual, and the names of characters.

Nothing is imported or executed but `pydoc_data.topics`, a table of strings. The text differs between Python
versions, which is why the manifest records it. Files are visited in the order of the hash of their path, so
that a quota is filled with a cross-section of the library and not with the letter A.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sysconfig
import unicodedata
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
_PIECE_CHARS = 4000
_TOP_LEVEL = re.compile(r"^(?=(?:def|class|async def|@)\b|@)", re.MULTILINE)
_DOCSTRING = re.compile(r':\s*\n\s+r?"""(.{200,4000}?)"""', re.DOTALL)
_SCRIPTS = ((0x20, 0x3400), (0xA000, 0xAC00), (0xFB00, 0xFE00), (0x10000, 0x10900), (0x1D400, 0x1FB00))
"""Code points without the ideographs and syllables whose names are numbers."""
_TITLE_RULE = re.compile(r"^\*{4,}\n?", re.MULTILINE)


def python_code() -> Iterator[str]:
    """Top-level definitions of the standard library, whole."""
    for path in _sources():
        text = path.read_text(encoding="utf-8", errors="replace")
        pieces = [piece for piece in _TOP_LEVEL.split(text) if len(piece) > 200]
        yield from (piece.rstrip() + "\n" for piece in pieces if len(piece) <= _PIECE_CHARS)


def manual() -> Iterator[str]:
    """English about Python: a section of the language reference, then a few docstrings, in turn."""
    docstrings = _docstrings()
    for topic in language_reference():
        yield topic
        for _, docstring in zip(range(4), docstrings, strict=False):
            yield docstring
    yield from docstrings


def unicode_names() -> Iterator[str]:
    """Runs of sixteen characters with code point, category and name, from all over the table."""
    starts = sorted(
        (s for first, end in _SCRIPTS for s in range(first, end, 16)), key=lambda s: _rank(f"{s:x}")
    )
    for start in starts:
        rows = [row for row in map(_character_row, range(start, start + 16)) if row]
        if len(rows) >= 4:
            yield "\n".join(rows) + "\n"


def _sources() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    yield from in_hash_order(path for path in _walk(root) if path.suffix == ".py")


def _walk(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in _SKIPPED and not path.name.startswith("config-"):
                yield from _walk(path)
        else:
            yield path


def in_hash_order(paths: Iterator[Path]) -> list[Path]:
    """Files by the hash of their last three path components: a deterministic shuffle, the same in every
    folder.
    """
    return sorted(paths, key=lambda path: (_rank("/".join(path.parts[-3:])), path.parts))


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def language_reference() -> Iterator[str]:
    """English about Python alone: the sections that `help()` shows; none where a distribution leaves them out."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics, key=_rank):
        yield from pieces(_TITLE_RULE.sub("", topics[name]))


def _docstrings() -> Iterator[str]:
    for path in _sources():
        text = path.read_text(encoding="utf-8", errors="replace")
        for match in _DOCSTRING.finditer(text):
            if ">>>" not in match[1]:
                yield inspect.cleandoc(match[1]) + "\n"


def pieces(text: str, limit: int = _PIECE_CHARS) -> Iterator[str]:
    """Cut a long text at blank lines into pieces of at most `limit` characters (a longer paragraph stays
    whole).
    """
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > limit:
            yield piece.strip("\n") + "\n"
            piece = ""
        piece += paragraph + "\n\n"
    if piece.strip():
        yield piece.strip("\n") + "\n"


def _character_row(code: int) -> str:
    """`U+00E9 é Ll LATIN SMALL LETTER E WITH ACUTE`; empty for what has no name or no visible left-to-right
    shape.
    """
    character = chr(code)
    name, category = unicodedata.name(character, ""), unicodedata.category(character)
    numbered = name.startswith(
        ("CJK UNIFIED", "CJK COMPAT", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN", "EGYPTIAN")
    )
    if (
        not name
        or numbered
        or category[0] in "CMZ"
        or unicodedata.bidirectional(character) in ("R", "AL", "AN")
    ):
        return ""
    return f"U+{code:04X} {character} {category} {name}"
