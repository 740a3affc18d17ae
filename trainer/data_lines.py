"""Lines of a file as it lies there: plain, gzip or Zstandard, read as a stream.

A file that was cut short is an error that says so: half a corpus would train without a word.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

from moeviz.errors import MoevizError

COMPRESSED = (".gz", ".zst")
_USUAL_RATIO = 4
_BUFFER_BYTES = 1 << 20


def open_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, their ends included.

    Raises:
        MoevizError: a compressed file is cut short or damaged.
    """
    try:
        with _opened(path) as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MoevizError(f"{path} is not a whole gzip file: {error}; copy it again") from error
    except OSError as error:
        if path.suffix != ".zst" or error.errno is not None:
            raise
        raise MoevizError(f"{path} is not a whole Zstandard file: {error}; copy it again") from error


def text_bytes(path: Path) -> int:
    """Size of the text in a file; an estimate where it is compressed."""
    return path.stat().st_size * (_USUAL_RATIO if path.suffix in COMPRESSED else 1)


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        stream = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd")
        return io.BufferedReader(stream, _BUFFER_BYTES)  # type: ignore[arg-type]
    return path.open("rb")
