"""One segment file: written whole under a hidden name, then renamed; never changed afterwards.

Level-0 files are not synced to the disk. A killed process loses nothing that was renamed, because the page
cache outlives it; a power cut may leave files of the last half minute truncated, which readers skip and name.
One fsync per table and second would cost more than the rest of the writer. Merged and packed files are synced
before anything that they replace is deleted.
"""

from __future__ import annotations

import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from moeviz.store import pages
from moeviz.store.cover import SegmentName, cover
from moeviz.store.schema import TABLES

_MAGIC = b"PAR1"
_DICTIONARY_COLUMNS = (
    *("name", "domain", "kind", "rule", "episode", "severity", "message", "remedy"),
    *("experts.list.element", "weights.list.element", "map.list.element", "grid.list.element"),
    "counts.list.element",
)
"""Few distinct values: 1.55 bytes a routing decision instead of 2.2, and a fifth less time; counts of a step a
third smaller (where they have too many values for a dictionary, the writer gives it up by itself). These and the
split ones are what pyarrow is told of the tables that `pages` leaves to it."""
_SPLIT_COLUMNS = ("prob_sum", "weight_sum", "bias", "token_loss", "row_max", "singular")
"""Lists of floats: byte planes compress better. Not for integers: DuckDB 1.5 reads this for floats alone."""
_ROW_GROUP_BYTES = 1_000_000
"""Arrow bytes of a row group: one sequence is then read without decoding a whole file."""
_STATISTICS_COLUMNS = ("step", "layer", "seq", "name")


def write_segment(
    folder: Path,
    name: SegmentName,
    table: pa.Table,
    *,
    sync: bool = False,
    row_groups: list[int] | None = None,
) -> Path:
    """Write `table` as `folder/name`, atomically. Raises OSError and leaves nothing when the disk refuses."""
    final = folder / str(name)
    temporary = folder / f".{name}.tmp"
    try:
        write_parquet(temporary, table, sync=sync, row_groups=row_groups)
        os.rename(temporary, final)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if sync:
        sync_folder(folder)
    return final


def write_parquet(
    path: Path, table: pa.Table, *, sync: bool = False, row_groups: list[int] | None = None
) -> None:
    """zstd Parquet, in encodings that DuckDB 1.5 and 2 read.

    Args:
        path: file to write.
        table: its rows.
        sync: wait until they are on the disk.
        row_groups: rows after which a new row group begins in any case, for example at each layer.
    """
    most = max(1, int(table.num_rows * _ROW_GROUP_BYTES / max(table.nbytes, 1)))
    with open(path, "wb") as file:
        plan = pages.fitting(table, _STATISTICS_COLUMNS)
        if plan is not None:
            sizes = [
                min(most, size - at) for size in row_groups or [table.num_rows] for at in range(0, size, most)
            ]
            pages.write(file, table, plan, sizes)
        else:
            _write_with_arrow(file, table, row_groups or [table.num_rows], most)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def _write_with_arrow(file: BinaryIO, table: pa.Table, row_groups: list[int], most: int) -> None:
    columns = set(table.column_names)
    writer = pq.ParquetWriter(
        file,
        table.schema,
        compression="zstd",
        use_dictionary=[name for name in _DICTIONARY_COLUMNS if name.partition(".")[0] in columns],
        use_byte_stream_split=[f"{name}.list.element" for name in _SPLIT_COLUMNS if name in columns],
        write_statistics=[name for name in _STATISTICS_COLUMNS if name in columns],
    )
    with writer:
        start = 0
        for size in row_groups:
            writer.write_table(table.slice(start, size), row_group_size=most)
            start += size


def read_segment(
    folder: Path,
    name: SegmentName,
    columns: list[str] | None = None,
    filters: list[tuple[str, str, int]] | None = None,
) -> pa.Table:
    """Rows of one segment. Without pyarrow's guess that a folder called `lr=0.1` is a column."""
    return pq.read_table(
        folder / str(name), columns=columns, filters=filters, partitioning=None, use_threads=False
    )


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut (POSIX needs the folder synced too)."""
    with suppress(OSError):  # some network file systems refuse to sync a folder; the file itself is synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_whole(path: Path, thorough: bool = False) -> bool:
    """Whether a Parquet file ends as it must: a footer of plausible length, then the magic bytes.

    One open and one read of 8 bytes; finds every truncation, not a flipped bit in the middle. `thorough`
    decodes every page as well.

    Raises:
        FileNotFoundError: the file was merged away meanwhile, which is no damage.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 12:
            return False
        file.seek(-8, os.SEEK_END)
        length, magic = struct.unpack("<I4s", file.read(8))
    if magic != _MAGIC or length + 12 > size:
        return False
    return not thorough or _decodes(path)


def _decodes(path: Path) -> bool:
    try:
        pq.read_table(path, partitioning=None, use_threads=False)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException):
        return False
    return True


def segment_names(folder: Path) -> list[str]:
    """Every file name in a table's folder that is not hidden; empty when the folder is missing."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except FileNotFoundError:
        return []


def sampled_bytes(run: Path, rank: int) -> int:
    """Bytes on disk of the samples that `rank` wrote so far."""
    return sum(
        (run / table.name / str(name)).stat().st_size
        for table in TABLES.values()
        if table.sampled
        for name, _ in cover(segment_names(run / table.name), time.time())
        if name.rank == rank
    )


def remove_temporaries(folder: Path, rank: int) -> int:
    """Delete what a killed writer of `rank` left half written. Returns how many files."""
    removed = 0
    for entry in list(folder.glob(f".r{rank}-*.tmp")):
        with suppress(FileNotFoundError):
            entry.unlink()
            removed += 1
    return removed
