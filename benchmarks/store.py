"""What the store costs and how fast it answers: one writer's work, and the queries of the views.

The run is that of a model with 24 layers of 64 experts, top-8, and one sampled sequence of 256 tokens a step
(49,152 decisions). Experts are drawn from uneven distributions, a fixed seed. Queries are asked live (a file a
flush, nothing merged), compacted and packed, warm, through the functions that the dashboards call. Beside the
median of the wall time stand the best one and the processor time of all threads: on a busy machine these two say
more.

    python benchmarks/store.py --decisions 1000000 10000000 --out store.json
    python benchmarks/store.py --hundred-million        # adds 1e8: some minutes, 600 MB of disk
    python benchmarks/store.py --curve-steps 100000     # adds the load curve of a long run: some minutes, 500 MB
    python benchmarks/store.py --hundred-million --keep FOLDER     # made runs stay there and are used again
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_report import Bar, machine, publish, save

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
CURVE_MS = 40.0
TITLE = "store: writing and asking"


class Steps:
    """Records of a made-up run: a pool of steps, handed out in turn under new numbers.

    Tokens are in an order of their own each time, and the pool is larger than what is compressed together, so that
    nothing repeats which a real run would not repeat.
    """

    def __init__(self, pool: int = 48) -> None:
        self._routing = [self._draw(np.random.default_rng(seed)) for seed in range(pool)]

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        taste_LE = rng.normal(size=(L, 1, 1, E))
        scores = taste_LE + rng.gumbel(size=(L, 1, S, E))
        experts_LNSK = np.argsort(-scores, axis=-1)[..., :K].astype(np.uint16)
        weights = np.take_along_axis(np.exp(taste_LE + rng.normal(size=scores.shape)), experts_LNSK, -1)
        weights = -np.sort(-weights / weights.sum(-1, keepdims=True), axis=-1)
        return experts_LNSK, weights.astype(np.float32)

    def routing(self, step: int) -> TokenRoutingRecord:
        order_S = np.random.default_rng((2, step)).permutation(S)
        drawn = self._routing[step % len(self._routing)]
        experts_LNSK, weights_LNSK = (np.ascontiguousarray(each[:, :, order_S]) for each in drawn)
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
        records = [steps.routing(step) for step in range(index * count, (index + 1) * count)]
        seconds, size = ingest(folder / f"routing{index}", iter(records), 5)
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
        "processor": "",
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
    path = _made(folder, f"live{decisions}", lambda new: ingest(new, _history(steps, count), 2 * 5))
    yield from _ask(path, f"{decisions:.0e} live", _questions(count), repeats)
    path = _made(folder, f"compacted{decisions}", lambda new: _compact(shutil.copytree(path, new)))
    yield from _ask(path, f"{decisions:.0e} compacted", _questions(count), repeats)
    took: list[float] = []
    packed = _made(folder, f"packed{decisions}", lambda new: took.append(_pack(shutil.copytree(path, new))))
    if took:
        what = f"packing, to {(packed / 'run.duckdb').stat().st_size / 1e6:.1f} MB"
        yield _row(f"{decisions:.0e}", what, took[0], "s", None)
    yield from _ask(packed, f"{decisions:.0e} packed", _questions(count), repeats)


def curve_rows(folder: Path, steps: Steps, count: int, repeats: int) -> Iterator[dict[str, Any]]:
    """The 500-point load curve of a run of `count` steps with counts alone: compacted, then packed."""
    few = [steps.load(step) for step in range(64)]

    def history() -> Iterator[Record]:
        for step in range(count):
            one = few[step % len(few)]
            counts_LE = np.roll(one.counts_LE, step, axis=1)
            yield replace(one, step=step, counts_LE=counts_LE, prob_sum_LE=None, weight_sum_LE=None)

    def make(new: Path) -> None:
        ingest(new, history(), 250)
        _compact(new)

    path = _made(folder, f"curve{count}", make)
    question = {f"500-point load curve of {count:,} steps": lambda store: load_over_time(store, LAYER, 500)}
    for state, at in (("compacted", path), ("packed", None)):
        at = at or _made(folder, f"curve{count}-packed", lambda new: _pack(shutil.copytree(path, new)))
        for row in _ask(at, f"{count:,} steps {state}", question, repeats):
            yield row | {"bar": CURVE_MS, "x bar": row["median"] / CURVE_MS}


def _made(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The run `name` in `folder`, made first unless it is there."""
    path, unfinished = folder / name, folder / f"{name}.unfinished"
    if not path.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(path)
    return path


