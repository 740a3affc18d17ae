"""Our model against transformers on the same shapes and the same weights: training, one MoE layer, decoding, memory.

Every contestant is a process of its own with one thread. They take turns, one step each, and what is compared is
processor time: a busy machine slows all alike. The best of ours stands against the best of theirs.

Training of ours tells glibc to keep what a step frees, as `moeviz train` does; transformers leaves the allocator as it
is, and that is what its users get. So that one sees what comes from where, both also train the other way; the ratio of
the two that are told stands beside the bar.

    python benchmarks/model.py --rounds 7 --out model.json
    python benchmarks/model.py --lanes decode cache --shapes 8x2      (a minute; --compile: several more)
    python benchmarks/model.py --lanes train --shapes 64x8 --dtypes bf16 --theirs grouped_mm --out model.json
                                                                      (one race; those already in a file are left out)
    python benchmarks/model.py --device cuda --dtypes bf16            (tokens a second and model-FLOPs utilisation)
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_report import Bar, machine, publish
from model_caches import caches
from torch import Tensor, nn

from model.config import ModelConfig
from model.experts import GroupedExperts
from model.flops import training_flops
from model.generate import generate
from model.hf import to_hf
from model.lm import MoELanguageModel
from model.sampling import Sampling
from trainer.allocator import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAIN_BARS = {"fp32": 1.12, "bf16": 1.15}
LAYER_BARS = {("fp32", 8): 1.1, ("fp32", 64): 1.4, ("bf16", 8): 1.3, ("bf16", 64): 1.9}
DECODE_BAR = 1.5
BATCH, LENGTH, PROMPT, NEW = 8, 256, 32, 64
Turn = Callable[[], None]


def shape(experts: int, top_k: int) -> ModelConfig:
    """The shape of the comparison: width 256, 6 layers, 8 heads, a vocabulary of 8,192."""
    return ModelConfig(
        vocab_size=8192, dim=256, num_layers=6, num_heads=8, num_experts=experts, top_k=top_k, expert_dim=256,
        max_seq_len=512,
    )  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """Who runs what; plain data, for it travels to another process."""

    name: str
    task: str
    """train or decode."""
    config: ModelConfig
    dtype: str
    experts: str | None
    """transformers' implementation of the experts; None: our model."""
    compiled: bool = False
    folder: str = ""
    """transformers' copy of our weights."""
    told: bool = False
    """Whether its process tells glibc to keep freed memory, as the trainer does."""
    device: str = "cpu"

    @property
    def ours(self) -> bool:
        return self.experts is None


def build(who: Contestant) -> nn.Module:
    """The model, both sides from the same weights."""
    torch.manual_seed(0)
    if who.ours:
        model: nn.Module = MoELanguageModel(who.config)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(who.folder, dtype=torch.float32)
        model.set_experts_implementation(who.experts or "eager")
    return model.to(who.device, DTYPES[who.dtype])


def training(who: Contestant) -> Turn:
    """One optimizer step on random tokens."""
    model = build(who).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    call = torch.compile(model) if who.compiled else model
    generator = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        ids = torch.randint(3, who.config.vocab_size, (BATCH, LENGTH + 1), generator=generator).to(who.device)
        if who.ours:
            return call(ids[:, :-1], ids[:, 1:]).ce
        # Theirs shifts the labels itself.
        return call(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss

    def turn() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if who.device != "cpu":
            torch.cuda.synchronize()

    return turn


def decoding(who: Contestant) -> Turn:
    """NEW tokens behind one prompt, greedily, with a cache."""
    model = build(who).eval()
    ids = torch.randint(3, who.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    ids = ids.to(who.device)
    theirs: dict[str, Any] = {}
    if (
        who.compiled and not who.ours
    ):  # their own way to compile: a cache of fixed size, and the pass as one program
        model.forward = torch.compile(model.forward)
        theirs["cache_implementation"] = "static"

    def turn() -> None:
        if who.ours:
            sampling = Sampling(max_new_tokens=NEW, temperature=0)
            generate(model, ids, sampling, compile=who.compiled)  # type: ignore[arg-type]
            return
        with torch.no_grad():
            model.generate(  # type: ignore[operator]
                ids,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **theirs,
            )

    return turn


TASKS: Mapping[str, Callable[[Contestant], Turn]] = {"train": training, "decode": decoding}


def serve(who: Contestant, wire: Connection) -> None:
    """A contestant's process: one turn for each message, answered by its times and the peak of its memory."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    torch.set_num_threads(1)
    if who.told and not keep_freed_memory():
        raise RuntimeError(
            "the allocator here cannot be told; unset MALLOC_..., GLIBC_TUNABLES and LD_PRELOAD"
        )
    turn = TASKS[who.task](who)
    for _ in range(2):
        turn()
    wire.send("ready")
    while wire.recv() == "go":
        wall, cpu, faults = time.perf_counter(), time.process_time(), _page_faults()
        turn()
        took = (time.process_time() - cpu, time.perf_counter() - wall)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if who.device != "cpu":
            peak = torch.cuda.max_memory_allocated() / 2**20
        wire.send((*took, peak, _page_faults() - faults))


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@dataclass(eq=False)
class Runner:
    """A contestant's process, seen from here."""

    who: Contestant
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    start_seconds: float = 0.0
    """On the clock, to build and to warm it: compiling, where it is compiled."""
    page_faults: int = 0
    """Of the last turn."""

    def start(self) -> None:
        """Build it and run it warm; the others wait, so that compiling disturbs nobody."""
        context = multiprocessing.get_context("spawn")
        self.wire, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.who, theirs), daemon=True)
        begin = time.perf_counter()
        self.process.start()
        theirs.close()
        self.wire.recv()
        self.start_seconds = time.perf_counter() - begin

    def turn(self) -> None:
        self.wire.send("go")
        cpu, wall, self.peak_mb, self.page_faults = self.wire.recv()
        self.cpu_seconds.append(cpu)
        self.wall_seconds.append(wall)

    def stop(self) -> None:
        self.wire.send("stop")
        self.process.join()

    @property
    def seconds(self) -> float:
        """Of a turn: processor time, or time on the clock where a GPU does the work."""
        return statistics.median(self.times)

    @property
    def times(self) -> list[float]:
        return self.cpu_seconds if self.who.device == "cpu" else self.wall_seconds

    def over(self, other: Runner) -> float:
        """Its time over the other's, median over the rounds: turns of one round saw the same machine."""
        return statistics.median(a / b for a, b in zip(self.times, other.times, strict=True))


