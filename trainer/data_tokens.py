"""Token files that exist already: .npy arrays, and raw .bin files read by memory map where they are.

Nothing is copied. A folder with `train` and `val` files keeps that split; any other file holds out its tail,
cut at the end of a document when the tokenizer's EOS is known: contiguous text on one side of one cut, never
overlapping windows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moeviz.errors import MoevizError
from trainer.corpus import Split
from trainer.data_shards import Part, Shards
from trainer.data_sources import TOKEN_SUFFIXES, LabelledFile, labelled_files

_NAMED_SPLITS: dict[str, Split] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
_SCAN_TOKENS = 1 << 24


def is_token_path(path: Path) -> bool:
    """Whether a path is a token file, or a folder that holds token files and nothing else."""
    if path.is_dir():
        files = labelled_files(path)
        return bool(files) and all(file.path.suffix in TOKEN_SUFFIXES for file in files)
    return path.suffix in TOKEN_SUFFIXES


def token_shards(
    path: Path,
    *,
    vocab_size: int,
    eos_id: int | None = None,
    dtype: str = "uint16",
    validation_fraction: float = 0.05,
) -> Shards:
    """Shards over token files.

    Args:
        vocab_size: V; every id must be below it.
        dtype: of the ids in .bin files, `uint16` or `uint32`; .npy files say it themselves.

    Raises:
        MoevizError: missing or empty file, an array that is no list of integers, or an id that V does not
            cover.
    """
    files = labelled_files(path)
    arrays: dict[Part, tuple[np.ndarray, np.ndarray]] = {}
    for file in files:
        tokens = _read(file.path, dtype)
        _check_ids(tokens, file.path, vocab_size)
        split = _NAMED_SPLITS.get(file.domain) if len(files) > 1 else None
        if split:
            arrays[split, path.resolve().name] = tokens, _starts(tokens, eos_id)
        else:
            _hold_out_tail(arrays, file, tokens, eos_id, validation_fraction)
    return Shards(arrays, vocab_size, eos_id)


def _read(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        raise MoevizError(f"{path} is empty; write token ids to it first")
    if path.suffix == ".bin":
        width = np.dtype(dtype).itemsize
        if path.stat().st_size % width:
            raise MoevizError(
                f"{path} has {path.stat().st_size} bytes, no multiple of {dtype}; set the other token dtype"
            )
        return np.memmap(path, dtype=dtype, mode="r")
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
    for start in range(0, len(tokens), _SCAN_TOKENS):
        chunk = tokens[start : start + _SCAN_TOKENS]
        bad = np.flatnonzero((chunk >= vocab_size) | (chunk < 0))
        if len(bad):
            raise MoevizError(
                f"{path} has token id {int(chunk[bad[0]])} at position {start + int(bad[0])}, outside a "
                f"vocabulary of {vocab_size}; name the tokenizer that made it, or check the token dtype"
            )


def _hold_out_tail(
    arrays: dict[Part, tuple[np.ndarray, np.ndarray]],
    file: LabelledFile,
    tokens: np.ndarray,
    eos_id: int | None,
    fraction: float,
) -> None:
    cut = len(tokens) - round(len(tokens) * fraction)
    if eos_id is not None:
        ends = np.flatnonzero(tokens[cut:] == eos_id)
        cut += int(ends[0]) + 1 if len(ends) else 0
    for split, part in (("train", tokens[:cut]), ("validation", tokens[cut:])):
        if len(part):
            arrays[split, file.domain] = part, _starts(part, eos_id)  # type: ignore[index]


def _starts(tokens: np.ndarray, eos_id: int | None) -> np.ndarray:
    """Offsets after each EOS, and 0."""
    if eos_id is None:
        return np.zeros(1, dtype=np.int64)
    after = np.flatnonzero(tokens == eos_id) + 1
    return np.concatenate([[0], after[after < len(tokens)]]).astype(np.int64)
