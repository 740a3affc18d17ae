"""Published counts: tokens per expert of trained models, by domain, without a single token.

The form of the counts derived from the OLMoE authors' routing analysis (Muennighoff et al. 2024, arXiv:2409.02060):

    {MODEL: {"experts": 64, "top_k": 8, "layers": [0, 7, 15], "expert_counts": {DOMAIN: [[...], [...], [...]]}}}

A domain becomes a step: the load views then step through domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from moeviz.errors import MoevizError
from moeviz.imports.recording import RouterKey
from moeviz.records import EventRecord, LayerInfo, LoadRecord, ModelInfo, Record


class PublishedCounts(NamedTuple):
    """Counts of one model."""

    model_name: str
    model: ModelInfo
    counts_LE: dict[str, np.ndarray]
    """By domain, int64."""

    def records(self, step: int, ts: float) -> Iterator[Record]:
        """The load of domain number `step`, and an event that names it."""
        domain = list(self.counts_LE)[step]
        counts_LE = self.counts_LE[domain]
        tokens = int(counts_LE[0].sum()) // self.model.layers[0].top_k
        yield EventRecord(
            step=step, rank=0, ts=ts, kind="domain", detail={"domain": domain, "tokens": tokens}
        )
        yield LoadRecord(step=step, rank=0, ts=ts, tokens=tokens, counts_LE=counts_LE)


def read_published(path: Path, model_name: str | None = None) -> PublishedCounts:
    """Read the counts of one model.

    Args:
        path: the JSON file.
        model_name: which of its models; None: the first.

    Raises:
        MoevizError: no such model, or counts that no top-k router makes.
    """
    try:
        models = orjson.loads(path.read_bytes())
        model_name = model_name or next(iter(models))
        if model_name not in models:
            raise MoevizError(
                f"{path} has no model {model_name!r}; give --model with one of {', '.join(models)}"
            )
        return _checked(path, model_name, models[model_name])
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise MoevizError(
            f"{path} holds no published counts ({error!r}); it needs experts, top_k, layers, expert_counts"
        ) from error


def _checked(path: Path, model_name: str, facts: Mapping[str, Any]) -> PublishedCounts:
    num_experts, top_k, blocks = int(facts["experts"]), int(facts["top_k"]), list(facts["layers"])
    counts: dict[str, np.ndarray] = {}
    for domain, rows in facts["expert_counts"].items():
        if [len(row) for row in rows] != [num_experts] * len(blocks):
            raise MoevizError(
                f"{path}: {model_name}, {domain} is not {len(blocks)} layers of {num_experts} counts; correct it"
            )
        counts_LE = np.array(rows, dtype=np.int64)
        sums_L = counts_LE.sum(1)
        if (counts_LE < 0).any() or (sums_L != sums_L[0]).any() or sums_L[0] % top_k:
            raise MoevizError(
                f"{path}: {model_name}, {domain} sums to {sums_L.tolist()} over its layers; each must be the same "
                f"number of tokens times top_k={top_k}"
            )
        counts[domain] = counts_LE
    layers = tuple(
        LayerInfo(layer=at, name=RouterKey(-1, block).name, block=block, num_experts=num_experts, top_k=top_k)
        for at, block in enumerate(blocks)
    )
    return PublishedCounts(model_name, ModelInfo(family=model_name, layers=layers), counts)
