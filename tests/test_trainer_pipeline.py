"""A pipeline is the run of one process: its losses, its weights, its checkpoints, and everything that is recorded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pipeline_ranks import children, trained_by, variable
from safetensors.torch import load_file
from torch import Tensor
from trainer_runs import corpus_cache, no_packing, toy

from model.expert_config import RouterConfig
from model.head_config import HeadConfig
from moeviz.commands.train import parse
from moeviz.store.reader import open_run
from trainer.checkpoint import load_checkpoint
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import TrainConfig
from trainer.launch_status import free_port
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]

LAYERS = {
    "num_layers": 5,
    "dense_layers": (1,),
    "vocab_size": 280,
    "dim": 16,
    "num_heads": 2,
    "expert_dim": 8,
}


def deep(run: Path, stages: int, **changes: Any) -> TrainConfig:
    """A toy of five blocks, the second of them dense."""
    engine = {**changes.pop("engine", {}), "pipeline_stages": stages}
    return toy(run, **{"max_steps": 4, "model": LAYERS, **changes}, engine=engine)


def same(one: Any, other: Any) -> bool:
    """Whether two nests of containers are equal to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def state_of(result: TrainResult) -> tuple[dict[str, Tensor], dict[str, Any]]:
    assert result.checkpoint is not None
    folder = result.checkpoint
    return load_file(folder / "model.safetensors"), torch.load(folder / "optimizer.pt", weights_only=True)


def expert_grads(run: Path) -> dict[tuple[int, str], float]:
    with open_run(run) as store:
        rows = store.sql("SELECT step, name, value FROM scalars WHERE name LIKE 'expert_grad_norm/%'")
    return {(step, name): value for step, name, value in rows.itertuples(index=False)}


def frames(run: Path) -> dict[str, pd.DataFrame]:
    """What readers find in a run, in an order of its own."""
    with open_run(run) as store:
        return {
            name: store.sql(question)
            for name, question in {
                "loads": "SELECT * EXCLUDE (ts) FROM expert_load ORDER BY step, layer",
                "routing": "SELECT * FROM routing ORDER BY step, layer, rank, seq",
                "sequences": "SELECT * FROM sequences ORDER BY step, rank, seq",
                "maps": "SELECT * FROM attention ORDER BY step, layer, head, rank, seq",
                "layers": "SELECT layer, count(*) AS rows FROM routing GROUP BY layer ORDER BY layer",
                "latents": "SELECT * FROM latents ORDER BY step, layer, name, head, rank",
                "probe": "SELECT * FROM probe_routing ORDER BY step, layer, seq",
                "metrics": "SELECT * FROM metrics ORDER BY step, name, layer NULLS FIRST",
                "scalars": "SELECT * EXCLUDE (ts) FROM scalars WHERE name IN ('loss', 'lr', 'grad_norm', 'val_loss') "
                "ORDER BY name, step, rank",
            }.items()
        }


