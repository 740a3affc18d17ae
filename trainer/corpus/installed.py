"""Domains found beside torch: C++ headers, and docstrings with worked examples of sympy, mpmath and networkx.

Packages are located without importing them. Without torch these domains are absent, and the manifest says so.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from trainer.corpus.standard_library import in_hash_order, pieces

_HEADER_FOLDERS = ("c10", "ATen/core", "ATen/native", "ATen/cpu", "ATen/detail", "torch/csrc")
_DOCTEST_PACKAGES = ("sympy", "mpmath", "networkx")
_PIECE_CHARS = 2500
_PIECES_PER_FILE = 4
"""Few pieces of many headers: one long file must not fill the quota."""
_SKIPPED = {"tests", "test", "benchmarks", "__pycache__"}
_LICENCE = re.compile(r"\A\s*(?:/\*.*?\*/\s*|(?://[^\n]*\n\s*)+)", re.DOTALL)
_DOCSTRING = re.compile(r':\s*\n\s+r?"""(.{200,6000}?)"""', re.DOTALL)


def cpp_headers() -> Iterator[str]:
    """Headers that ship with torch, without the opening licence, cut at blank lines."""
    root = package_folder("torch")
    if root is None:
        return
    folders = [root / "include" / name for name in _HEADER_FOLDERS]
    for path in in_hash_order(path for folder in folders for path in _walk(folder, ".h")):
        text = path.read_text(encoding="utf-8", errors="replace")
        found = (piece for piece in pieces(_LICENCE.sub("", text, count=1), _PIECE_CHARS) if len(piece) > 200)
        yield from islice(found, _PIECES_PER_FILE)


def doctests() -> Iterator[str]:
    """Docstrings that show a session at the prompt."""
    folders = [folder for name in _DOCTEST_PACKAGES if (folder := package_folder(name))]
    for path in in_hash_order(path for folder in folders for path in _walk(folder, ".py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if ">>>" not in text:
            continue
        for match in _DOCSTRING.finditer(text):
            if ">>>" in match[1]:
                yield inspect.cleandoc(match[1]) + "\n"


def package_folder(name: str) -> Path | None:
    """Where an installed package lives, without importing it; None when it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _walk(folder: Path, suffix: str) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        yield from (Path(parent, name) for name in files if name.endswith(suffix))
