"""Seeded records with the raw arrays kept beside them, so that a test can recount what the store says.

Shapes are tiny and pairwise different: L=3 layers of E=5, 7, 4 experts (ragged), K=2, N=3 sequences of S=6.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeviz.records import (
    AlertRecord,
    AttentionRecord,
    EventRecord,
    LayerInfo,
    LoadRecord,
    MetricRecord,
    ModelInfo,
    Record,
    ScalarRecord,
    SequenceRecord,
    Sink,
    TokenRoutingRecord,
)
from moeviz.store import run as run_module
from moeviz.store.run import RunInfo, create_run, write_vocab
from moeviz.store.views import write_database

EXPERTS = (5, 7, 4)
K, N, S, V = 2, 3, 6, 11
L, E = len(EXPERTS), max(EXPERTS)
DOMAINS = ("prose", "code", None)


def model_info(experts: tuple[int, ...] = EXPERTS, top_k: int = K) -> ModelInfo:
    layers = tuple(
        LayerInfo(
            layer=at, name=f"blocks.{at}.gate", block=at, num_experts=size, top_k=top_k, has_bias=at == 0
        )
        for at, size in enumerate(experts)
    )
    return ModelInfo(family="test", layers=layers, num_parameters=1234)


def new_run(path: Path, **facts: Any) -> Path:
    """A run folder whose views are written in this process: a second of start-up less than in one of their own."""
    fields: dict[str, Any] = {"name": path.name, "model": model_info(), "planned_steps": 100} | facts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "write_views", write_database)
        create_run(path, RunInfo(**fields))
    write_vocab(path, [f"t{token_id}" for token_id in range(V)])
    return path


class Step:
    """All decisions of one step of one rank: every token is sampled, so counts can be recounted from tokens."""

    def __init__(self, step: int, rank: int = 0, seed: int = 0) -> None:
        rng = np.random.default_rng((seed, step, rank))
        self.step, self.rank, self.ts = step, rank, 1_700_000_000.0 + step
        self.lengths_N = np.array([S, *rng.integers(1, S, N - 1)])
        self.experts_LNSK = np.stack(
            [rng.random((N, S, size)).argsort(-1)[..., :K] for size in EXPERTS]
        ).astype(np.uint16)
        self.weights_LNSK = -np.sort(-rng.random((L, N, S, K), dtype=np.float32))
        self.token_ids_NS = rng.integers(0, V, (N, S)).astype(np.int32)
        self.loss_NS = rng.random((N, S), dtype=np.float32) * 5
        self.loss_NS[:, -1] = np.nan
        self.map_QC = rng.dirichlet(np.ones(5), 4).astype(np.float32)
        self.tokens = int(self.lengths_N.sum())
        self.counts_LE = np.zeros((L, E), dtype=np.int64)
        for layer in range(L):
            for n in range(N):
                np.add.at(self.counts_LE[layer], self.experts_LNSK[layer, n, : self.lengths_N[n]].ravel(), 1)
        self.entropy_L = rng.random(L).astype(np.float32) * self.tokens
        self.other_L = rng.random(L) * self.tokens
        self.bias_LE = rng.normal(size=(L, E)).astype(np.float32)
        self.loss = float(self.loss_NS[:, 0].mean())

    def records(self) -> Iterator[Record]:
        at: dict[str, Any] = {"step": self.step, "rank": self.rank}
        yield TokenRoutingRecord(
            **at,
            layers=np.arange(L),
            seqs=np.arange(N),
            experts_LNSK=self.experts_LNSK,
            weights_LNSK=self.weights_LNSK,
            lengths_N=self.lengths_N,
        )
        yield SequenceRecord(
            **at,
            seqs=np.arange(N),
            token_ids_NS=self.token_ids_NS,
            lengths_N=self.lengths_N,
            domains=DOMAINS,
            token_loss_NS=self.loss_NS,
        )
        yield AttentionRecord(**at, layer=1, head=2, seq=0, map_QC=self.map_QC, q_len=40, k_len=50)
        yield ScalarRecord(**at, ts=self.ts, values={"loss": self.loss, "lr": 1e-3})
        yield MetricRecord(step=self.step, values={"gini": self.entropy_L / 7, "maxvio": 0.25 * self.step})
        yield LoadRecord(
            **at,
            ts=self.ts,
            tokens=self.tokens,
            counts_LE=self.counts_LE,
            prob_sum_LE=self.counts_LE.astype(np.float32) / K,
            weight_sum_LE=self.counts_LE.astype(np.float32) / 3,
            bias_LE=self.bias_LE,
            token_sums={"entropy_nats": self.entropy_L, "other": self.other_L},
        )


def write_steps(sink: Sink, steps: range, rank: int = 0, seed: int = 0, flush_every: int = 1) -> list[Step]:
    """Write steps, making every `flush_every` of them visible in one flush."""
    written = []
    for step in steps:
        one = Step(step, rank, seed)
        for record in one.records():
            sink.write(record)
        written.append(one)
        if len(written) % flush_every == 0:
            sink.flush()
    sink.flush()
    return written


def alert(
    episode: str, step: int, cleared: int | None = None, severity: str = "error", **facts: Any
) -> AlertRecord:
    fields: dict[str, Any] = {
        "episode": episode,
        "rule": episode.split("/")[0],
        "rule_version": 1,
        "layer": 1,
        "experts": (2, 3),
        "severity": severity,
        "raised_step": int(episode.split("/")[-1]),
        "updated_step": step,
        "cleared_step": cleared,
        "value": 0.5,
        "peak": 0.4,
        "threshold": 0.7,
        "message": "entropy is low",
        "remedy": "raise the balance loss",
        "evidence": {"steps": [1, 2], "note": "x"},
    } | facts
    return AlertRecord(**fields)


def event(step: int, kind: str, ts: float = 0.0, **detail: Any) -> EventRecord:
    return EventRecord(step=step, rank=0, ts=ts or 1_700_000_000.0 + step, kind=kind, detail=detail)
