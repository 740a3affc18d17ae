"""What recording costs training: the same steps without it, with loads only, by default, and with everything.

A step is what `moeviz train` does: text of the built-in corpus, its learning rate, the balance of its routers (of one
that collapses alerts would be most of the work), the domains of sequences and the losses of tokens told to the probe.
All modes record one and the same model, a step each in turns of random order on the same batch, so that a busy machine
slows all alike: compare the ratios. (Equal copies of a model are not equally fast: two that nobody recorded differed by
up to 2 %, for they lie elsewhere in memory.) A ratio is taken within each round. As the order within a round is
random, noise is as likely to raise a ratio as to lower it by the same factor, so the ratios of all rounds are summed
up by the pseudo-median of their logarithms with the 95 % interval of the signed-rank test (Hodges and Lehmann 1963):
hardly disturbed by a round in which the machine had other work, and narrower than the interval of a median. Turns of
one step see the same machine better than turns of some seconds: of 36 rounds of 17 steps the interval was 0.049
wide, of 624 rounds of one 0.015.

The writer's thread works on all steps between two flushes of a run that nobody reads (of one that is read:
--flush-seconds 0.75) beside two further steps of the same mode, from a random moment of the first one on, as it does in
a run. These two against the same two without recording tell what the flush costs training: more than the processor time
it takes where training uses every core, for a step waits for its slowest thread. Their ratio counts by its share.
Nothing that a mode causes happens in the turn of another one.

glibc is told to keep what a step frees, as `moeviz train` tells it. Left alone, a step of the demo takes 100 page
faults for some seconds and 4,000 for others, recorded or not: 8 ms of processor time, which no ratio survives.
--stock-memory leaves it alone all the same.

    python benchmarks/capture.py --minutes 20 --out capture.json       all models, types and engines
    python benchmarks/capture.py --models 24x64 --dtypes fp32 --engines torch --minutes 2

What was measured when it is cut short (Ctrl-C) is printed and in the JSON file.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import math
import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_report import Bar, machine, publish, save

import moeviz
from model.config import ModelConfig
from model.lm import MoELanguageModel
from moeviz.capture import backlog
from moeviz.capture.probe import Probe
from moeviz.capture.tap import Tap
from moeviz.policy import EVERYTHING, SamplingPolicy
from moeviz.store import background
from trainer.allocator import keep_freed_memory
from trainer.balance import move_bias, training_loss
from trainer.config import BalanceConfig, EngineConfig, InputConfig, TrainConfig
from trainer.data_batches import Batch
from trainer.engine import Engine, build_engine
from trainer.presets import demo
from trainer.text import open_text

POLICIES: dict[str, SamplingPolicy | None] = {
    "none": None,
    "loads": SamplingPolicy(route_every=0, attention_every=0, latent_every=0),
    "default": SamplingPolicy(),
    "everything": EVERYTHING,
}
_BESIDE = 2
"""Steps with a flush beside them: one that begins in the first has ended in the second."""
_PREFETCH_SECONDS = 5e-3
"""The next batch is prepared by another thread, beside the first step of a round: it gets this time before it."""
STEP_BARS = {"default": 1.01, "everything": 1.05}
_TITLE = "capture: what recording costs a training step"


def deep(dim: int, expert_dim: int) -> ModelConfig:
    """24 layers of 64 experts, top-8."""
    return ModelConfig(
        vocab_size=4096,
        dim=dim,
        num_layers=24,
        num_heads=dim // 16,
        num_experts=64,
        top_k=8,
        expert_dim=expert_dim,
    )


@dataclass(frozen=True)
class Model:
    """What is trained, and on how much a step."""

    config: Callable[[], ModelConfig]
    batch: int
    length: int


DEMO = demo()
MODELS = {
    "demo": Model(lambda: DEMO.model, DEMO.data.batch_size, DEMO.data.seq_len),
    "24x64": Model(lambda: deep(128, 64), 8, 128),
    "24x64-narrow": Model(lambda: deep(64, 16), 8, 128),
}
"""The demo in its own batch; a deep model, still small for its shape; and one as narrow as it goes, of which
recording is a larger share than of anything that is trained for its own sake."""


@dataclass(eq=False)
class Course:
    """How all modes train the one model."""

    config: TrainConfig
    steps: int = 0
    """Taken so far, by all modes."""

    @property
    def balance(self) -> BalanceConfig:
        return self.config.balance

    def next_rate(self) -> float:
        """Learning rate of the next step: the trainer's warm-up, and its peak from there on."""
        self.steps += 1
        return self.config.optim.learning_rate * min(
            1.0, self.steps / max(1, self.config.schedule.warmup_steps)
        )


