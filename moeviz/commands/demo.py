"""`moeviz demo`: the whole tool in one command, from nothing to a picture of routing.

The training is an ordinary `moeviz train --preset demo --log-routing` in a process of its own; what is shown while
it runs is an ordinary view of its run folder. Nothing here is special to the demonstration but the order of things.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from moeviz.errors import MoevizError, require


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Train a small MoE on the built-in corpus with routing logged, and watch it.

    Takes about four minutes on two CPU cores and ends by itself. In a terminal the live view opens as soon as the
    first step is done (q leaves it, training goes on); elsewhere the same view is printed now and then as text.
    """

    run: Path | None = None
    """Run folder to make (default: runs/demo-DATE-TIME)."""
    max_steps: int | None = None
    """Train this many steps instead of the preset's."""
    max_minutes: float = 4.0
    """End the training after so many minutes at most, on a machine too slow or too busy for all its steps."""
    view: Literal["auto", "tui", "text", "none"] = "auto"
    """How to watch: the terminal UI, printed text, or not at all; auto takes the terminal UI where it can."""
    dash: bool = False
    """Open the dashboards in a browser as well."""


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(DemoArguments, args=argv, prog="moeviz demo", config=(tyro.conf.FlagCreatePairsOff,))
    require("torch", "train", "training")
    run = arguments.run or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    if run.exists() and any(run.iterdir()):
        raise MoevizError(f"{run} already holds something; name another folder with --run, or delete it")
    log_path = run / "train.log"
    run.mkdir(parents=True, exist_ok=True)
    print(f"moeviz demo: training into {run} (its output: {log_path})", flush=True)
    training = _start(arguments, run, log_path)
    dash = _open_dash(run) if arguments.dash else None
    try:
        _watch(training, run, log_path, _choose_view(arguments.view))
        status = _finish(training, log_path)
    except KeyboardInterrupt:
        # The trainer got the same Ctrl-C from the terminal and is writing its checkpoint.
        status = training.wait()
    finally:
        if training.poll() is None:
            training.terminate()
            training.wait()
        if dash is not None:
            dash.terminate()
    if status != 0:
        raise MoevizError(
            f"training ended with status {status}; the last lines of {log_path} say why:\n"
            + _tail(log_path, 12)
        )
    _farewell(run)
    return 0


def _start(arguments: DemoArguments, run: Path, log_path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "moeviz.cli", "train", "--preset", "demo", "--log-routing"]
    command += ["--run", str(run), "--max-minutes", f"{arguments.max_minutes:g}"]
    if arguments.max_steps is not None:
        command += ["--max-steps", str(arguments.max_steps)]
    with log_path.open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def _choose_view(view: str) -> str:
    if view != "auto":
        return view
    import importlib.util

    can_draw = sys.stdout.isatty() and sys.__stderr__ is not None and sys.__stderr__.isatty()
    return "tui" if can_draw and importlib.util.find_spec("textual") is not None else "text"


def _open_dash(run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "moeviz.cli", "dash", str(run), "--open"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _watch(training: subprocess.Popen[bytes], run: Path, log_path: Path, view: str) -> None:
    """Show the log until the first step is on disk, then the run itself."""
    shown = 0
    while training.poll() is None and not _has_steps(run):
        shown = _echo(log_path, shown)
        time.sleep(0.25)
    if view == "tui" and training.poll() is None:
        from moeviz.commands import tui

        tui.main([str(run), "--exit-when-ended"])
    elif view == "text":
        _print_views(training, run)


def _print_views(training: subprocess.Popen[bytes], run: Path, every_seconds: float = 15.0) -> None:
    from moeviz.commands import tui

    while training.poll() is None:
        tui.main([str(run), "--once"])
        sys.stdout.flush()
        deadline = time.monotonic() + every_seconds
        while training.poll() is None and time.monotonic() < deadline:
            time.sleep(0.25)


def _finish(training: subprocess.Popen[bytes], log_path: Path) -> int:
    """Wait for the training, echoing what it still says."""
    if training.poll() is None:
        print("moeviz demo: training goes on; Ctrl-C ends it with a checkpoint", flush=True)
    shown = log_path.stat().st_size
    while training.poll() is None:
        shown = _echo(log_path, shown)
        time.sleep(0.5)
    return training.returncode


def _has_steps(run: Path) -> bool:
    """Whether there is a step to look at."""
    return (run / "run.json").exists() and _newest_step(run) >= 0


def _newest_step(run: Path) -> int:
    from moeviz.errors import CorruptRunError
    from moeviz.store.queries import last_step
    from moeviz.store.reader import open_run

    try:
        with open_run(run) as store:
            step = last_step(store)
    except CorruptRunError:  # still being made
        return -1
    return -1 if step is None else step


def _echo(log_path: Path, offset: int) -> int:
    with log_path.open("rb") as log:
        log.seek(offset)
        sys.stdout.write(log.read().decode(errors="replace"))
        sys.stdout.flush()
        return log.tell()


def _tail(path: Path, lines: int) -> str:
    with path.open(errors="replace") as file:
        return "".join(deque(file, maxlen=lines))


def _farewell(run: Path) -> None:
    from moeviz.commands import show

    show.main([str(run)])
    print(
        f"""
Go on with
  moeviz tui {run}            the same view, with every step and token to look at
  moeviz dash {run}           the dashboards in a browser: flow, tokens, loads, attention
  moeviz query {run} "FROM metrics WHERE name = 'load_entropy' LIMIT 5"
  moeviz inspect {run} --text "The little fox ran to the river."
"""
    )