def race(contestants: Sequence[Contestant], rounds: int) -> list[Runner]:
    """All of them, in turns. One that cannot run is told and left out."""
    runners = []
    for who in contestants:
        runner = Runner(who)
        try:
            runner.start()
        except EOFError:
            print(f"{who.name}: could not be built or compiled here; left out", flush=True)
            continue
        runners.append(runner)
    for _ in range(rounds):
        for runner in runners:
            runner.turn()
    for runner in runners:
        runner.stop()
    return runners


def field_of(
    task: str, config: ModelConfig, dtype: str, folder: str, options: argparse.Namespace
) -> list[Contestant]:
    make = partial(Contestant, task=task, config=config, dtype=dtype, folder=folder, device=options.device)
    implementations = list(options.theirs or ("eager", "grouped_mm"))
    if task == "decode":
        if not options.theirs:
            implementations.append("batched_mm")
        field = [make("ours", experts=None)]
        field += [make(f"transformers, {name}", experts=name) for name in implementations]
        if options.compile:
            field.append(make("ours, compiled", experts=None, compiled=True))
            # Their loop over the experts that were chosen differs from token to token: no program of it is used twice.
            field += [
                make(f"transformers, {name}, compiled", experts=name, compiled=True)
                for name in implementations
                if name != "eager"
            ]
        return field
    field = [make("ours", experts=None, told=True), make("ours, not told", experts=None)]
    for name in implementations:
        field += [
            make(f"transformers, {name}", experts=name),
            make(f"transformers, {name}, told", experts=name, told=True),
        ]
    if options.compile:
        field.append(make("ours, compiled", experts=None, compiled=True, told=True))
        field.append(make("transformers, grouped_mm, compiled", experts="grouped_mm", compiled=True))
    return field


