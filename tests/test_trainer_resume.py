"""N steps are k steps, a stop, a new process and N - k steps, to the bit: losses, weights, optimizer, balance bias."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import StopAfter, corpus_cache, no_packing, toy

from moeviz.commands.train import parse
from moeviz.errors import MoevizError
from moeviz.store import queries_series as queries
from moeviz.store.reader import open_run
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import TrainConfig
from trainer.evaluate import evaluation_scalars
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]


def train_and_stop(config: TrainConfig, after: int) -> TrainResult:
    watcher = StopAfter(after)
    return train(config, progress=watcher, interrupt=watcher.interrupt)


def weights_of(checkpoint: Path | None) -> dict[str, torch.Tensor]:
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def assert_same_weights(one: Path | None, other: Path | None) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    ("engine", "stage", "dtype"),
    [
        ("torch", 0, "fp32"),
        ("torch", 0, "bf16"),
        ("deepspeed", 0, "fp32"),
        ("deepspeed", 1, "fp32"),
        ("deepspeed", 2, "fp32"),
        ("deepspeed", 2, "bf16"),
    ],
)
def test_resuming_is_going_on(engine: str, stage: int, dtype: str, tmp_path: Path, no_packing: None) -> None:
    pytest.importorskip(engine, reason="DeepSpeed is not installed")
    parts = {"engine": engine, "zero_stage": stage, "dtype": dtype}
    whole = train(toy(tmp_path / "whole", engine=parts))
    config = toy(tmp_path / "stopped", engine=parts)
    first = train_and_stop(config, after=2)
    assert (first.interrupted, first.steps_done) == (True, 2)
    torch.manual_seed(1234)  # a new process starts with other generators
    second = train(replace(config, run=None, resume=str(config.run)))
    assert second.run == config.run
    assert first.losses + second.losses == whole.losses
    assert_same_weights(whole.checkpoint, second.checkpoint)
    assert second.evaluations[6] == whole.evaluations[6]
    bias = [
        value for name, value in weights_of(second.checkpoint).items() if name.endswith("correction_bias")
    ]
    assert len(bias) == 2
    assert all(value.abs().max() > 0 for value in bias)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "stage"),
    [
        ("muon", "fp32", None),
        ("schedulefree", "fp32", None),
        ("schedulefree", "bf16", None),
        ("muon", "fp32", 0),
        ("muon", "bf16", 2),
        ("muon", "fp32", 3),
        ("schedulefree", "fp32", 0),
        ("schedulefree", "bf16", 1),
        ("schedulefree", "fp32", 2),
    ],
)
def test_every_optimizer_goes_on_where_it_was(
    optimizer: str, dtype: str, stage: int | None, tmp_path: Path, no_packing: None
) -> None:
    """On plain torch, and on DeepSpeed where a ZeRO stage is given, which takes the same steps."""
    engine = {"engine": "torch"} if stage is None else {"engine": "deepspeed", "zero_stage": stage}
    pytest.importorskip(str(engine["engine"]), reason="DeepSpeed is not installed")
    if optimizer == "schedulefree":
        pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    parts = {
        "optim": {"optimizer": optimizer},
        "schedule": {"schedule": "constant"},
        "engine": {"dtype": dtype, **engine},
    }
    whole = train(toy(tmp_path / "whole", **parts))
    config = toy(tmp_path / "stopped", **parts)
    first = train_and_stop(config, after=3)
    second = train(replace(config, run=None, resume=str(config.run)))
    assert first.losses + second.losses == whole.losses
    assert_same_weights(whole.checkpoint, second.checkpoint)
    assert second.evaluations[6] == whole.evaluations[6]
    assert min(whole.losses) < whole.losses[0]
    if stage is not None and dtype == "fp32":
        plain = train(toy(tmp_path / "plain", **{**parts, "engine": {"dtype": dtype}}))
        assert whole.losses == pytest.approx(plain.losses, abs=1e-4)
        averages = [evaluation_scalars(result.evaluations[6])["val_loss"] for result in (whole, plain)]
        assert averages[0] == pytest.approx(averages[1], abs=1e-4)


def test_schedule_free_evaluates_and_saves_the_average_it_trains_towards(
    tmp_path: Path, no_packing: None
) -> None:
    """The checkpoint's weights are the library's own average of the ones it keeps for training."""
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    config = toy(tmp_path / "run", optim={"optimizer": "schedulefree"}, schedule={"schedule": "constant"})
    result = train(config)
    averaged = weights_of(result.checkpoint)
    assert result.checkpoint is not None
    state = torch.load(result.checkpoint / "optimizer.pt", weights_only=True)
    name = "model.layers.0.mlp.experts.down_proj"
    trained = state["trained"][name]
    assert not torch.equal(averaged[name], trained)
    index = [key for key, value in state["optimizer"]["state"].items() if value["z"].shape == trained.shape]
    moved = [state["optimizer"]["state"][key]["z"] for key in index]
    beta = config.optim.beta1
    # y = (1 - beta) z + beta x, so x = y + (1 - 1 / beta) (z - y)
    candidates = [trained + (1 - 1 / beta) * (z - trained) for z in moved]
    assert any(torch.allclose(averaged[name], each, atol=1e-6) for each in candidates)


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_result_is_the_same(
    tmp_path: Path, no_packing: None
) -> None:
    whole = train(toy(tmp_path / "whole"))
    config = toy(tmp_path / "run", checkpoint={"save_every": 2})
    first = train_and_stop(config, after=4)
    newest = list_checkpoints(config.run / "checkpoints")[-1]  # type: ignore[operator]
    with (newest / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    watcher = StopAfter()
    second = train(replace(config, resume=str(config.run)), progress=watcher, interrupt=watcher.interrupt)
    assert "step-00000004 is damaged: optimizer.pt has 100 bytes" in watcher.notes[0]
    assert first.losses[:2] + second.losses == whole.losses
    assert_same_weights(whole.checkpoint, second.checkpoint)


def test_going_back_replaces_what_was_recorded_after(tmp_path: Path, no_packing: None) -> None:
    config = toy(tmp_path / "run", checkpoint={"save_every": 2, "keep_checkpoints": 9}, log_routing=True)
    first = train(config)
    back = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    longer = replace(config, resume=back, max_steps=8, optim=replace(config.optim, learning_rate=1e-3))
    second = train(longer)
    with open_run(tmp_path / "run") as store:
        losses = queries.scalars(store, ["loss"])
        kinds = queries.events(store)["kind"].tolist()
    assert losses["step"].tolist() == list(range(8)), "each step once"
    assert losses["value"].tolist() == pytest.approx([*first.losses[:2], *second.losses])
    assert {"started", "resumed", "checkpoint", "ended"} <= set(kinds)
    superseded = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("superseded-*"))
    assert superseded == ["superseded-step-00000004", "superseded-step-00000006"]


def test_a_run_may_be_resumed_with_and_without_routing(tmp_path: Path, no_packing: None) -> None:
    config = toy(tmp_path / "run")
    train_and_stop(config, after=2)
    train_and_stop(replace(config, resume=str(config.run), log_routing=True), after=4)
    train(replace(config, resume=str(config.run)))
    with open_run(tmp_path / "run") as store:
        assert queries.scalars(store, ["loss"])["step"].tolist() == list(range(6))
        steps = store.sql("SELECT DISTINCT step FROM expert_load ORDER BY step")["step"].tolist()
    assert steps == [2, 3], "loads exist for the steps that were watched"


def test_a_finished_run_is_not_resumed_without_more_steps(tmp_path: Path, no_packing: None) -> None:
    config = toy(tmp_path / "run", max_steps=2)
    train(config)
    with pytest.raises(MoevizError, match=r"max_steps=2, and .* has 2 steps done; raise --max-steps"):
        train(replace(config, resume=str(config.run)))


def flags(run: Path, *more: str) -> list[str]:
    small = "--preset smoke --dim 16 --vocab-size 280 --bytes-per-domain 12000 --eval-every 0 --threads 1 --device cpu"
    return [*small.split(), "--run", str(run), *more]


def command(run: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "moeviz.cli", "train", *flags(run, *more)]


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_it_had_saved(tmp_path: Path, no_packing: None) -> None:
    """kill -9 at an arbitrary moment, another process, and the weights of a run that nothing happened to."""
    run = tmp_path / "killed"
    # More steps than it will take: it is killed long before their end.
    endless = (
        "--max-steps",
        "100000",
        "--lr-steps",
        "12",
        "--save-every",
        "3",
        "--keep-checkpoints",
        "100000",
    )
    process = subprocess.Popen(command(run, *endless), stdout=subprocess.DEVNULL)
    whole = train(parse(flags(tmp_path / "whole", "--max-steps", "12")))
    deadline = time.monotonic() + 300
    while not list_checkpoints(run / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    newest = [path for path in list_checkpoints(run / "checkpoints") if int(path.name[-8:]) < 12][-1]
    with open_run(run) as store:
        assert set(queries.scalars(store, ["loss"])["step"]) >= set(range(int(newest.name[-8:])))
    resumed = train(parse(["--resume", str(newest), "--max-steps", "12"]))
    assert resumed.run == run
    assert_same_weights(whole.checkpoint, resumed.checkpoint)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path: Path, no_packing: None) -> None:
    """Two ranks with two rows each see the four rows of one rank, and their loads are summed."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
        "moeviz.cli",
        "train",
    ]
    run = tmp_path / "two"
    more = (
        "--engine",
        "deepspeed",
        "--zero-stage",
        "2",
        "--batch-size",
        "2",
        "--log-routing",
        "--max-steps",
        "4",
        "--lr-steps",
        "4",
    )
    done = subprocess.run([*launcher, *flags(run, *more)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one = train(parse(flags(tmp_path / "one", "--batch-size", "4", "--max-steps", "4")))
    with open_run(run) as store:
        losses = queries.scalars(store, ["loss"])["value"].tolist()
        counted = store.sql("SELECT step, layer, list_sum(counts) AS n FROM expert_load")
    assert losses == pytest.approx(one.losses, abs=1e-4)
    assert len(counted) == 4 * 2
    assert set(counted["n"]) == {4 * 32 * 2}
    whole = train(
        parse(flags(tmp_path / "whole", "--batch-size", "4", "--max-steps", "6", "--lr-steps", "4"))
    )
    longer = train(parse(["--resume", str(run), "--max-steps", "6", "--num-ranks", "1"]))
    assert longer.losses == pytest.approx(whole.losses[4:], abs=1e-4)


@pytest.mark.slow
def test_ctrl_c_ends_after_the_step_with_a_checkpoint_and_status_130(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(run, "--max-steps", "100000", "--log-every", "1", "--log-routing"),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=300) == 130
    (saved,) = list_checkpoints(run / "checkpoints")
    assert f"interrupted: {int(saved.name[-8:])} steps" in rest
    assert f"moeviz train --resume {run}" in rest
    with open_run(run) as store:
        events = queries.events(store)
        losses = queries.scalars(store, ["loss"])
    assert len(losses) == int(saved.name[-8:]), "every step that was taken is recorded"
    assert events["kind"].tolist()[-1] == "ended"
    assert "interrupted" in str(events["detail"].tolist()[-1])
