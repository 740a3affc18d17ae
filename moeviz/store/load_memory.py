"""Counts of a layer that were read once and need not be read again: segments never change.

A curve over a live run reads one row out of each of hundreds of small files, again at every look. Here each flush is
read once: files of flushes that are known are skipped, also when they have been merged meanwhile. Runs too long to
keep are answered from `load_lod`, not from here.

Shapes: R rows, E experts of the layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from moeviz.store.cover import Covered

MOST_STEPS = 50_000
"""Steps of a run above which nothing is kept: 13 MB a layer of 64 experts."""
_MOST_LAYERS = 16

Writer = tuple[int, int]
"""(rank, attempt): flush numbers count within one."""
Stretch = tuple[int, int]
"""First and last flush of a stretch without a gap."""


class LayerCounts(NamedTuple):
    """Rows of one layer, by step; a row for each rank that writes loads."""

    steps_R: np.ndarray
    counts_RE: np.ndarray
    """uint32."""


class _Known(NamedTuple):
    flushes: dict[Writer, list[Stretch]]
    rows: LayerCounts


class LoadMemory:
    """What is known of each layer that was asked for lately. One thread at a time."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, _Known] = OrderedDict()

    def unread(self, layer: int, files: Sequence[Covered]) -> list[Covered]:
        """Those of `files` (all that count now) with unknown rows. Forgets the layer if some known rows are gone."""
        known = self._known.get(layer)
        if known is None:
            return list(files)
        now = flushes_of(files)
        kept = all(
            _holds(now.get(writer, ()), stretch) for writer, all_ in known.flushes.items() for stretch in all_
        )
        new = [one for one in files if not _holds(_of(one, known.flushes), _stretch(one))]
        mixed = any(_touches(_of(one, known.flushes), _stretch(one)) for one in new)
        resumed = {attempt for _, attempt in now} != {attempt for _, attempt in known.flushes}
        if kept and not mixed and not resumed:
            return new
        del self._known[layer]
        return list(files)

    def extend(self, layer: int, num_experts: int, files: Sequence[Covered], rows: pa.Table) -> LayerCounts:
        """Take in `rows` (columns step and counts) of the unread ones of `files`. Returns all that is known."""
        steps_R = rows["step"].to_numpy().astype(np.int64)
        counts_RE = rows["counts"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        counts_RE = counts_RE.reshape(len(steps_R), num_experts)
        known = self._known.pop(layer, None)
        if known is not None:
            steps_R = np.concatenate((known.rows.steps_R, steps_R))
            counts_RE = np.concatenate((known.rows.counts_RE, counts_RE))
        if (np.diff(steps_R) < 0).any():
            at_R = np.argsort(steps_R, kind="stable")
            steps_R, counts_RE = steps_R[at_R], counts_RE[at_R]
        self._known[layer] = _Known(flushes_of(files), LayerCounts(steps_R, counts_RE))
        if len(self._known) > _MOST_LAYERS:
            self._known.popitem(last=False)
        return self._known[layer].rows


def flushes_of(files: Iterable[Covered]) -> dict[Writer, list[Stretch]]:
    """Which flushes of which writer `files`, in the order of `cover`, hold."""
    found: dict[Writer, list[Stretch]] = {}
    for name, _ in files:
        stretches = found.setdefault((name.rank, name.attempt), [])
        if stretches and stretches[-1][1] + 1 == name.first_flush:
            stretches[-1] = (stretches[-1][0], name.last_flush)
        else:
            stretches.append((name.first_flush, name.last_flush))
    return found


def _of(file: Covered, flushes: dict[Writer, list[Stretch]]) -> Sequence[Stretch]:
    return flushes.get((file.name.rank, file.name.attempt), ())


def _stretch(file: Covered) -> Stretch:
    return file.name.first_flush, file.name.last_flush


def _holds(stretches: Sequence[Stretch], part: Stretch) -> bool:
    return any(first <= part[0] and part[1] <= last for first, last in stretches)


def _touches(stretches: Sequence[Stretch], part: Stretch) -> bool:
    return any(first <= part[1] and part[0] <= last for first, last in stretches)
