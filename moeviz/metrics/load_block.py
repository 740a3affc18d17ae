"""The loads of several steps as one: a leading axis T in front of what a LoadRecord has.

Judging a step takes some hundred operations on arrays that are so small that calling costs more than computing. Steps
that are judged together share the calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from moeviz.records import LoadRecord

_TABLES = ("counts_LE", "prob_sum_LE", "weight_sum_LE", "bias_LE", "dropped_LE")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadBlock:
    """Loads of T steps in their order; fields as in LoadRecord, arrays with T in front."""

    steps: tuple[int, ...]
    tokens: np.ndarray
    """int64 [T, 1]: one number for all layers of a step."""
    counts_LE: np.ndarray
    prob_sum_LE: np.ndarray | None
    weight_sum_LE: np.ndarray | None
    bias_LE: np.ndarray | None
    dropped_LE: np.ndarray | None
    token_sums: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, records: Sequence[LoadRecord]) -> LoadBlock:
        """Put records side by side. They have the same fields in the same shapes, see `alike`."""
        first = records[0]

        def table(name: str) -> np.ndarray | None:
            return (
                None
                if getattr(first, name) is None
                else np.array([getattr(record, name) for record in records])
            )

        return cls(
            steps=tuple(record.step for record in records),
            tokens=np.array([[record.tokens] for record in records]),
            counts_LE=np.array([record.counts_LE for record in records]),
            prob_sum_LE=table("prob_sum_LE"),
            weight_sum_LE=table("weight_sum_LE"),
            bias_LE=table("bias_LE"),
            dropped_LE=table("dropped_LE"),
            token_sums={
                name: np.array([record.token_sums[name] for record in records]) for name in first.token_sums
            },
        )


def alike(records: Iterable[LoadRecord]) -> Iterator[list[LoadRecord]]:
    """Neighbouring records that `LoadBlock.of` can put side by side."""
    return (list(group) for _, group in groupby(records, key=_form))


def _form(record: LoadRecord) -> tuple[object, ...]:
    tables = (getattr(record, name) for name in _TABLES)
    shapes = (None if table is None else (table.shape, table.dtype) for table in tables)
    return (*shapes, *((name, np.shape(sums)) for name, sums in record.token_sums.items()))
