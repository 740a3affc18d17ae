"""Runs on disk as the view wants them: the one module of the terminal view that asks the store.

Each archive has its own connection, because its questions come from a thread of their own and may take long, while
the feed's must not wait.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from moeviz.metrics import by_id
from moeviz.metrics.latent import TELLING
from moeviz.metrics.load import load_rel, load_share
from moeviz.records import ModelInfo
from moeviz.store import queries
from moeviz.store.catalog import find_runs
from moeviz.store.feed import RunFeed
from moeviz.store.reader import Store, open_run
from tui.archive import Flow, LatentPlace, RunRow, SequenceRef, Source, TokenTrace
from tui.latents import PARTS, LatentKind, LatentSheet, LatentValue
from tui.scene import LoadHistory

MAX_SEQUENCES = 200
FLOW_STEPS = 200
"""Steps behind the newest sampled one whose tokens a flow counts: recent routing, not the whole run's."""


def open_source(path: Path) -> Source:
    """Open the run at `path` for watching.

    Raises:
        RunNotFoundError, CorruptRunError: as `moeviz.store.open_run`.
    """
    return Source(RunFeed(path), StoreArchive(path))


class StoreArchive:
    """Implements `tui.archive.Archive` over a run folder."""

    def __init__(self, path: Path) -> None:
        self._store: Store = open_run(path)

    def loads(self, first_step: int, last_step: int) -> LoadHistory:
        rows = queries.load_history(self._store, first_step, last_step)
        info = self._store.info.model
        num_experts_L = np.array([layer.num_experts for layer in info.layers])
        steps, at_T = np.unique(rows["step"].to_numpy(), return_inverse=True)
        counts_TLE = np.zeros((len(steps), info.num_layers, info.max_experts))
        for at, layer, counts in zip(at_T, rows["layer"], rows["counts"], strict=True):
            counts_TLE[at, layer, : len(counts)] = counts
        rel_TLE = load_rel(load_share(counts_TLE), num_experts_L)
        rel_TLE[:, np.arange(info.max_experts) >= num_experts_L[:, None]] = np.nan
        return LoadHistory(steps, rel_TLE.astype(np.float32))

    def sequences(self) -> list[SequenceRef]:
        rows = queries.sequences(self._store, last=MAX_SEQUENCES)
        return [
            SequenceRef(
                step=int(row.step),
                rank=int(row.rank),
                seq=int(row.seq),
                domain=row.domain if isinstance(row.domain, str) else None,
                num_tokens=int(row.n_tokens),
                mean_loss=_number(row.mean_loss),
            )
            for row in rows.itertuples()
        ]

    def trace(self, ref: SequenceRef) -> TokenTrace:
        arrays = queries.trace_arrays(self._store, ref.step, ref.seq, ref.rank)
        return TokenTrace(
            ref=ref,
            layers=tuple(int(layer) for layer in arrays.layers_L),
            experts_LSK=arrays.experts_LSK,
            weights_LSK=arrays.weights_LSK,
            texts=arrays.texts,
            loss_S=arrays.loss_S,
        )

    def flow(self, layer: int) -> Flow | None:
        info = self._store.info.model
        sampled = queries.step_range(self._store, "routing")
        if sampled is None or layer + 1 >= info.num_layers:
            return None
        last = sampled[1]
        first = max(sampled[0], last - FLOW_STEPS + 1)
        pairs = queries.transitions(self._store, (layer, layer + 1), first=first, last=last)
        if pairs.empty:
            return None
        sizes = (info.layers[layer].num_experts, info.layers[layer + 1].num_experts)
        counts_EE = np.zeros(sizes)
        counts_EE[pairs["source"], pairs["target"]] = pairs["count"]
        return Flow(layer=layer, next_layer=layer + 1, counts_EE=counts_EE, steps=_steps_words(first, last))

    def latents(self, place: LatentPlace) -> LatentSheet | None:
        index = queries.latent_index(self._store)
        index = index[index["step"] <= place.step]
        if index.empty:
            return None
        step = int(index["step"].max())
        index = index[index["step"] == step]
        blocks = tuple(sorted(index["layer"].unique().tolist()))
        block = blocks[-1] if place.block is None or place.block not in blocks else place.block
        names = set(index[index["layer"] == block]["name"])
        kind: LatentKind = "mla" if "kv" in names else "two-stage"
        part = PARTS[kind][place.part]
        part = part if part in names else PARTS[kind][0]
        arrays = queries.latent_arrays(self._store, step, block, part)
        if arrays is None:
            return None
        head = min(place.head, len(arrays.heads_X) - 1)
        rows = queries.latent_profiles(self._store, block, part, step)
        profile = rows.pivot(index="step", columns="place", values="value").sort_index()
        texts = queries.trace_arrays(self._store, step, arrays.seq).texts[arrays.first :][: arrays.length]
        return LatentSheet(
            kind=kind,
            part=part,
            blocks=blocks,
            block=block,
            step=step,
            heads=tuple(each for each in arrays.heads_X if each is not None),
            head=head,
            tokens=arrays.tokens,
            first=arrays.first,
            length=arrays.length,
            texts=texts if len(texts) == arrays.grid_XSC.shape[1] else (),
            grid_SC=arrays.grid_XSC[head],
            singular_R=arrays.singular_XR[head],
            steps_T=profile.index.to_numpy(),
            profile_TC=profile.to_numpy(),
            values=self._latent_values(kind, step, block),
        )

    def _latent_values(self, kind: LatentKind, step: int, block: int) -> tuple[LatentValue, ...]:
        rows = queries.latent_metrics(self._store, step)
        rows = rows[(rows["step"] == step) & (rows["layer"] == block)]
        values = dict(zip(rows["name"], rows["value"], strict=True))
        known = [by_id(name) for name in TELLING[kind] if name in values]
        return tuple(
            LatentValue(metric.name, float(values[metric.id]), metric.unit, metric.how_to_read)
            for metric in known
        )

    def close(self) -> None:
        self._store.close()


def list_rows(folder: Path) -> list[RunRow]:
    """The runs directly in `folder`, newest first."""
    shapes = {str(path): shape_words(info.model) for path, info in find_runs(folder)}
    now = time.time()
    return [_run_row(row, shapes, now) for row in queries.list_runs(folder).to_dict("records")]


def _run_row(row: dict[str, Any], shapes: dict[str, str], now: float) -> RunRow:
    step, planned, alerts = (_number(row[name]) for name in ("last_step", "planned_steps", "open_alerts"))
    return RunRow(
        path=Path(row["path"]),
        name=row["name"],
        state=row["state"],
        step=-1 if math.isnan(step) else int(step),
        planned_steps=None if math.isnan(planned) else int(planned),
        shape=shapes.get(row["path"], ""),
        loss=_number(row["loss"]),
        worst_entropy=_number(row["worst_entropy"]),
        open_alerts=0 if math.isnan(alerts) else int(alerts),
        age_seconds=now - _number(row["created"]),
    )


def shape_words(info: ModelInfo) -> str:
    """`24 × 64, top 8`; `16 × 8-64, top 2` where layers differ."""
    if not info.layers:
        return ""
    experts = sorted({layer.num_experts for layer in info.layers})
    top_k = sorted({layer.top_k for layer in info.layers})
    span = [f"{values[0]}-{values[-1]}" if len(values) > 1 else str(values[0]) for values in (experts, top_k)]
    return f"{info.num_layers} × {span[0]}, top {span[1]}"


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float | np.number) else math.nan


def _steps_words(first: int, last: int) -> str:
    return f"step {last}" if first == last else f"steps {first} to {last}"
