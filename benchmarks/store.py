"""What the store costs and how fast it answers: one writer's work, and the queries of the views.

The run is that of a model with 24 layers of 64 experts, top-8, and one sampled sequence of 256 tokens a step
(49,152 decisions). Experts are drawn from uneven distributions, a fixed seed. Queries are asked live (a file a
flush), compacted and packed, warm, through the functions that the dashboards call.

    python benchmarks/store.py --decisions 1000000 10000000 --out store.json
    python benchmarks/store.py --hundred-million        # adds 1e8: some minutes, 400 MB of disk
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_report import Bar, machine, publish

from moeviz.records import LayerInfo, LoadRecord, ModelInfo, Record, TokenRoutingRecord
from moeviz.store import RunInfo, SegmentWriter, Store, create_run, open_run, pack_run
from moeviz.store.compact import Rules, compact_run
from moeviz.store.queries_loads import load_matrix, load_over_time
from moeviz.store.queries_paths import coactivation
from moeviz.store.queries_tokens import token_flow
from moeviz.store.segments import segment_names

L, E, K, S = 24, 64, 8, 256
A_STEP = L * S * K
"""Decisions of a step."""
QUERY_MS, WRITER_MS, DECISION_BYTES, LOADS_BYTES = 50.0, 30.0, 1.7, 9000.0
FLOW = "flow of one sequence"
LAYER = 11


class Steps:
    """Records of a made-up run: a pool of steps, handed out in turn under new numbers."""

    def __init__(self, pool: int = 8) -> None:
        self._routing = [self._draw(np.random.default_rng(seed)) for seed in range(pool)]

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        taste_LE = rng.normal(size=(L, 1, 1, E))
        scores = taste_LE + rng.gumbel(size=(L, 1, S, E))
        experts_LNSK = np.argsort(-scores, axis=-1)[..., :K].astype(np.uint16)
        weights = np.take_along_axis(np.exp(taste_LE + rng.normal(size=scores.shape)), experts_LNSK, -1)
        weights = -np.sort(-weights / weights.sum(-1, keepdims=True), axis=-1)
        return experts_LNSK, weights.astype(np.float32)

    def routing(self, step: int) -> TokenRoutingRecord:
        experts_LNSK, weights_LNSK = self._routing[step % len(self._routing)]
        return TokenRoutingRecord(
            step=step,
            rank=0,
            layers=np.arange(L),
            seqs=np.array([0]),
            experts_LNSK=experts_LNSK,
            weights_LNSK=weights_LNSK,
            lengths_N=np.array([S]),
        )

    def load(self, step: int) -> LoadRecord:
        """Loads of 16 such sequences, with noise of their own: nothing for the compressor to copy."""
        rng = np.random.default_rng((1, step))
        counts_LE = np.stack([rng.multinomial(16 * S * K, np.full(E, 1 / E)) for _ in range(L)])
        noise_LE = rng.normal(1, 0.05, (L, E)).astype(np.float32)
        sums = {name: rng.random(L, dtype=np.float32) for name in ("entropy_nats", "confidence", "margin")}
        return LoadRecord(
            step=step,
            rank=0,
            ts=float(step),
            tokens=16 * S,
            counts_LE=counts_LE,
            prob_sum_LE=counts_LE.astype(np.float32) / K * noise_LE,
            weight_sum_LE=counts_LE.astype(np.float32) / K * noise_LE[::-1],
            token_sums=sums,
        )


def new_run(path: Path) -> Path:
    layers = tuple(
        LayerInfo(layer=at, name=f"layers.{at}.gate", block=at, num_experts=E, top_k=K) for at in range(L)
    )
    return create_run(path, RunInfo(name="bench", model=ModelInfo(family="bench", layers=layers)))


def ingest(path: Path, records: Iterator[Record], flush_every: int) -> tuple[float, int]:
    """Write records through a `SegmentWriter`. Returns processor seconds and bytes on disk."""
    writer = SegmentWriter(new_run(path), flush_seconds=1e9, sidecar=False)
    begin = time.process_time()
    for index, record in enumerate(records):
        writer.write(record)
        if (index + 1) % flush_every == 0:
            writer.flush()
    writer.close()
    return time.process_time() - begin, writer.stats.bytes


def writer_rows(folder: Path, steps: Steps, rounds: int) -> list[dict[str, Any]]:
    """Processor time and bytes of token-level rows, and of loads, median over rounds."""
    routing, loads = [], []
    for index in range(rounds):
        count = 60  # 2.9 million decisions, 5 steps a flush: a model that trains 5 steps a second
        seconds, size = ingest(folder / f"routing{index}", map(steps.routing, range(count)), 5)
        decisions = count * A_STEP
        routing.append((seconds * 1e3 / (decisions / 1e6), size / decisions))
        made = [steps.load(step) for step in range(200)]
        seconds, size = ingest(folder / f"loads{index}", iter(made), 5)
        loads.append((seconds * 1e3 / 200, size / 200))
    (ms, size), (load_ms, load_size) = np.median(routing, axis=0), np.median(loads, axis=0)
    return [
        _row("writer", "routing: processor time of 1e6 decisions", float(ms), "ms", WRITER_MS),
        _row("writer", "routing: one decision on disk", float(size), "bytes", DECISION_BYTES),
        _row("writer", "loads 24 x 64: processor time of a step", float(load_ms), "ms", None),
        _row("writer", "loads 24 x 64: one step on disk", float(load_size), "bytes", LOADS_BYTES),
    ]


def _row(where: str, what: str, value: float, unit: str, at_most: float | None) -> dict[str, Any]:
    return {
        "state": where,
        "what": what,
        "median": value,
        "best": "",
        "unit": unit,
        "bar": at_most if at_most is not None else "",
        "x bar": value / at_most if at_most is not None else "",
        "files": "",
    }


def _history(steps: Steps, count: int) -> Iterator[Record]:
    for step in range(count):
        yield steps.routing(step)
        yield steps.load(step)


def query_rows(folder: Path, steps: Steps, decisions: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Times of the questions over one run: live, compacted, packed."""
    count = -(-decisions // A_STEP)
    path = folder / f"run{decisions}"
    ingest(path, _history(steps, count), 2 * 5)
    yield from _ask(path, f"{decisions:.0e} live", count, repeats)
    rules = Rules(fan_in=2, delay_seconds=0.0, grace_seconds=0.0)
    while compact_run(path, rules).merged:
        time.sleep(0.01)
    compact_run(path, rules)
    yield from _ask(path, f"{decisions:.0e} compacted", count, repeats)
    begin = time.perf_counter()
    packed = pack_run(path, force=True)
    yield _row(
        f"{decisions:.0e}", f"packing, to {packed.bytes / 1e6:.1f} MB", time.perf_counter() - begin, "s", None
    )
    yield from _ask(path, f"{decisions:.0e} packed", count, repeats)


def _ask(path: Path, state: str, count: int, repeats: int) -> Iterator[dict[str, Any]]:
    files = sum(len(segment_names(path / table)) for table in ("routing", "expert_load"))
    with open_run(path) as store:
        for what, question in _questions(store, count).items():
            times = _times(question, repeats)
            yield _row(state, what, 1e3 * float(np.median(times)), "ms", QUERY_MS) | {
                "best": 1e3 * min(times),
                "files": files,
            }


def _questions(store: Store, count: int) -> dict[str, Callable[[], object]]:
    middle = count // 2
    return {
        "last step's load": partial(load_matrix, store),
        FLOW: partial(token_flow, store, middle, 0),
        "500-point load curve of a layer": partial(load_over_time, store, LAYER, 500),
        "co-activation over 100 steps": partial(
            coactivation, store, LAYER, max(0, middle - 50), min(count, middle + 50) - 1
        ),
    }


def _times(question: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each warm answer; the first one is not counted."""
    question()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        question()
        times.append(time.perf_counter() - begin)
    return times


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    return [
        Bar(what=f"{row['state']}: {row['what']}", value=row["median"], at_most=row["bar"], unit=row["unit"])
        for row in rows
        if row["bar"] != ""
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decisions", type=int, nargs="+", default=[10**6, 10**7], help="sizes of the runs")
    parser.add_argument("--hundred-million", action="store_true", help="a run of 1e8 decisions as well")
    parser.add_argument("--repeats", type=int, default=15, help="warm answers a question (default 15)")
    parser.add_argument("--rounds", type=int, default=5, help="of the writer's measurement (default 5)")
    parser.add_argument("--folder", type=Path, help="where runs are made (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    before = machine()
    sizes = [*options.decisions, *([10**8] if options.hundred_million else [])]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        steps = Steps()
        rows = writer_rows(Path(folder), steps, options.rounds)
        for decisions in sizes:
            rows += query_rows(Path(folder), steps, decisions, options.repeats)
    publish("store: writing and asking", rows, bars_of(rows), before, options.out)


if __name__ == "__main__":
    main()