def _compact(path: Path) -> None:
    """Merge until nothing is left to merge, and let what is covered go."""
    rules, late = Rules(fan_in=2, delay_seconds=0.0, grace_seconds=0.0), time.time()
    while compact_run(path, rules).merged:
        time.sleep(max(0.0, late + 0.01 - time.time()))
        late = time.time()
    compact_run(path, rules)


def _pack(path: Path) -> float:
    begin = time.perf_counter()
    pack_run(path, force=True)
    return time.perf_counter() - begin


Questions = dict[str, Callable[[Store], object]]


def _ask(path: Path, state: str, questions: Questions, repeats: int) -> Iterator[dict[str, Any]]:
    files = sum(len(segment_names(path / table)) for table in ("routing", "expert_load"))
    with open_run(path) as store:
        for what, question in questions.items():
            wall, processor = _times(partial(question, store), repeats)
            yield _row(state, what, 1e3 * float(np.median(wall)), "ms", QUERY_MS) | {
                "best": 1e3 * min(wall),
                "processor": 1e3 * float(np.median(processor)),
                "files": files,
            }


def _questions(count: int) -> Questions:
    middle = count // 2
    first, last = max(0, middle - 50), min(count, middle + 50) - 1
    return {
        "last step's load": load_matrix,
        FLOW: lambda store: token_flow(store, middle, 0),
        "500-point load curve of a layer": lambda store: load_over_time(store, LAYER, 500),
        "co-activation over 100 steps": lambda store: coactivation(store, LAYER, first, last),
    }


def _times(question: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    """Wall and processor seconds of each warm answer; the first one is not counted."""
    question()
    wall, processor = [], []
    for _ in range(repeats):
        begin, busy = time.perf_counter(), time.process_time()
        question()
        wall.append(time.perf_counter() - begin)
        processor.append(time.process_time() - busy)
    return wall, processor


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
    parser.add_argument("--decisions", type=int, nargs="*", default=[10**6, 10**7], help="sizes of the runs")
    parser.add_argument("--hundred-million", action="store_true", help="a run of 1e8 decisions as well")
    parser.add_argument("--repeats", type=int, default=15, help="warm answers a question (default 15)")
    parser.add_argument("--rounds", type=int, default=5, help="of the writer's measurement (default 5)")
    parser.add_argument("--curve-steps", type=int, help="a run of so many steps for its load curve as well")
    parser.add_argument(
        "--keep", type=Path, help="make the runs in this folder, and use those that are there"
    )
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON, as they come")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    before, rows = machine(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        for row in measured(Path(temporary), options):
            rows.append(row)
            print(
                f"{row['state']}: {row['what']}: {row['median']:.4g} {row['unit']}",
                file=sys.stderr,
                flush=True,
            )
            save(TITLE, rows, bars_of(rows), before, options.out)
    publish(TITLE, rows, bars_of(rows), before, options.out)


def measured(temporary: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row, as it comes."""
    steps, kept = Steps(), options.keep or temporary
    kept.mkdir(parents=True, exist_ok=True)
    yield from writer_rows(temporary, steps, options.rounds)
    for decisions in [*options.decisions, *([10**8] if options.hundred_million else [])]:
        yield from query_rows(kept, steps, decisions, options.repeats)
    if options.curve_steps:
        yield from curve_rows(kept, steps, options.curve_steps, options.repeats)


if __name__ == "__main__":
    main()
