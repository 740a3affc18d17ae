"""What metrics and alerts of every step cost: processor time of one step in the thread that derives them.

    python benchmarks/alert_cost.py --out alert_cost.json
    python benchmarks/alert_cost.py --layers 6 --experts 8 --top-k 2        a small model: what one step costs at least

48 layers of 256 experts by default, everything recorded (scores, weights, bias, sums of decisions), in the states that
differ in work: balanced routing, a third of the layers skewed with their alerts open, every layer in collapse, and
layers of different width. Numbers are processor time, so that a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_report import Bar, machine, publish

from moeviz.derive import DeriveSink
from moeviz.records import LayerInfo, LoadRecord, ModelInfo, Record

TOKENS = 8192
_SUMS = ("entropy_nats", "confidence", "margin", "lse_squared", "logit_squared")
_DISTINCT = 64
"""Records drawn; longer runs repeat them."""


class Nowhere:
    """A sink that drops what it gets and counts alerts."""

    def __init__(self) -> None:
        self.records = 0

    def write(self, record: Record) -> None:
        self.records += 1

    def flush(self) -> None: ...

    def close(self) -> None: ...


def widths(num_layers: int, num_experts: int, state: str) -> np.ndarray:
    """Experts of each layer."""
    mixed = state == "mixed widths"
    return np.array([num_experts // (1 + (mixed and layer % 2)) for layer in range(num_layers)])


def records(num_layers: int, num_experts: int, top_k: int, state: str) -> Iterator[LoadRecord]:
    """Records without end of a model in this state."""
    rng = np.random.default_rng(0)
    width_L = widths(num_layers, num_experts, state)
    weight_LE = (np.arange(num_experts) < width_L[:, None]).astype(np.float64)
    if state == "a third skewed":
        weight_LE[::3, : num_experts // 2] = 1e-4
    if state == "all collapsed":
        weight_LE[:, top_k:] = 1e-5
    share_LE = weight_LE / weight_LE.sum(axis=1, keepdims=True)
    drawn = [
        np.stack([rng.multinomial(TOKENS * top_k, share_E) for share_E in share_LE]) for _ in range(_DISTINCT)
    ]
    sums_LE = [counts_LE.astype(np.float32) / top_k for counts_LE in drawn]
    bias_LE = (rng.normal(size=share_LE.shape) * 1e-2 * (weight_LE > 0)).astype(np.float32)
    token_sums = {name: rng.uniform(1, 2, num_layers) * TOKENS for name in _SUMS}
    step = 0
    while True:
        at = step % _DISTINCT
        yield LoadRecord(
            step=step,
            rank=0,
            ts=0.0,
            tokens=TOKENS,
            counts_LE=drawn[at],
            prob_sum_LE=sums_LE[at],
            weight_sum_LE=sums_LE[at],
            bias_LE=bias_LE,
            token_sums=token_sums,
        )
        step += 1


def measure(
    num_layers: int,
    num_experts: int,
    top_k: int,
    state: str,
    steps: int,
    warm: int,
    together: int,
    clock: Callable[[], int],
) -> dict[str, Any]:
    """Processor time of a step in this state, milliseconds."""
    layers = tuple(
        LayerInfo(layer=layer, name=str(layer), block=layer, num_experts=int(width), top_k=top_k)
        for layer, width in enumerate(widths(num_layers, num_experts, state))
    )
    sink = DeriveSink(Nowhere(), ModelInfo(family="benchmark", layers=layers), together=together)
    stream = records(num_layers, num_experts, top_k, state)
    for _ in range(warm):
        sink.write(next(stream))
    sink.flush()
    taken = []
    for _ in range(steps):
        record = next(stream)
        started = clock()
        sink.write(record)
        taken.append(clock() - started)
    started = clock()
    sink.flush()
    taken[-1] += clock() - started
    if sink.failures:
        raise RuntimeError(f"nothing was derived from {sink.failures} records")
    ms = np.array(taken) / 1e6
    return {
        "state": state,
        "median ms": float(np.median(ms)),
        "p90 ms": float(np.quantile(ms, 0.9)),
        "mean ms": float(ms.mean()),
        "open alerts": len(sink.open_alerts),
    }


STATES = ("balanced", "a third skewed", "all collapsed", "mixed widths")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500, help="steps measured in each state")
    parser.add_argument(
        "--warm", type=int, default=400, help="steps before that; they arm rules and open alerts"
    )
    parser.add_argument(
        "--together",
        type=int,
        default=1,
        help="steps judged together at most (a watched run: 64); read the mean",
    )
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    arguments = parser.parse_args()
    before = machine()
    rows = [
        measure(
            arguments.layers,
            arguments.experts,
            arguments.top_k,
            state,
            arguments.steps,
            arguments.warm,
            arguments.together,
            time.process_time_ns,
        )
        for state in STATES
    ]
    bars = [
        Bar(what=f"mean of a step, {row['state']}", value=row["mean ms"], at_most=2.0, unit="ms")
        for row in rows
    ]
    title = f"Metrics and alerts of {arguments.layers} layers x {arguments.experts} experts, processor time"
    publish(title, rows, bars, before, arguments.out)


if __name__ == "__main__":
    main()
