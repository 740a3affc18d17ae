"""The writer of one rank: buffers rows, and every second (or 8 MB) puts one file a table into the run folder.

It neither opens nor imports DuckDB, takes no lock and talks to nobody: readers find files by their names.
`BackgroundSink` moves it to a thread of its own.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from moeviz.errors import MoevizError
from moeviz.records import LoadRecord, MetricRecord, Record
from moeviz.store.background import BackgroundSink
from moeviz.store.columns import Rows
from moeviz.store.cover import SegmentName
from moeviz.store.encode import encode
from moeviz.store.encode_samples import SampleRecord, encode_samples, held_bytes
from moeviz.store.encode_steps import StepRecord, encode_steps
from moeviz.store.run import Attempt, RunInfo, read_info, start_compactor
from moeviz.store.schema import TABLES, segment_schema
from moeviz.store.segments import remove_temporaries, segment_names, write_segment
from moeviz.store.tiles import has_tiles, tiled

_Kind = TypeVar("_Kind", StepRecord, SampleRecord)

__all__ = ["BackgroundSink", "SegmentWriter", "WriterStats"]


_SIDECAR_SEGMENTS = 500
"""Segments (of all tables) after which merging them pays: about a minute and a half of training."""
_SAMPLE_BYTES = 2e6
"""Samples that wait to be encoded together: a map takes four times the memory of its codes until then."""


class WriterStats(NamedTuple):
    """What a writer did so far."""

    rows: int
    segments: int
    bytes: int
    """Bytes on disk."""
    dropped_rows: int
    """Rows given up because the disk stayed full for longer than the memory bound allows."""


class SegmentWriter:
    """A `Sink` that keeps records in a run folder.

    On a disk so slow that a flush takes longer than `flush_seconds`, the next one waits as long as the last one took:
    half of the time is then left for taking in rows.

    A flush that fails (disk full) raises OSError and keeps its rows: the next one retries. While it fails,
    memory is bounded by `retry_bytes`: rows of samples go first, then the oldest rows of any table, and both
    are counted.
    """

    def __init__(
        self,
        run_path: str | Path,
        rank: int = 0,
        attempt: int | None = None,
        flush_seconds: float = 1.0,
        flush_bytes: float = 8e6,
        retry_bytes: float = 256e6,
        sidecar: bool = True,
    ) -> None:
        """Open a run folder for one rank.

        Args:
            run_path: the folder, made by `create_run`.
            rank: number of this process.
            attempt: which attempt of run.json writes; None: the newest.
            flush_seconds: how long rows wait at most for the next write to flush them.
            flush_bytes: how many bytes of them.
            retry_bytes: how many are kept while the disk refuses them.
            sidecar: rank 0 starts the process that merges segments once there are many.

        Raises:
            RunNotFoundError, CorruptRunError: no run to write to.
        """
        self.path = Path(run_path).absolute()
        self.rank = rank
        info = read_info(self.path)
        self._attempt = _attempt(info, attempt)
        self._num_experts = [layer.num_experts for layer in info.model.layers]
        self._schemas = {table: segment_schema(table, info.run_id) for table in TABLES}
        self._flush_seconds, self._flush_bytes, self._retry_bytes = flush_seconds, flush_bytes, retry_bytes
        self._pending: dict[str, list[pa.RecordBatch]] = {table: [] for table in TABLES}
        self._steps: list[StepRecord] = []
        """What every step has waits for the flush: encoded together it costs a fraction."""
        self._samples: list[SampleRecord] = []
        """So do samples and alerts, until they are many."""
        self._sample_bytes = 0
        self._pending_bytes = 0
        """Of all of these, about."""
        self._due = time.monotonic() + flush_seconds
        self._last_ts = 0.0
        self._stats = WriterStats(0, 0, 0, 0)
        self._closed = False
        self._failing = False
        self._wants_sidecar = sidecar and rank == 0
        self._sidecar: subprocess.Popen[bytes] | None = None
        self._next_flush = {table: self._first_free(table) for table in TABLES}
        for table in TABLES:
            remove_temporaries(self.path / table, rank)

    def write(self, record: Record) -> None:
        """Buffer one record; flushes after a second or 8 MB, and raises OSError if that fails."""
        if self._closed:
            raise MoevizError(f"the writer of {self.path} is closed; open a new SegmentWriter to write more")
        if isinstance(record, StepRecord):
            self._steps.append(record)
            self._pending_bytes += self._row_bytes(record)
        elif isinstance(record, SampleRecord):
            self._samples.append(record)
            size = held_bytes(record)
            self._sample_bytes, self._pending_bytes = self._sample_bytes + size, self._pending_bytes + size
            if self._failing or self._sample_bytes > _SAMPLE_BYTES:
                failure = self._encode_samples()
                if failure is not None:
                    raise failure
        else:
            for table, batch in encode(record, self._num_experts):
                self._pending[table].append(batch)
                self._pending_bytes += batch.nbytes
        late = time.monotonic() >= self._due
        if late or (self._pending_bytes >= self._flush_bytes and not self._failing):
            self.flush()
        elif self._failing:
            self._bound_memory()

    def flush(self) -> None:
        """Make everything written so far visible to readers: one file a table, expert_load last.

        Raises:
            OSError: the disk refused; what was not written is kept, within bounds, for the next flush.
            Exception: a record that is no row; it is given up, the others are written.
        """
        begin = time.monotonic()
        failure: Exception | None = self._encode_samples()
        failure = self._encode_steps() or failure
        for table, batches in self._pending.items():
            if batches:
                try:
                    self._write_table(table, pa.Table.from_batches(batches, self._schemas[table]))
                    batches.clear()
                except OSError as error:  # the small tables may still fit on a disk that refused a large one
                    failure = error
        self._pending_bytes = sum(batch.nbytes for batches in self._pending.values() for batch in batches)
        self._failing = failure is not None
        self._due = time.monotonic() + max(self._flush_seconds, time.monotonic() - begin)
        if failure is not None:
            self._bound_memory()
            raise failure
        if self._wants_sidecar and self._stats.segments >= _SIDECAR_SEGMENTS:
            self._wants_sidecar = False
            self._sidecar = start_compactor(self.path)

    def _encode_steps(self) -> Exception | None:
        """Turn the records that waited for this flush into rows; the last error."""
        records, self._steps = self._steps, []
        encoded, failure = _together(lambda some: encode_steps(some, self._num_experts), records)
        for table, batch in encoded:
            self._pending[table].append(batch)
        return failure

    def _encode_samples(self) -> Exception | None:
        """The same for samples and alerts."""
        records, self._samples = self._samples, []
        encoded, failure = _together(encode_samples, records)
        for table, batch in encoded:
            self._pending[table].append(self._stamped(batch) if table == "alerts" else batch)
            self._pending_bytes += batch.nbytes
        self._pending_bytes -= self._sample_bytes
        self._sample_bytes = 0
        return failure

    def close(self) -> None:
        """Flush, then refuse further writes. Closing twice is allowed."""
        if not self._closed:
            self.flush()
            self._closed = True
            if self._sidecar is not None:  # a merge that is cut short leaves only a hidden file
                self._sidecar.terminate()
                self._sidecar.wait()

    @property
    def stats(self) -> WriterStats:
        return self._stats

    def _write_table(self, table: str, rows: pa.Table) -> None:
        steps_R = rows["step"].to_numpy()
        flush = self._next_flush[table]
        name = SegmentName(
            rank=self.rank,
            attempt=self._attempt.number,
            from_step=self._attempt.from_step,
            first_flush=flush,
            last_flush=flush,
            first_step=int(steps_R.min()),
            last_step=int(steps_R.max()),
            level=0,
            active_ms=int(time.time() * 1000),
        )
        row_groups = None
        if has_tiles(TABLES[table].order):
            rows, row_groups = tiled(rows)
        path = write_segment(self.path / table, name, rows, row_groups=row_groups)
        self._next_flush[table] = flush + 1
        self._stats = self._stats._replace(
            rows=self._stats.rows + rows.num_rows,
            segments=self._stats.segments + 1,
            bytes=self._stats.bytes + path.stat().st_size,
        )

    def _row_bytes(self, record: StepRecord) -> int:
        """About the bytes of its rows."""
        if isinstance(record, LoadRecord):
            return 4 * record.counts_LE.nbytes
        return 64 * len(record.values) * (len(self._num_experts) if isinstance(record, MetricRecord) else 1)

    def _first_free(self, table: str) -> int:
        """Flush numbers go on where an earlier writer of this rank and attempt stopped."""
        parsed = (SegmentName.parse(name) for name in segment_names(self.path / table))
        mine = (
            n.last_flush for n in parsed if n and (n.rank, n.attempt) == (self.rank, self._attempt.number)
        )
        return max(mine, default=0) + 1

    def _stamped(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Alerts get a strictly increasing time, which orders transitions within one step."""
        ts_R = max(time.time(), self._last_ts + 1e-6) + 1e-6 * np.arange(batch.num_rows)
        self._last_ts = float(ts_R[-1])
        at = batch.schema.get_field_index("ts")
        return batch.set_column(at, batch.schema.field(at), pa.array(ts_R))

    def _bound_memory(self) -> None:
        """Give up rows, samples first, until what waits for the disk fits `retry_bytes`."""
        for table in sorted(self._pending, key=lambda table: not TABLES[table].sampled):
            batches = self._pending[table]
            while batches and self._pending_bytes > self._retry_bytes:
                given_up = batches.pop(0)
                self._pending_bytes -= given_up.nbytes
                self._stats = self._stats._replace(dropped_rows=self._stats.dropped_rows + given_up.num_rows)


def _together(
    encode_all: Callable[[Sequence[_Kind]], Iterable[Rows]], records: Sequence[_Kind]
) -> tuple[list[Rows], Exception | None]:
    """The rows of all records; if one of them is no row, those of the others, and the last error."""
    if not records:
        return [], None
    try:
        return list(encode_all(records)), None
    except Exception:
        encoded: list[Rows] = []
        failure: Exception | None = None
        for record in records:
            try:
                encoded += encode_all([record])
            except Exception as error:
                failure = error
        return encoded, failure


def _attempt(info: RunInfo, number: int | None) -> Attempt:
    if number is None:
        return info.attempts[-1]
    for attempt in info.attempts:
        if attempt.number == number:
            return attempt
    known = ", ".join(str(attempt.number) for attempt in info.attempts)
    raise MoevizError(f"attempt {number} is not one of the run's ({known}); resume_run begins a new one")