@dataclass(eq=False)
class Lane:
    """One mode of recording, and what its steps and flushes took."""

    mode: str
    engine: Engine
    course: Course
    probe: Probe | None
    before: Tap
    """Attached and detached before each turn."""
    seconds: list[float] = field(default_factory=list)
    """Of each step."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of each step, of the whole process with its children."""
    beside_seconds: list[float] = field(default_factory=list)
    """Of each group of `_BESIDE` steps with a flush beside them."""
    writer_seconds: list[float] = field(default_factory=list)
    """Processor time of the writer's thread in each of these flushes."""
    blocked_seconds: list[float] = field(default_factory=list)
    """Of each call of `Probe.step`."""
    watched_seconds: list[float] = field(default_factory=list)
    """Of each step, of the training thread in hooks on the root and in `Probe.step`."""
    page_faults: list[int] = field(default_factory=list)
    """Of each step."""

    def turn(self, batch: Batch, keep: bool) -> None:
        """Train one step; `keep` what it took."""
        with self._watched():
            self._train(batch, keep)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """With hooks only here. They come and go once more before, of which a step without them begins as cold."""
        for _ in range(1 if self.probe is not None else 2):
            self.before.attach()
            self.before.detach()
        if self.probe is None:
            yield
            return
        self.probe._tap.attach()
        yield
        self.probe._tap.detach()

    def _train(self, batch: Batch, keep: bool) -> None:
        ids_BS, labels_BS = torch.from_numpy(batch.input_ids_BS), torch.from_numpy(batch.labels_BS)
        begin, cpu_begin, faults = time.perf_counter(), _cpu_seconds(), _page_faults()
        watched = self.probe.seconds if self.probe is not None else 0.0
        if self.probe is not None:
            self.probe.label(batch.domains)
        output = self.engine.forward(ids_BS, labels_BS)
        if self.probe is not None and output.token_loss_BS is not None:
            self.probe.token_loss(output.token_loss_BS)
        self.engine.backward(training_loss(output, self.course.balance))
        rate = self.course.next_rate()
        update = self.engine.step(rate)
        move_bias(self.engine.module, output.expert_counts_LE, self.course.balance)
        assert output.ce is not None
        value, before = output.ce.item(), time.perf_counter()
        if self.probe is not None:
            taken = before - begin
            speed = ids_BS.numel() / taken
            self.probe.step(
                loss=value, lr=rate, grad_norm=update.grad_norm, tokens_per_second=speed, step_seconds=taken
            )
        end = time.perf_counter()
        if keep:
            self.seconds.append(end - begin)
            self.cpu_seconds.append(_cpu_seconds() - cpu_begin)
            self.page_faults.append(_page_faults() - faults)
            self.blocked_seconds.append(end - before)
            self.watched_seconds.append(self.probe.seconds - watched if self.probe is not None else 0.0)

    def turn_beside(self, batches: Sequence[Batch], after: float, keep: bool) -> None:
        """Train on these batches and have the writer flush what was recorded before them, from `after` seconds on."""
        with self._watched():
            begin, writer_begin = time.perf_counter(), self._writer_seconds()
            flush = threading.Timer(after, self.flush)
            flush.start()
            for batch in batches:
                self._train(batch, keep=False)
            flush.join()
            if keep:
                self.beside_seconds.append(time.perf_counter() - begin)
                self.writer_seconds.append(self._writer_seconds() - writer_begin)

    def flush(self) -> None:
        """Have the writer do all that is left to do of the steps before."""
        if self.probe is not None:
            self.probe.flush()

    def _writer_seconds(self) -> float:
        """Processor time of the writer's threads since their start."""
        name = "moeviz-writer"
        threads = [thread for thread in threading.enumerate() if thread.name.startswith(name)]
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threads if thread.ident is not None]
        return sum(map(time.clock_gettime, clocks))


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextmanager
def _lanes(config: TrainConfig, folder: Path, modes: Sequence[str]) -> Iterator[list[Lane]]:
    torch.manual_seed(0)
    course = Course(config)
    engine = build_engine(MoELanguageModel(config.model).train(), config)
    with ExitStack() as stack:
        stack.callback(engine.destroy)
        probes = []
        for mode in modes:
            probe = moeviz.watch(engine.module, folder / mode, policy=POLICIES[mode], pack=False)
            stack.callback(probe.close)
            probe._tap.detach()
            probes.append(probe)
        before = probes[0]._tap
        lanes = [Lane(mode, engine, course, probe, before) for mode, probe in zip(modes, probes, strict=True)]
        gc.collect()  # else a quarter of a second of it falls into a step, once
        yield [Lane("none", engine, course, None, before), *lanes]


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str
    dtype: str
    engine: str

    def config(self, options: argparse.Namespace) -> TrainConfig:
        model = MODELS[self.model]
        data = InputConfig(
            seq_len=options.length or model.length,
            batch_size=options.batch or model.batch,
            gradient_accumulation_steps=1,
        )
        engine = EngineConfig(engine=self.engine, dtype=self.dtype, device="cpu")  # type: ignore[arg-type]
        base = DEMO if self.model == "demo" else TrainConfig()
        return replace(base, model=model.config(), data=data, engine=engine)


