"""What it costs to log routing with moeviz and with the trackers that teams use: the same job, side by side.

    python benchmarks/trackers.py                                        # what is installed in this Python
    python benchmarks/trackers.py --python rivals/bin/python --out trackers.json
    rivals: python -m venv rivals && rivals/bin/pip install tensorboard tensorboardX wandb trackio mlflow aim pandas

Two jobs (see tracker_cases.py): the loads of every expert each step, and every token's experts. For each case, in a
process of its own: how long a call keeps the training thread (median), processor time a step with all threads and
helpers until it is closed, bytes on the disk a step, and how long the curve of one expert takes to come back. A tracker
that is not installed, fails or takes too long is named with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_report import machine, publish
from tracker_cases import CASES

ROOT = Path(__file__).resolve().parent.parent
_MOEVIZ = "moeviz"


def run_case(payload: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    package = CASES[payload][name][0]
    python = sys.executable if package == _MOEVIZ else str(options.python)
    row: dict[str, Any] = {"job": payload, "tracker": name}
    try:
        if not _has(python, package):
            return {**row, **_nothing(f"left out: {package} is not installed in {Path(python).name}")}
        steps = options.steps if payload == "loads" else options.token_steps
        with tempfile.TemporaryDirectory(prefix="moeviz-trackers-") as folder:
            words = [python, str(Path(__file__).with_name("tracker_cases.py")), payload, name, folder]
            words += ["--steps", str(steps), "--shape", *map(str, options.shape)]
            found = json.loads(_output(words, options.timeout).splitlines()[-1])
        return {**row, **_shown(found)}
    except subprocess.TimeoutExpired:
        return {**row, **_nothing(f"left out: not done after {options.timeout:g} s")}
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        text = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return {**row, **_nothing(f"left out: {text[-1] if text else error}")}


def _has(python: str, package: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], cwd=ROOT, env=_environment()).returncode == 0


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _output(words: list[str], timeout: float) -> str:
    """What a program prints. It and its helpers are ended when it takes too long."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words, out, err)
    return out


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    read = found["read_ms"]
    return {
        "blocked ms": found["blocked_ms"],
        "CPU ms a step": found["cpu_ms"],
        "kB a step": found["kilobytes"],
        "close s": found["close_seconds"],
        "curve back ms": "-" if read is None else read,
        "note": "",
    }


def _nothing(reason: str) -> dict[str, Any]:
    names = ("blocked ms", "CPU ms a step", "kB a step", "close s", "curve back ms")
    return {**dict.fromkeys(names, "-"), "note": reason}


def relative(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times moeviz's cost of the same job each tracker has."""
    found = []
    for row in rows:
        base = next(one for one in rows if (one["job"], one["tracker"]) == (row["job"], _MOEVIZ))
        times = {
            f"{name}, x": _ratio(row[name], base[name])
            for name in ("blocked ms", "CPU ms a step", "kB a step", "curve back ms")
        }
        found.append({"job": row["job"], "tracker": row["tracker"], **times})
    return found


def _ratio(value: Any, base: Any) -> Any:
    numbers = isinstance(value, float) and isinstance(base, float) and base > 0
    return value / base if numbers else "-"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="a Python that has the rivals"
    )
    parser.add_argument("--steps", type=int, default=100, help="of the loads (default 100)")
    parser.add_argument("--token-steps", type=int, default=4, help="of the tokens (default 4)")
    parser.add_argument("--shape", type=int, nargs=4, default=(24, 64, 4096, 8), metavar=("L", "E", "T", "K"))
    parser.add_argument("--only", default=".", help="regular expression on 'job: tracker'")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds that a case may take (default 300)"
    )
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    options = parser.parse_args()
    before = machine()
    rows = []
    for payload, cases in CASES.items():
        for name in cases:
            if re.search(options.only, f"{payload}: {name}") or name == _MOEVIZ:
                rows.append(run_case(payload, name, options))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    layers, experts, tokens, top_k = options.shape
    title = f"trackers: {layers} x {experts} loads a step; {tokens:,} tokens x {layers} layers x {top_k} ids a step"
    publish("trackers, times moeviz", relative(rows), [], before, None)
    publish(title, rows, [], before, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