RECORDED = {
    "log_routing": True,
    "sampling": {"route_every": 2, "attention_every": 2},
    "evaluation": {"probe_every": 2},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": RECORDED,
    "experts in the last stage only": {
        **RECORDED,
        "model": {**LAYERS, "dense_layers": (0, 1, 2), "attention": "mla"},
        "sampling": {"route_every": 2, "attention_every": 2, "latent_every": 2, "latent_layers": "all"},
    },
    "half precision": {
        "engine": {"dtype": "bf16", "gradient_checkpointing": True},
        "data": {"batch_size": 4, "gradient_accumulation_steps": 1},
    },
    "noise": {
        "model": {**LAYERS, "router": RouterConfig(router_noise="gumbel", balance_scope="global")},
        "balance": {"balance": "aux"},
        "optim": {"optimizer": "muon", "expert_grad_every": 2},
    },
    "a shared embedding": {
        "model": {
            **LAYERS,
            "tie_embeddings": True,
            "heads": HeadConfig(mtp_depth=1, contrastive_width=8),
        },
        "balance": {"mtp_coef": 0.3, "contrastive_coef": 0.1},
    },
}
"""What differs from a toy, by name."""
EXACT = [name for name in CASES if name != "a shared embedding"]
Runs = dict[str, tuple[TrainResult, list[TrainResult]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> Runs:
    """By name: the run of one process, and what each of two ranks says of the same run in two stages."""
    folder = tmp_path_factory.mktemp("runs")
    two = trained_by(2, [deep(folder / f"{name}-2", 2, **changes) for name, changes in CASES.items()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeviz.store.run._in_process", lambda module, *args: True)
        return {
            name: (train(deep(folder / f"{name}-1", 1, **changes)), ranks)
            for (name, changes), ranks in zip(CASES.items(), two, strict=True)
        }


@pytest.mark.parametrize("name", EXACT)
def test_two_stages_are_one_process_to_the_bit(runs: Runs, name: str) -> None:
    alone, ranks = runs[name]
    for rank in ranks:
        assert rank.losses == alone.losses
        assert rank.evaluations == alone.evaluations
    assert same(state_of(ranks[0]), state_of(alone))


def test_an_embedding_of_two_stages_gets_the_gradients_of_both(runs: Runs) -> None:
    alone, ranks = runs["a shared embedding"]
    assert ranks[1].losses == ranks[0].losses == pytest.approx(alone.losses, rel=1e-6)
    (weights, state), (expected, expected_state) = state_of(ranks[0]), state_of(alone)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    assert state["optimizer"]["param_groups"] == expected_state["optimizer"]["param_groups"]


def test_a_checkpoint_of_stages_is_a_model_like_any_other(runs: Runs) -> None:
    alone, ranks = runs["plain"]
    models = [load_checkpoint(result.checkpoint).model for result in (alone, ranks[0]) if result.checkpoint]
    ids_BS = torch.arange(7)[None]
    with torch.no_grad():
        logits = [model(ids_BS).logits_BSV for model in models]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["plain", "experts in the last stage only"])
@pytest.mark.parametrize(
    "table", ["loads", "routing", "sequences", "maps", "probe", "metrics", "scalars", "layers"]
)
def test_a_run_of_stages_is_recorded_as_that_of_one_process(runs: Runs, name: str, table: str) -> None:
    alone, ranks = runs[name]
    found, expected = frames(ranks[0].run)[table], frames(alone.run)[table]
    assert len(expected) > 0
    pd.testing.assert_frame_equal(found, expected)


def test_latents_of_every_stage_are_recorded(runs: Runs) -> None:
    alone, ranks = runs["experts in the last stage only"]
    found, expected = frames(ranks[0].run)["latents"], frames(alone.run)["latents"]
    assert set(expected["layer"]) == set(range(5))
    pd.testing.assert_frame_equal(found, expected)


def test_gradients_of_experts_are_told_of_every_stage(runs: Runs) -> None:
    alone, ranks = runs["noise"]
    found, expected = ({**expert_grads(result.run)} for result in (ranks[0], alone))
    assert found == expected
    assert {name.split("/")[1] for _, name in found} == {"0", "1", "2", "3"}


@pytest.mark.slow
def test_replicas_of_a_pipeline_are_ranks_that_have_all_layers(tmp_path: Path, no_packing: None) -> None:
    changes = {**CASES["plain"], "model": {**LAYERS, "tie_embeddings": True}}
    ((four, *_),) = trained_by(4, [deep(tmp_path / "four", 2, **changes)])
    ((two, *_),) = trained_by(2, [deep(tmp_path / "two", 1, **changes)])
    assert four.losses == pytest.approx(two.losses, rel=1e-6)
    found, expected = frames(four.run), frames(two.run)
    for table in ("routing", "sequences"):
        pd.testing.assert_frame_equal(found[table], expected[table], rtol=1e-4)
    columns = ["step", "layer", "counts"]
    pd.testing.assert_frame_equal(found["loads"][columns], expected["loads"][columns])


@pytest.mark.slow
def test_a_killed_stage_is_named_and_its_run_goes_on_to_the_bit_with_any_number_of_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    text = (
        "--preset smoke --dim 16 --num-layers 3 --vocab-size 280 --bytes-per-domain 12000 --dtype fp32 --device cpu "
        "--threads 1 --batch-size 2 --gradient-accumulation-steps 2 --log-routing --save-every 2 --eval-every 0 "
        "--probe-every 0 --lr-steps 6"
    )
    flags = text.split()
    run, moeviz = tmp_path / "run", [sys.executable, "-m", "moeviz.cli", "train"]
    stages = ["--num-ranks", "2", "--pipeline-stages", "2"]
    endless = [*stages, "--max-steps", "100000", "--keep-checkpoints", "100000", "--run", str(run)]
    process = subprocess.Popen(
        [*moeviz, *flags, *endless], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 900
    while not list_checkpoints(run / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.05)
    (victim,) = (child for child in children(process.pid) if variable(child, "RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    assert (
        f"moeviz train: rank 1 was ended by SIGKILL; its output is in {run / 'ranks' / 'rank-1.log'}"
        in errors
    )
    assert "Traceback" not in errors

    whole = train(parse([*flags, "--max-steps", "6", "--run", str(tmp_path / "whole")]))
    saved = str(run / "checkpoints" / "step-00000002")
    words = ["--resume", saved, "--max-steps", "4"]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}", "-m", "--"]
    command = [sys.executable, "-m", *launcher, "moeviz.cli", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: 4 steps") == 1
    alone = ["--resume", str(run), "--num-ranks", "1", "--pipeline-stages", "1", "--max-steps", "6"]
    resumed = train(parse(alone))
    assert resumed.losses == whole.losses[4:]
    assert same(state_of(resumed), state_of(whole))
    found, expected = frames(run), frames(whole.run)
    # Of earlier steps a killed process may owe its last second.
    for name in ("loads", "routing", "sequences"):
        since = [table[table["step"] >= 2].reset_index(drop=True) for table in (found[name], expected[name])]
        assert name != "loads" or len(since[1]) == 4 * 3
        pd.testing.assert_frame_equal(*since)
