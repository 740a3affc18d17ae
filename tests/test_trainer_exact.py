"""N steps = k steps, kill -9, a new process and N - k steps, to the bit, with everything on that could differ.

Router noise and jitter, dropped experts, the selection bias, accumulation in micro-batches that memory decides (and
changes on the way), a warm-up, stable and decay phase, and a weighted mixture of domains.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import little_memory
import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import corpus_cache, no_packing

from moeviz.commands.train import parse
from moeviz.store import queries_series as queries
from moeviz.store.reader import open_run
from trainer.checkpoint_folder import list_checkpoints
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]

STEPS = 8
EVERYTHING = (
    "--preset smoke --dim 16 --vocab-size 280 --bytes-per-domain 12000 --eval-every 4 --eval-sequences 1 --threads 1 "
    "--device cpu --router-noise gumbel --router-jitter 0.05 --expert-dropout 0.3 --balance bias --bias-step 0.01 "
    "--batch-size 2 --gradient-accumulation-steps 3 --auto-batch --schedule wsd "
    "--mixture stories=0.5 arithmetic=0.3 json=0.2 "
    "--expert-grad-every 2 --spike-rewind --spike-window 4 --on-alert SKEW=lower_lr "
    f"--alert-thresholds arm_after=2 raise_after=1 startup_steps=0 startup_warmups=0 --lr-steps {STEPS}"
)


def flags(run: Path, engine: str, stage: int, *more: str) -> list[str]:
    return [*EVERYTHING.split(), "--engine", engine, "--zero-stage", str(stage), "--run", str(run), *more]


def killed_after_a_checkpoint(run: Path, engine: str, stage: int) -> Path:
    """Train in another process without end, kill it at an arbitrary moment; the last checkpoint that is in time."""
    endless = ("--max-steps", "100000", "--save-every", "1", "--keep-checkpoints", "100000")
    command = [sys.executable, little_memory.__file__, "train", *flags(run, engine, stage, *endless)]
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of this process's own group
    env = {name: value for name, value in os.environ.items() if name not in ours}
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**env, **here})
    try:
        deadline = time.monotonic() + 240
        while len(list_checkpoints(run / "checkpoints")) < 3 and time.monotonic() < deadline:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.02)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    return [path for path in list_checkpoints(run / "checkpoints") if int(path.name[-8:]) < STEPS][-1]


def micro_batches(run: Path) -> list[int]:
    """Sequences of a micro-batch, as often as they were decided."""
    with open_run(run) as store:
        events = queries.events(store)
    chosen = events[events["kind"] == "micro_batch"]
    return [json.loads(detail)["sequences"] for detail in chosen["detail"]]


def assert_same(whole: TrainResult, resumed: TrainResult, saved: Path) -> None:
    done = int(saved.name[-8:])
    assert resumed.losses == whole.losses[done:]
    assert whole.checkpoint is not None
    assert resumed.checkpoint is not None
    one, other = (
        load_file(result / "model.safetensors") for result in (whole.checkpoint, resumed.checkpoint)
    )
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert resumed.evaluations[STEPS] == whole.evaluations[STEPS]
    standing = [(path / "standing.json").read_text() for path in (whole.checkpoint, resumed.checkpoint)]
    assert standing[0] == standing[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "stage"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    engine: str, stage: int, tmp_path: Path, no_packing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(engine, reason="DeepSpeed is not installed")
    little_memory.install(monkeypatch)
    whole = train(parse(flags(tmp_path / "whole", engine, stage, "--max-steps", str(STEPS))))
    saved = killed_after_a_checkpoint(tmp_path / "killed", engine, stage)
    torch.manual_seed(1234)  # a new process begins with other generators
    resumed = train(parse(["--resume", str(saved), "--max-steps", str(STEPS), "--save-every", "0"]))
    assert_same(whole, resumed, saved)
    assert len(set(whole.losses)) == STEPS
    assert micro_batches(tmp_path / "whole") == [little_memory.FIRST, little_memory.LATER]
