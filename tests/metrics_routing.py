"""Routing made for tests of metrics and alerts: tiny tables, loop oracles, the published counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeviz.records import AlertRecord, LayerInfo, LoadRecord, ModelInfo, Record

REPOSITORY = Path(__file__).resolve().parents[1]


def top_k_ids(scores_TE: np.ndarray, top_k: int) -> np.ndarray:
    """Ids of the k largest scores of each token, by falling score."""
    return np.argsort(-scores_TE, axis=-1, kind="stable")[..., :top_k]


def count_by_loop(ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Assignments per expert, one token at a time."""
    counts_E = np.zeros(num_experts, dtype=np.int64)
    for token in ids_TK:
        for expert in token:
            counts_E[expert] += 1
    return counts_E


def model(num_layers: int, num_experts: int, top_k: int, **layer: Any) -> ModelInfo:
    """A model of equal MoE layers."""
    layers = [
        LayerInfo(
            layer=index,
            name=f"layers.{index}.mlp.gate",
            block=index,
            num_experts=num_experts,
            top_k=top_k,
            **layer,
        )
        for index in range(num_layers)
    ]
    return ModelInfo(family="test", layers=tuple(layers))


def load_record(step: int, counts_LE: np.ndarray, top_k: int, **fields: Any) -> LoadRecord:
    """A load record whose tokens follow from its counts."""
    tokens = int(counts_LE[0].sum()) // top_k
    return LoadRecord(step=step, rank=0, ts=float(step), tokens=tokens, counts_LE=counts_LE, **fields)


class ListSink:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = False

    def write(self, record: Record) -> None:
        self.records.append(record)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def of(self, kind: type) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]

    @property
    def alerts(self) -> list[AlertRecord]:
        return self.of(AlertRecord)


def published_folder() -> Path:
    """Folder of the published OLMoE and Mixtral routing counts; skips the test when it is not there."""
    root = Path(os.environ.get("MOEVIZ_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / "olmoe_routing"
    if not (folder / "expert_counts.json").exists():
        pytest.skip("published counts not found; set MOEVIZ_SHARED_DATA to the folder of olmoe_routing")
    return folder


def published_counts(model_name: str, domain: str, *, top1: bool = False) -> np.ndarray:
    """int64 [3, E]: assignments per expert in layers 0, 7 and 15."""
    table = json.loads((published_folder() / "expert_counts.json").read_text())[model_name]
    return np.array(table["expert_counts_top1" if top1 else "expert_counts"][domain], dtype=np.int64)
