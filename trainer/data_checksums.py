"""Checksums of a large array on disk, one for each megabyte, compared when that megabyte is first read.

So opening a corpus of any size costs nothing, and a damaged sector or a copy gone wrong is named in the step that
would have trained on it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moeviz.errors import MoevizError

CHUNK_BYTES = 1 << 20


def chunk_sums(path: Path) -> list[int]:
    """The crc32 of every megabyte of a file."""
    sums = []
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sums.append(zlib.crc32(chunk))
    return sums


class Checks:
    """Which megabytes of a file have been compared with their checksums."""

    def __init__(self, path: Path, sums: Sequence[int]) -> None:
        self._path, self._sums = path, sums
        self._right = np.zeros(len(sums), dtype=bool)

    def verify(self, values: np.ndarray, start: int, stop: int) -> None:
        """Compare what values[start:stop] lies in, as far as that was not done before.

        Args:
            values: the whole file as an array.
            start, stop: of the items that are wanted.

        Raises:
            MoevizError: says which bytes differ.
        """
        first = start * values.itemsize // CHUNK_BYTES
        last = -(-min(stop, len(values)) * values.itemsize // CHUNK_BYTES)
        for chunk in range(first, last):
            if not self._right[chunk]:
                self._compare(values, chunk)

    def _compare(self, values: np.ndarray, chunk: int) -> None:
        items = CHUNK_BYTES // values.itemsize
        part = np.ascontiguousarray(values[chunk * items : (chunk + 1) * items])
        if zlib.crc32(part.data.cast("B")) != self._sums[chunk]:
            begin = chunk * CHUNK_BYTES
            raise MoevizError(
                f"the token shard {self._path} is damaged: bytes {begin} to {begin + part.nbytes} do not match their "
                f"checksum; delete {self._path.parent} and prepare it again, or copy it again"
            )
        self._right[chunk] = True
