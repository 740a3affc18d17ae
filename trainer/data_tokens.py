"""Token files that exist already: .npy arrays, and raw .bin files read by memory map where they are.

Nothing is copied. A folder with `train` and `val` files keeps that split; any other file holds out its tail,
cut at the end of a document when the tokenizer's EOS is known: contiguous text on one side of one cut, never
overlapping windows.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeviz.errors import MoevizError
from trainer.corpus import Split
from trainer.data_cache import digest
from trainer.data_checksums import CHUNK_BYTES
from trainer.data_shards import Part, Shards
from trainer.data_sources import TOKEN_SUFFIXES, labelled_files

_NAMED_SPLITS: dict[str, Split] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
_CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TokenFormat:
    """What the ids in token files mean."""

    vocab_size: int
    """V; every id must be below it."""
    eos_id: int | None = None
    """The id that ends a document, where it is known."""
    dtype: str = "auto"
    """Of .bin files: `uint16`, `uint32`, or `auto`: 16 bits when V fits. .npy files say it themselves."""

    @property
    def bin_dtype(self) -> np.dtype[Any]:
        if self.dtype == "auto":
            return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        return np.dtype(np.uint16 if self.dtype == "uint16" else np.uint32)


def is_token_path(path: Path) -> bool:
    """Whether a path is a token file, or a folder that holds token files and nothing else."""
    if path.is_dir():
        files = labelled_files(path)
        return bool(files) and all(file.path.suffix in TOKEN_SUFFIXES for file in files)
    return path.suffix in TOKEN_SUFFIXES


def token_shards(
    path: Path,
    token_format: TokenFormat,
    *,
    validation: Path | None = None,
    validation_fraction: float = 0.05,
) -> Shards:
    """Shards over token files.

    Args:
        validation: token files to evaluate on; then all of `path` is trained on.

    Raises:
        MoevizError: a missing or empty file, no list of integers, or an id that V does not cover.
    """
    arrays: dict[Part, tuple[np.ndarray, np.ndarray]] = {}
    read: list[Path] = []
    roots: list[tuple[Split, Path]] = [("train", path)]
    if validation is not None:
        roots.append(("validation", validation))
    for split, root in roots:
        files = [file.path for file in labelled_files(root)]
        read += files
        for file in files:
            tokens = _read(file, token_format)
            label = _domain(file, root)
            named = _NAMED_SPLITS.get(file.stem) if len(files) > 1 else None
            parts: list[tuple[Split, np.ndarray]]
            if validation is not None:
                parts = [(split, tokens)]
            elif named:
                parts = [(named, tokens)]
            else:
                parts = _without_tail(tokens, token_format.eos_id, validation_fraction)
            for side, part in parts:
                arrays[side, label] = part, _starts(part, token_format.eos_id)
    identity = [[file.name, file.stat().st_size, *_ends(file)] for file in read]
    return Shards(arrays, token_format.vocab_size, token_format.eos_id, digest(identity))


def _ends(file: Path) -> tuple[int, int]:
    """Checksums of the first and the last megabyte: a copy is the same file, another corpus hardly ever."""
    with file.open("rb") as content:
        first = zlib.crc32(content.read(CHUNK_BYTES))
        content.seek(max(0, file.stat().st_size - CHUNK_BYTES))
        return first, zlib.crc32(content.read())


def _domain(file: Path, root: Path) -> str:
    """`python/train.bin` -> python, `code/part1.npy` -> code/part1, a file that was named itself -> its stem."""
    if file == root:
        return file.stem
    inside = file.relative_to(root).with_suffix("")
    if file.stem not in _NAMED_SPLITS:
        return inside.as_posix()
    return inside.parent.as_posix() if inside.parent.parts else root.resolve().name


def _read(path: Path, token_format: TokenFormat) -> np.ndarray:
    if path.suffix not in TOKEN_SUFFIXES:
        raise MoevizError(f"{path} is no token file; name one that ends in {' or '.join(TOKEN_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise MoevizError(f"{path} is empty; write token ids to it first")
    tokens = _read_bin(path, token_format) if path.suffix == ".bin" else _read_npy(path)
    _check_ids(tokens, path, token_format.vocab_size)
    return tokens


def _read_bin(path: Path, token_format: TokenFormat) -> np.ndarray:
    dtype, size = token_format.bin_dtype, path.stat().st_size
    if size % dtype.itemsize:
        raise MoevizError(
            f"{path} has {size} bytes, no multiple of {dtype}; set token_dtype to the other one"
        )
    tokens = np.memmap(path, dtype=dtype, mode="r")
    head = tokens[:4096]
    if dtype.itemsize == 2 and len(head) >= 16 and head[0::2].any() and not head[1::2].any():
        raise MoevizError(f"{path} looks like uint32 (every other id is 0); set token_dtype=uint32")
    return tokens


def _read_npy(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise MoevizError(f"{path} is no .npy array ({error}); write it with numpy.save") from error
    if array.ndim != 1 or array.dtype.kind not in "ui" or not len(array):
        raise MoevizError(
            f"{path} holds {array.dtype} of shape {array.shape}; it needs one dimension of integers"
        )
    return array


def _check_ids(tokens: np.ndarray, path: Path, vocab_size: int) -> None:
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        bad = np.flatnonzero((chunk >= vocab_size) | (chunk < 0))
        if len(bad):
            raise MoevizError(
                f"{path} has token id {int(chunk[bad[0]])} at position {start + int(bad[0])}, outside a "
                f"vocabulary of {vocab_size}; name the tokenizer that made it, or check the token dtype"
            )


def _without_tail(tokens: np.ndarray, eos_id: int | None, fraction: float) -> list[tuple[Split, np.ndarray]]:
    cut = len(tokens) - round(len(tokens) * fraction)
    if eos_id is not None:
        ends = np.flatnonzero(tokens[cut:] == eos_id)
        cut += int(ends[0]) + 1 if len(ends) else 0
    parts: list[tuple[Split, np.ndarray]] = [("train", tokens[:cut]), ("validation", tokens[cut:])]
    return [(split, part) for split, part in parts if len(part)]


def _starts(tokens: np.ndarray, eos_id: int | None) -> np.ndarray:
    """Offsets after each EOS, and 0."""
    if eos_id is None:
        return np.zeros(1, dtype=np.int64)
    after = np.flatnonzero(tokens == eos_id) + 1
    return np.concatenate([[0], after[after < len(tokens)]]).astype(np.int64)
