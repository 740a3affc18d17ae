"""`--num-ranks 2` is two processes and one run: that of torchrun and of one rank, also where the number changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from pipeline_ranks import children, variable
from trainer_runs import corpus_cache, no_packing

from moeviz.commands.train import parse
from moeviz.store import queries_series as queries
from moeviz.store.reader import open_run
from trainer.checkpoint_folder import list_checkpoints
from trainer.launch import launch
from trainer.launch_status import LAUNCHED, free_port
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]

TOY = (
    "--preset smoke --dim 16 --vocab-size 280 --bytes-per-domain 12000 --dtype fp32 --device cpu --threads 1 "
    "--log-routing --save-every 2 --eval-every 0 --probe-every 0 --lr-steps 6"
)
FLAGS = TOY.split()
SHARED = ["--batch-size", "2", "--num-ranks", "2"]
WHOLE = ["--batch-size", "4"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a DeepSpeed engine in this process left in the environment is not for the ranks."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def command(*words: str, launcher: Sequence[str] = ("moeviz.cli",)) -> list[str]:
    return [sys.executable, "-m", *launcher, "train", *words]


def told(run: Path) -> tuple[list[float], list[tuple[object, ...]]]:
    """Losses by step, and the counts of every step, layer and expert."""
    with open_run(run) as store:
        losses = queries.scalars(store, ["loss"])["value"].tolist()
        rows = store.sql("SELECT step, layer, counts FROM expert_load ORDER BY step, layer")
    return losses, [(step, layer, *counts) for step, layer, counts in rows.itertuples(index=False)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> Path:
    """Six steps of one rank."""
    run = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeviz.store.run._in_process", lambda module, *args: True)
        train(parse([*FLAGS, *WHOLE, "--max-steps", "6", "--run", str(run)]))
    return run


def assert_same_run(run: Path, expected: Path) -> None:
    losses, loads = told(run)
    expected_losses, expected_loads = told(expected)
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert loads == expected_loads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        (("torch.distributed.run", "--nproc-per-node", "2", "-m", "--"), ()),
        (
            ("deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "PORT", "--module"),
            ("--engine", "deepspeed", "--zero-stage", "2"),
        ),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_other_launchers_take_the_same_command(
    launcher: tuple[str, ...], engine: tuple[str, ...], one_rank: Path, tmp_path: Path
) -> None:
    """`deepspeed` tells each process its rank by a flag in front of the command, too."""
    pytest.importorskip(launcher[0].partition(".")[0], reason="DeepSpeed is not installed")
    run = tmp_path / "run"
    launcher = tuple(str(free_port()) if word == "PORT" else word for word in (*launcher, "moeviz.cli"))
    words = [*FLAGS, *SHARED, *engine, "--max-steps", "6", "--run", str(run)]
    done = subprocess.run(command(*words, launcher=launcher), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 6 steps") == 1
    assert_same_run(run, one_rank)


@pytest.mark.slow
def test_a_run_goes_on_with_more_ranks_and_with_fewer(one_rank: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(parse([*FLAGS, *WHOLE, "--max-steps", "2", "--run", str(run)]))
    two = command("--resume", str(run), "--num-ranks", "2", "--max-steps", "4")
    done = subprocess.run(two, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 ranks before, 2 now: each step still has 4 sequences" in done.stdout
    assert done.stdout.count("done: 4 steps") == 1
    assert (run / "ranks" / "rank-1.log").read_text() == ""
    train(parse(["--resume", str(run), "--num-ranks", "1", "--max-steps", "6"]))
    assert_same_run(run, one_rank)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_its_name_its_log_and_a_checkpoint(
    one_rank: Path, tmp_path: Path, no_packing: None
) -> None:
    run = tmp_path / "run"
    words = [*FLAGS, *SHARED, "--max-steps", "100000", "--keep-checkpoints", "100000", "--run", str(run)]
    process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list_checkpoints(run / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.05)
    (victim,) = (child for child in children(process.pid) if variable(child, "RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    log = run / "ranks" / "rank-1.log"
    assert f"moeviz train: rank 1 was ended by SIGKILL; its output is in {log}" in errors
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert f"{newest} is whole; go on with: moeviz train --resume {run}" in errors
    assert "Traceback" not in errors
    losses, loads = told(run)
    assert len(losses) >= int(newest.name[-8:])
    assert {row[0] for row in loads} >= set(range(int(newest.name[-8:]))), (
        "what is before a checkpoint is there"
    )
    resumed = train(
        parse(["--resume", str(run / "checkpoints/step-00000002"), "--num-ranks", "1", "--max-steps", "6"])
    )
    assert resumed.losses == pytest.approx(told(one_rank)[0][2:], abs=1e-4)


RANK = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == "2" and sys.argv[1:] == ["train", "--run", "somewhere"], sys.argv
{body}
"""


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        ("", 0, []),
        ("sys.exit(130 if rank == 0 else 0)", 130, []),
        ("sys.exit('moeviz train: no such file')", 1, []),
        (
            "sys.exit(75 if rank == 0 else 'out of paper')",
            1,
            ["rank 1 failed with status 1", "ends with: out of paper"],
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else sys.exit(75)",
            1,
            ["rank 0 was ended by SIGKILL"],
        ),
        ("sys.exit(75) if rank == 0 else time.sleep(600)", 1, ["rank 1 did not answer and was ended"]),
        ("sys.exit(7) if rank == 1 else time.sleep(600)", 1, ["rank 1 failed with status 7"]),
    ],
)
def test_what_the_ranks_end_with_is_told(
    body: str, status: int, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that stand for ranks: each ends its own way."""
    package = tmp_path / "stands_for" / "moeviz"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(RANK.format(body=body))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.launch._GRACE_SECONDS", 1.0)
    lines: list[str] = []
    run = tmp_path / "run"
    assert launch(["--run", "somewhere"], ranks=2, run=run, tell=lines.append) == status
    assert len(lines) == (1 if expected else 0)
    assert all(words in lines[0] for words in expected)


def test_a_rank_stops_when_its_launcher_is_gone() -> None:
    """What it gets is the signal that ends a run between two steps."""
    program = (
        "import signal, time, sys; from trainer.launch import end_with_launcher\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42)); end_with_launcher()\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, LAUNCHED: "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdin.close()
    assert process.wait(timeout=300) == 42
    process.stdout.close()
