"""What every step has (loads, metrics, scalars) -> rows, many steps at once.

One step alone is small: naming the columns costs more than filling them. So a writer keeps these records until it
flushes, and encodes the steps of a second together.

Shapes: N records of one shape, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from moeviz.records import LoadRecord, MetricRecord, ScalarRecord
from moeviz.store.columns import Rows, ragged, table_rows
from moeviz.store.quantise import significant
from moeviz.store.schema import MEANS

StepRecord = LoadRecord | MetricRecord | ScalarRecord


def encode_steps(records: Sequence[StepRecord], num_experts: Sequence[int] = ()) -> Iterator[Rows]:
    """The rows of records, in their order; those of one kind and shape in one batch, neighbours or not.

    Args:
        records: of any of the three kinds.
        num_experts: experts of each MoE layer; lists of loads are cut to it. Empty: keep all columns.
    """
    alike: dict[tuple[object, ...], list[Any]] = {}
    for record in records:
        alike.setdefault(_shape(record), []).append(record)
    for same in alike.values():
        if isinstance(same[0], LoadRecord):
            yield from _loads(same, num_experts)
        elif isinstance(same[0], MetricRecord):
            yield from _metrics(same)
        else:
            yield from _scalars(same)


def _shape(record: StepRecord) -> tuple[object, ...]:
    if isinstance(record, LoadRecord):
        arrays = (record.prob_sum_LE, record.weight_sum_LE, record.bias_LE, record.dropped_LE)
        return LoadRecord, record.counts_LE.shape, *(a is None for a in arrays), *record.token_sums
    if isinstance(record, MetricRecord):
        return MetricRecord, *record.values, *_shapes(record.values)
    return (ScalarRecord,)


def _shapes(values: Mapping[str, np.ndarray | float]) -> list[tuple[int, ...]]:
    return [value.shape if isinstance(value, np.ndarray) else np.shape(value) for value in values.values()]


def _loads(records: Sequence[LoadRecord], num_experts: Sequence[int]) -> Iterator[Rows]:
    num_layers, width = records[0].counts_LE.shape
    sizes_L = np.asarray(num_experts if len(num_experts) == num_layers else [width] * num_layers)
    sizes_R = np.tile(sizes_L, len(records))

    def each(name: str, dtype: type) -> np.ndarray:
        """A number of the record, in each of its rows."""
        return np.repeat(np.array([getattr(record, name) for record in records], dtype), num_layers)

    def table(name: str, dtype: type, scores: bool = False) -> pa.ListArray | None:
        if getattr(records[0], name) is None:
            return None
        values_RE = np.concatenate([getattr(record, name) for record in records])
        return ragged(significant(values_RE) if scores else values_RE, sizes_R, dtype)

    tokens_R = np.maximum(each("tokens", np.int64), 1)
    sums = {
        name: np.concatenate([record.token_sums[name] for record in records])
        for name in records[0].token_sums
    }
    columns: dict[str, Any] = {
        "step": each("step", np.int32),
        "rank": each("rank", np.uint16),
        "layer": np.tile(np.arange(num_layers, dtype=np.uint16), len(records)),
        "ts": each("ts", np.float64),
        "tokens": each("tokens", np.uint32),
        "counts": table("counts_LE", np.uint32),
        "prob_sum": table("prob_sum_LE", np.float32, scores=True),
        "weight_sum": table("weight_sum_LE", np.float32, scores=True),
        "bias": table("bias_LE", np.float32),
        "dropped": table("dropped_LE", np.uint32),
    }
    for name, column in MEANS.items():
        if name in sums:
            columns[column] = np.asarray(sums[name], dtype=np.float32) / tokens_R.astype(np.float32)
    yield table_rows("expert_load", columns, len(records) * num_layers)
    others = [name for name in sums if name not in MEANS]
    if others:
        tokens_N1 = np.maximum([record.tokens for record in records], 1)[:, None]
        means = [
            np.asarray(sums[name], dtype=np.float64).reshape(-1, num_layers) / tokens_N1 for name in others
        ]
        shapes = {f"mean/{name}": (num_layers,) for name in others}
        yield _metric_rows([record.step for record in records], shapes, np.stack(means, axis=1).reshape(-1))


def _metrics(records: Sequence[MetricRecord]) -> Iterator[Rows]:
    """Rows of records whose values have the same names and shapes."""
    shapes = dict(zip(records[0].values, _shapes(records[0].values), strict=True))
    if not shapes:
        return
    values: list[Any] = [value for record in records for value in record.values.values()]
    if any(len(shape) != 1 for shape in shapes.values()):
        values = [np.reshape(value, -1) for value in values]
    values_R = np.concatenate(values, dtype=np.float64, casting="unsafe")
    yield _metric_rows([record.step for record in records], shapes, values_R)


def _metric_rows(steps: Sequence[int], shapes: Mapping[str, tuple[int, ...]], values_R: np.ndarray) -> Rows:
    """`values_R`: of each step, then of each name, then of each layer; of shape () is a value of the whole run."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    own = [np.arange(size) if shape else [-1] for size, shape in zip(sizes, shapes.values(), strict=True)]
    layers_R = np.tile(np.concatenate(own), len(steps))
    names = np.repeat(np.arange(len(shapes)), sizes)
    columns = {
        "step": np.repeat(np.asarray(steps, dtype=np.int32), sum(sizes)),
        "layer": pa.array(layers_R.astype(np.uint16), mask=layers_R < 0),
        "name": pa.array(list(shapes)).take(pa.array(np.tile(names, len(steps)))),
        "value": values_R,
    }
    return table_rows("metrics", columns, len(layers_R))


def _scalars(records: Sequence[ScalarRecord]) -> Iterator[Rows]:
    sizes = [len(record.values) for record in records]
    if not sum(sizes):
        return
    columns = {
        "step": np.repeat(np.array([record.step for record in records], np.int32), sizes),
        "rank": np.repeat(np.array([record.rank for record in records], np.uint16), sizes),
        "ts": np.repeat(np.array([record.ts for record in records], np.float64), sizes),
        "name": [name for record in records for name in record.values],
        "value": [float(value) for record in records for value in record.values.values()],
    }
    yield table_rows("scalars", columns, sum(sizes))