def measure(case: Case, options: argparse.Namespace, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """A row of numbers for each mode, anew after each flush until `seconds` are over."""
    config = case.config(options)
    text, order, steps_taken = open_text(config), random.Random(0), itertools.count()
    config = replace(config, model=text.fit(config.model))
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, _lanes(config, Path(folder), options.modes) as lanes:

        def batch() -> Batch:
            rows = text.batches.batch(next(steps_taken))
            time.sleep(_PREFETCH_SECONDS)
            return rows

        def cycle(steps: int, keep: bool) -> None:
            """So many rounds, and one with a flush beside it."""
            for _ in range(steps):
                rows = batch()
                for lane in order.sample(lanes, len(lanes)):
                    lane.turn(rows, keep)
            batches, after = [batch() for _ in range(_BESIDE)], order.random() * step_seconds
            for lane in order.sample(lanes, len(lanes)):
                lane.turn_beside(batches, after, keep)
            for lane in lanes:
                lane.flush()

        step_seconds = 0.0
        cycle(4, keep=False)
        began = time.perf_counter()
        cycle(6, keep=False)
        step_seconds = (time.perf_counter() - began) / ((6 + _BESIDE) * len(lanes))
        steps = max(1, round(options.flush_seconds / step_seconds))
        for number in itertools.count(1):
            cycle(steps, keep=True)
            yield [_row(case, lane, lanes[0], steps) for lane in lanes]
            if time.monotonic() > deadline and number >= options.flushes:
                return


def _row(case: Case, lane: Lane, none: Lane, steps: int) -> dict[str, Any]:
    step, step_interval = _step_ratio(lane, none, steps)
    writer_ms = 1e3 * float(np.mean(lane.writer_seconds))
    cpu, cpu_interval = _cpu_ratio(lane, none, steps)
    blocked_ms = 1e3 * np.asarray(lane.blocked_seconds)
    return {
        "model": case.model,
        "dtype": case.dtype,
        "engine": case.engine,
        "mode": lane.mode,
        "step ms": 1e3 * float(np.median(lane.seconds)),
        "x none": step,
        "95 %": step_interval,
        "beside x": float(np.exp(np.log(np.divide(lane.beside_seconds, none.beside_seconds)).mean())),
        "cpu ms": 1e3 * float(np.median(lane.cpu_seconds)),
        "cpu x": cpu,
        "cpu 95 %": cpu_interval,
        "writer ms": writer_ms,
        "hooks ms": 1e3 * float(np.median(lane.watched_seconds)),
        "step() ms": float(np.median(blocked_ms)),
        "step() p99": float(np.quantile(blocked_ms, 0.99)),
        "faults": float(np.median(lane.page_faults)),
        "steps": len(lane.seconds),
        "a flush": steps,
    }


def _step_ratio(lane: Lane, none: Lane, steps: int) -> tuple[float, str]:
    """Steps over those of the same rounds without recording, those with a flush by their share; its 95 % interval."""
    plain, low, high = _typical(np.divide(lane.seconds, none.seconds))
    # Not every flush has the same work, so here it is the mean that counts.
    logs = np.log(np.divide(lane.beside_seconds, none.beside_seconds))
    share = min(1.0, _BESIDE / steps)
    ratio = (1 - share) * plain + share * float(np.exp(logs.mean()))
    error = float(logs.std(ddof=1)) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    half = math.hypot((1 - share) * (high - low) / 2, share * 1.959964 * error)
    return ratio, f"{ratio - half:.3f}..{ratio + half:.3f}"


def _cpu_ratio(lane: Lane, none: Lane, steps: int) -> tuple[float, str]:
    """The same of processor time; that of the writer's thread is known by itself."""
    ratio, low, high = _typical(np.divide(lane.cpu_seconds, none.cpu_seconds))
    share = float(np.mean(lane.writer_seconds) / steps / np.median(none.cpu_seconds))
    return ratio + share, f"{low + share:.3f}..{high + share:.3f}"


def _typical(ratios: np.ndarray) -> tuple[float, float, float]:
    """Pseudo-median of positive ratios, and its 95 % interval (smallest and largest of fewer than six).

    The median of all means of two logarithms (of one with itself as well); the interval lies between the order
    statistics of these means that the signed-rank distribution names, by its normal approximation.
    Source: Hodges and Lehmann, Annals of Mathematical Statistics 34 (1963) 598; Hollander, Wolfe and Chicken,
    Nonparametric Statistical Methods, 3rd ed., section 3.3.
    """
    logs, n = np.log(ratios), len(ratios)
    pairs = np.triu_indices(n)
    means = np.sort((logs[pairs[0]] + logs[pairs[1]]) / 2)
    spread = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    outside = int(len(means) / 2 - 1.959964 * spread) if n >= 6 else 0
    low, high = np.exp(means[outside]), np.exp(means[-1 - outside])
    return float(np.exp(np.median(means))), float(low), float(high)


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    bars = []
    for row in rows:
        label = f"{row['model']} {row['dtype']} {row['engine']} {row['mode']}"
        if row["mode"] in STEP_BARS:
            bar = STEP_BARS[row["mode"]]
            bars.append(Bar(what=f"{label}: step time", value=row["x none"], at_most=bar, unit="x"))
        if row["mode"] == "loads" and row["model"] == "24x64":
            bars.append(Bar(what=f"{label}: step(), median", value=row["step() ms"], at_most=0.05, unit="ms"))
            bars.append(Bar(what=f"{label}: step(), p99", value=row["step() p99"], at_most=1, unit="ms"))
    return bars


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["demo", "24x64"])
    add("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--engines", nargs="+", choices=("torch", "deepspeed"), default=["torch", "deepspeed"])
    modes = [mode for mode in POLICIES if mode != "none"]
    add("--modes", nargs="+", choices=modes, default=modes, help="to compare with none (default: all)")
    add("--minutes", type=float, default=5.0, help="time for all cases together (default 5)")
    add("--flushes", type=int, default=1, help="flushes of a case at least, also beyond its time (default 1)")
    pause = background.UNREAD_FLUSH_SECONDS
    add(
        "--flush-seconds",
        type=float,
        default=pause,
        help=f"training between two flushes of a mode (default {pause:g})",
    )
    add("--batch", type=int, help="sequences a step (default: the demo's own 16, else 8)")
    add("--length", type=int, help="tokens a sequence (default 128)")
    add("--stock-memory", action="store_true", help="do not tell glibc to keep freed memory")
    add("--threads", type=int, help="of torch (default: its own choice)")
    add("--out", type=Path, help="write the numbers here as JSON, anew after each flush")
    return parser.parse_args()