def compare(
    task: str, config: ModelConfig, dtype: str, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[Bar]]:
    """One race as rows, and its bars: theirs over ours, so more is better."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        to_hf(MoELanguageModel(config), folder)
        runners = race(field_of(task, config, dtype, folder, options), options.rounds)
    ours = [runner for runner in runners if runner.who.ours and (runner.who.told or task != "train")]
    theirs = [runner for runner in runners if not (runner.who.ours or runner.who.told)]
    theirs_told = [runner for runner in runners if not runner.who.ours and runner.who.told]
    best = _fastest(theirs)
    tokens = BATCH * LENGTH if task == "train" else NEW
    name = f"E={config.num_experts} K={config.top_k} {dtype}"
    rows = [
        {
            "task": task,
            "shape": name,
            "model": runner.who.name,
            "tokens a second": tokens / runner.seconds,
            "times the best of transformers": best.over(runner),
            **({"times its best told": _fastest(theirs_told).over(runner)} if theirs_told else {}),
            "peak MB": runner.peak_mb,
            "s to start": runner.start_seconds,
            "page faults": runner.page_faults,
            **_utilisation(runner, tokens),
        }
        for runner in runners
    ]
    ratio = best.over(_fastest(ours))
    wanted = TRAIN_BARS[dtype] if task == "train" else DECODE_BAR
    bars = [at_least(f"{task} {name}: best against best", ratio, wanted)]
    if task == "train":
        told = _fastest(theirs_told).over(_fastest(ours))
        bars.append(at_least(f"{task} {name}: the same, both told to keep freed memory", told, wanted))
        eager = min(runner.over(ours[0]) for runner in theirs if not runner.who.compiled)
        bars.append(at_least(f"{task} {name}: eager against eager", eager, 1.0))
        memory = ours[0].peak_mb / min(runner.peak_mb for runner in theirs)
        bars.append(Bar(what=f"{task} {name}: peak memory, x theirs", value=memory, at_most=1.0, unit="x"))
    return rows, bars


def _fastest(runners: Sequence[Runner]) -> Runner:
    return min(runners, key=lambda runner: runner.seconds)


def at_least(what: str, value: float, bar: float) -> Bar:
    """A bar from below, as one from above: its inverse."""
    return Bar(
        what=f"{what} (time of ours / theirs; {bar} x means {1 / bar:.3f})",
        value=1 / value,
        at_most=1 / bar,
        unit="x",
    )


def _utilisation(runner: Runner, tokens: int) -> dict[str, float]:
    """Model FLOPs a second; against what a square product reaches here, on a GPU."""
    if runner.who.device == "cpu" or runner.who.task != "train":
        return {}
    flops = training_flops(runner.who.config, LENGTH) * tokens / runner.seconds
    return {"TFLOP/s": flops / 1e12, "of a product's": flops / _product_flops(runner.who)}


def _product_flops(who: Contestant) -> float:
    a = torch.randn(8192, 8192, device=who.device, dtype=DTYPES[who.dtype])
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - begin)


def layer(config: ModelConfig, dtype: str, rounds: int) -> tuple[list[dict[str, Any]], list[Bar]]:
    """The experts of one layer, forward and backward, against dense products of the same FLOPs, in turns."""
    torch.manual_seed(0)
    experts = GroupedExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    experts.to(DTYPES[dtype])
    tokens, rows = BATCH * LENGTH, BATCH * LENGTH * config.top_k
    x_TD = torch.randn(tokens, config.dim, dtype=DTYPES[dtype], requires_grad=True)
    routing = iter(
        [torch.rand(tokens, config.num_experts).argsort(dim=-1)[:, : config.top_k] for _ in range(rounds + 1)]
    )  # loads of their own for each round, as training has them
    weights_TK = torch.rand(tokens, config.top_k)
    x_ND = torch.randn(rows, config.dim, dtype=DTYPES[dtype], requires_grad=True)
    into = torch.randn(2 * config.expert_dim, config.dim, dtype=DTYPES[dtype], requires_grad=True)
    out_of = torch.randn(config.dim, config.expert_dim, dtype=DTYPES[dtype], requires_grad=True)

    def sparse() -> None:
        experts(x_TD, next(routing), weights_TK).float().square().sum().backward()

    def dense() -> None:
        gate, up = F.linear(x_ND, into).chunk(2, dim=-1)
        F.linear(F.silu(gate) * up, out_of).float().square().sum().backward()

    took: dict[str, list[float]] = {"sparse": [], "dense": []}
    for _ in range(rounds + 1):
        for name, run in (("sparse", sparse), ("dense", dense)):
            begin = time.process_time()
            run()
            took[name].append(time.process_time() - begin)
    seconds = {name: statistics.median(times[1:]) for name, times in took.items()}
    ratio, name = seconds["sparse"] / seconds["dense"], f"E={config.num_experts} K={config.top_k} {dtype}"
    row = {
        "shape": name,
        "experts ms": 1e3 * seconds["sparse"],
        "dense ms": 1e3 * seconds["dense"],
        "ratio": ratio,
    }
    bar = LAYER_BARS.get((dtype, config.num_experts))
    bars = [Bar(what=f"layer {name}, x a dense product", value=ratio, at_most=bar, unit="x")] if bar else []
    return [row], bars


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lanes", nargs="+", default=["train", "layer", "decode", "cache"])
    parser.add_argument("--shapes", nargs="+", default=["8x2", "32x8", "64x8"], help="experts x top-k")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument(
        "--theirs",
        nargs="+",
        choices=["eager", "grouped_mm", "batched_mm"],
        help="transformers' implementations of the experts; without it eager and grouped_mm, decoding batched_mm too",
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument(
        "--compile", action="store_true", help="compiled contestants too (a minute each to compile)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--out", type=Path, help="JSON beside this name, one for each race; what is there is not run"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    before = machine()
    for name in options.shapes:
        config = shape(*(int(part) for part in name.split("x")))
        for dtype in options.dtypes:
            for lane in ("train", "decode", "layer"):
                out = _file(options.out, f"{lane}-{name}-{dtype}")
                if lane not in options.lanes or (out and out.exists()):
                    continue
                if lane == "layer":
                    rows, bars = layer(config, dtype, options.rounds)
                else:
                    rows, bars = compare(lane, config, dtype, options)
                publish(f"{lane} {name} {dtype}", rows, bars, before, out)
    if "cache" in options.lanes:
        publish("caches", caches(), (), before, _file(options.out, "caches"))


def _file(out: Path | None, race: str) -> Path | None:
    return out and out.with_stem(f"{out.stem}-{race}")


if __name__ == "__main__":
    main()
