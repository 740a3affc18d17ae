"""How soon training begins, and whether it ever waits for data.

    python benchmarks/trainer.py [--preset demo] [--steps 30] [--out trainer.json]

Each measurement is a process of its own, as a user starts it, on a corpus that is in the cache. Processor seconds hold
on a busy machine, those of child processes included; wall seconds do only where the load average is about one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FIRST_STEP_SECONDS = 10.0
WAITING_SHARE = 0.01


def cpu_seconds() -> float:
    """User and system time of this process and its children."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def train_once(flags: list[str]) -> dict[str, Any]:
    """Train in this process as the command does; when things happened, and what data cost."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks.setdefault(name, cpu_seconds())

    from moeviz.commands.train import parse

    config = parse(flags)
    mark("command line")
    import trainer.train
    from trainer import assembly
    from trainer.progress import Silent, StepReport

    mark("imports")
    texts = []

    def opened(*args: Any, _open: Any = assembly.open_text, **options: Any) -> Any:
        texts.append(_open(*args, **options))
        mark("data")
        return texts[-1]

    class Watching(Silent):
        first_wall = first_wait = steps = 0.0
        last_wall = 0.0

        def evaluation(self, step: int, losses: Any) -> None:
            mark("first evaluation")

        def step(self, report: StepReport) -> None:
            mark("first step")
            self.last_wall = time.perf_counter()
            if not self.steps:
                self.first_wall, self.first_wait = self.last_wall, texts[0].batches.waited_seconds
            self.steps += 1

    assembly.open_text = opened  # type: ignore[assignment]
    progress = Watching()
    trainer.train.train(config, progress=progress)
    steps = progress.steps - 1
    wall = progress.last_wall - progress.first_wall
    waited = texts[0].batches.waited_seconds - progress.first_wait
    return {"marks": marks, "steps": steps, "wall": wall, "waited": waited}


def measured(flags: list[str], folder: Path) -> dict[str, Any]:
    """`train_once` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(folder / "out.json"), "--", *flags]
    begin = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    found["process_wall"] = time.perf_counter() - begin
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=30, help="over which waiting is measured")
    parser.add_argument("--train-data", nargs="+", default=["builtin"])
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    own, flags = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, flags = own[:split], own[split + 1 :]
    arguments = parser.parse_args(own)
    if arguments.child:
        arguments.child.write_text(json.dumps(train_once(flags)))
        return 0
    from bench_report import Bar, machine, publish

    before = machine()
    base = ["--preset", arguments.preset, "--train-data", *arguments.train_data, "--save-every", "0"]
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measured([*base, "--max-steps", "1", "--eval-every", "0", "--run", str(folder / "warm")], folder)
        plain = measured([*base, "--max-steps", "1", "--run", str(folder / "plain")], folder)
        logged = measured(
            [*base, "--max-steps", "1", "--log-routing", "--run", str(folder / "logged")], folder
        )
        steps = str(arguments.steps + 1)
        longer = measured(
            [*base, "--max-steps", steps, "--eval-every", "0", "--run", str(folder / "longer")], folder
        )
    for name, found in (("train", plain), ("train --log-routing", logged)):
        at = 0.0
        for what, total in found["marks"].items():
            rows.append({"command": name, "until": what, "cpu seconds": total - at, "so far": total})
            at = total
        bars.append(
            Bar(
                what=f"{name}: processor time from command to first step, corpus cached",
                value=found["marks"]["first step"],
                at_most=FIRST_STEP_SECONDS,
                unit="s",
            )
        )
    share = longer["waited"] / longer["wall"]
    bars.append(
        Bar(
            what=f"share of {longer['steps']:.0f} steps spent waiting for data",
            value=share,
            at_most=WAITING_SHARE,
            unit="",
        )
    )
    publish(f"start and data of --preset {arguments.preset}", rows, bars, before, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