def main() -> None:
    options = _options()
    background.UNREAD_FLUSH_SECONDS = math.inf  # `Lane.flush` alone
    background._GATHER_BYTES = math.inf  # else a wide model's writer would begin in the turn of another mode
    backlog.ROOM_BYTES = math.inf  # nor do its readings find no room, as that writer would have made some
    logging.basicConfig(level=logging.WARNING)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not options.stock_memory and not keep_freed_memory():
        print("the allocator here cannot be told to keep freed memory; page faults will vary")
    if options.threads:
        torch.set_num_threads(options.threads)
    before = machine()
    cases = [Case(*names) for names in itertools.product(options.models, options.dtypes, options.engines)]
    done: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    try:
        for case in cases:
            rows = []
            for rows in measure(case, options, 60 * options.minutes / len(cases)):
                save(_TITLE, [*done, *rows], bars_of([*done, *rows]), before, options.out)
                said = ", ".join(f"{row['mode']} {row['x none']:.3f}" for row in rows[1:])
                print(
                    f"{case.model} {case.dtype} {case.engine}, {rows[0]['steps']} steps: {said}", flush=True
                )
            done, rows = [*done, *rows], []
    except KeyboardInterrupt:
        print("cut short")
    done += rows
    if done:
        publish(_TITLE, done, bars_of(done), before, options.out)


if __name__ == "__main__":
    main()
