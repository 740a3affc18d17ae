"""What recording costs training: the same steps without it, with loads only, by default, and with everything.

All modes run in one process on equal copies of a model, in turns, so that a busy machine slows all alike:
compare the ratios. A turn ends with a flush; the processor time of a turn holds the writer's share.

    python benchmarks/capture.py --rounds 20 --out capture.json
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_report import Bar, machine, publish

import moeviz
from model.config import ModelConfig
from model.lm import MoELanguageModel
from model.presets import PRESETS
from moeviz.capture.probe import Probe
from moeviz.policy import EVERYTHING, SamplingPolicy

POLICIES: dict[str, SamplingPolicy | None] = {
    "none": None,
    "loads": SamplingPolicy(route_every=0, attention_every=0),
    "default": SamplingPolicy(),
    "everything": EVERYTHING,
}
STEP_BARS = {"default": 1.01, "everything": 1.05}


def deep() -> ModelConfig:
    """24 layers of 64 experts, top-8, as narrow as it goes: recording is a larger share than in any real model."""
    return ModelConfig(
        vocab_size=4096, dim=64, num_layers=24, num_heads=4, num_experts=64, top_k=8, expert_dim=16
    )


MODELS: dict[str, Callable[[], ModelConfig]] = {"demo": PRESETS["demo"], "24x64": deep}


@dataclass(eq=False)
class Lane:
    """One mode of recording with its own copy of the model, and what its turns took."""

    mode: str
    model: MoELanguageModel
    optimizer: torch.optim.Optimizer
    probe: Probe | None
    step_seconds: list[list[float]] = field(default_factory=list)
    """By turn."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Per step, of the whole process with its children, by turn."""
    blocked_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def turn(self, batches: Sequence[torch.Tensor], dtype: torch.dtype, keep: bool) -> None:
        """Train on `batches`, then flush; `keep` the times."""
        steps, cpu_begin = [], _cpu_seconds()
        for ids_BS in batches:
            begin = time.perf_counter()
            loss = self._train(ids_BS, dtype)
            if self.probe is not None:
                before = time.perf_counter()
                self.probe.step(loss=loss)
                if keep:
                    self.blocked_seconds.append(time.perf_counter() - before)
            steps.append(time.perf_counter() - begin)
            self.losses.append(float(loss))
        if self.probe is not None:
            self.probe.flush()
        if keep:
            self.step_seconds.append(steps)
            self.cpu_seconds.append((_cpu_seconds() - cpu_begin) / len(batches))

    def _train(self, ids_BS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        low = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
        with low:
            loss = self.model(ids_BS, ids_BS.roll(-1, 1)).ce
        assert loss is not None
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@contextmanager
def _lanes(config: ModelConfig, folder: Path) -> Iterator[list[Lane]]:
    torch.manual_seed(0)
    first = MoELanguageModel(config).train()
    with ExitStack() as stack:
        lanes = []
        for mode, policy in POLICIES.items():
            model = copy.deepcopy(first)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            probe = None
            if policy is not None:
                probe = moeviz.watch(model, folder / mode, policy=policy, pack=False)
                stack.callback(probe.close)
            lanes.append(Lane(mode, model, optimizer, probe))
        yield lanes


def measure(name: str, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of numbers for each mode."""
    config = MODELS[name]()
    shape = (options.batch, options.length)
    order, deadline = random.Random(0), time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder, _lanes(config, Path(folder)) as lanes:
        for index in range(options.rounds + 1):  # the first round warms up
            batches = [torch.randint(config.vocab_size, shape) for _ in range(options.steps)]
            for lane in order.sample(lanes, len(lanes)):
                lane.turn(batches, dtype, keep=index > 0)
            if index > 0 and time.monotonic() > deadline:
                break
        same = all(lane.losses == lanes[0].losses for lane in lanes)
        return [_row(name, dtype, lane, lanes[0], same) for lane in lanes]


def _row(name: str, dtype: torch.dtype, lane: Lane, none: Lane, same: bool) -> dict[str, Any]:
    turns = np.mean(lane.step_seconds, axis=1) / np.mean(none.step_seconds, axis=1)
    cpu = np.divide(lane.cpu_seconds, none.cpu_seconds)
    blocked_ms = 1e3 * np.asarray(lane.blocked_seconds or [0.0])
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": lane.mode,
        "step ms": 1e3 * float(np.median(lane.step_seconds)),
        "x none": float(np.median(turns)),
        "quartiles": f"{np.quantile(turns, 0.25):.3f}..{np.quantile(turns, 0.75):.3f}",
        "cpu ms": 1e3 * float(np.median(lane.cpu_seconds)),
        "cpu x none": float(np.median(cpu)),
        "step() ms": float(np.median(blocked_ms)),
        "step() p99 ms": float(np.quantile(blocked_ms, 0.99)),
        "turns": len(turns),
        "same losses": "yes" if same else "NO",
    }


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    bars = []
    for row in rows:
        label = f"{row['model']} {row['dtype']} {row['mode']}"
        if row["mode"] in STEP_BARS:
            bar = STEP_BARS[row["mode"]]
            bars.append(Bar(what=f"{label}: step time", value=row["x none"], at_most=bar, unit="x"))
        if row["mode"] == "loads" and row["model"] == "24x64":
            bars.append(Bar(what=f"{label}: step(), median", value=row["step() ms"], at_most=0.05, unit="ms"))
            bars.append(Bar(what=f"{label}: step(), p99", value=row["step() p99 ms"], at_most=1, unit="ms"))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=20, help="turns of each mode (default 20)")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn (default 10)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600,
        help="begin no further round of a model after these (default 600)",
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (default 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence (default 128)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
    before = machine()
    rows = []
    for name in options.models:
        for dtype in options.dtypes:
            rows += measure(name, getattr(torch, dtype), options)
    publish("capture: what recording costs a training step", rows, bars_of(rows), before, options.out)


if __name__ == "__main__":
    main()
