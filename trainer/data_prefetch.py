"""Batches made ahead of time by a thread, so that a step never waits for the disk.

Batches are a pure function of row numbers, so the thread guesses which rows come next (those as far behind the last
ones as they were behind theirs) and a wrong guess costs nothing but the time it saves. What is returned is the same
with and without it, and a resumed run has nothing to restore.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from trainer.data_batches import Batch, TokenBatches

_AHEAD = 3
"""Batches that are made before they are asked for."""


class PrefetchedBatches(TokenBatches):
    """`TokenBatches` whose rows are read by a thread."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.waited_seconds = 0.0
        """Time that callers spent here, over all calls: what data cost the steps."""
        self._pool: ThreadPoolExecutor | None = None
        self.coming: dict[tuple[int, int], Future[Batch]] = {}
        self._last: tuple[int, int] | None = None

    def rows(self, first: int, count: int) -> Batch:
        begin = time.perf_counter()
        coming = self.coming.pop((first, count), None)
        batch = super().rows(first, count) if coming is None else coming.result()
        self._look_ahead(first, count)
        self.waited_seconds += time.perf_counter() - begin
        return batch

    def _look_ahead(self, first: int, count: int) -> None:
        stride = first - self._last[0] if self._last and self._last[1] == count else 0
        self._last = (first, count)
        if stride <= 0:
            return
        wanted = [(first + ahead * stride, count) for ahead in range(1, _AHEAD + 1)]
        for rows in [rows for rows in self.coming if rows not in wanted]:
            self.coming.pop(rows).cancel()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "batches")
        for rows in wanted:
            if rows not in self.coming:
                self.coming[rows] = self._pool.submit(super().rows, *rows)
