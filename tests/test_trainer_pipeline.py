"""A pipeline is the run of one process: its losses, its weights, its checkpoints, and everything that is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pipeline_ranks import trained_by
from safetensors.torch import load_file
from torch import Tensor
from trainer_runs import corpus_cache, no_packing, toy

from moeviz.store.reader import open_run
from trainer.config import TrainConfig
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
                "probe": "SELECT * FROM probe_routing ORDER BY step, layer, seq",
                "metrics": "SELECT * FROM metrics ORDER BY step, name, layer NULLS FIRST",
                "scalars": "SELECT * EXCLUDE (ts) FROM scalars WHERE name IN ('loss', 'lr', 'grad_norm', 'val_loss') "
                "ORDER BY name, step, rank",
            }.items()
        }


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path
) -> dict[str, tuple[TrainResult, list[TrainResult]]]:
    """By name: the run of one process, and the results of two ranks that are two stages of the same run."""
    folder = tmp_path_factory.mktemp("runs")
    cases: dict[str, dict[str, Any]] = {
        "plain": {
            "log_routing": True,
            "sampling": {"route_every": 2, "attention_every": 2},
            "evaluation": {"probe_every": 2},
        },
        "half": {"engine": {"dtype": "bf16", "gradient_checkpointing": True}, "balance": {"balance": "aux"}},
    }
    two = trained_by(2, [deep(folder / f"{name}-2", 2, **changes) for name, changes in cases.items()])
    return {
        name: (train(deep(folder / f"{name}-1", 1, **changes)), ranks)
        for (name, changes), ranks in zip(cases.items(), two, strict=True)
    }


@pytest.mark.parametrize("name", ["plain", "half"])
def test_two_stages_are_one_process_to_the_bit(runs: dict[str, Any], name: str) -> None:
    alone, ranks = runs[name]
    for rank in ranks:
        assert rank.losses == alone.losses
        assert rank.evaluations == alone.evaluations
    assert same(state_of(ranks[0]), state_of(alone))


@pytest.mark.parametrize("table", ["loads", "routing", "sequences", "maps", "probe", "metrics", "scalars"])
def test_a_run_of_stages_is_recorded_as_that_of_one_process(runs: dict[str, Any], table: str) -> None:
    alone, ranks = runs["plain"]
    found, expected = frames(ranks[0].run)[table], frames(alone.run)[table]
    assert len(expected) > 0
    pd.testing.assert_frame_equal(found, expected)
