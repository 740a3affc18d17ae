"""The least used experts leave at the planned step; the others go on with their weights and their momentum."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import TOY, StopAfter, corpus_cache, no_packing, toy

from model.lm import MoELanguageModel
from model.router import routers
from moeviz.errors import MoevizError
from moeviz.store import queries_series as queries
from moeviz.store.reader import open_run
from trainer.config import TrainConfig
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]

pytestmark = pytest.mark.usefixtures("no_packing")

UNUSED = 2


@pytest.fixture
def one_unused_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models begin with an expert in each layer that a bias keeps from ever being chosen."""
    honest = MoELanguageModel.init_weights

    def init_weights(self: MoELanguageModel) -> None:
        honest(self)
        for router in routers(self):
            if router.num_experts == TOY.model.num_experts and router.e_score_correction_bias is not None:
                router.e_score_correction_bias[UNUSED] = -10.0

    monkeypatch.setattr(MoELanguageModel, "init_weights", init_weights)


def config_of(run: Path, plan: tuple[str, ...] = ("3=3",), **changes: Any) -> TrainConfig:
    model = replace(TOY.model, router=replace(TOY.model.router, selection_bias=True))
    parts: dict[str, Any] = {
        "model": model,
        "balance": {"balance": "none", "z_coef": 0.0},
        "evaluation": {"eval_every": 0},
        "prune": {"prune_experts": plan},
    }
    return toy(run, **{**parts, **changes})


def event_of(run: Path, kind: str) -> tuple[int, dict[str, Any]]:
    with open_run(run) as store:
        events = queries.events(store)
    ((step, detail),) = events[events["kind"] == kind][["step", "detail"]].to_numpy().tolist()
    return step, json.loads(detail) if isinstance(detail, str) else detail


@pytest.mark.parametrize(
    ("optimizer", "dtype", "stage"),
    [
        ("adamw", "fp32", None),
        ("adamw", "bf16", None),
        ("muon", "fp32", None),
        ("schedulefree", "fp32", None),
        ("adamw", "fp32", 0),
        ("adamw", "bf16", 2),
        ("muon", "fp32", 2),
        ("schedulefree", "fp32", 1),
    ],
)
def test_without_an_expert_that_nobody_used_training_is_as_with_it(
    optimizer: str, dtype: str, stage: int | None, one_unused_expert: None, tmp_path: Path
) -> None:
    """On plain torch, and on DeepSpeed where a ZeRO stage is given."""
    engine: dict[str, Any] = (
        {"engine": "torch"} if stage is None else {"engine": "deepspeed", "zero_stage": stage}
    )
    pytest.importorskip(engine["engine"], reason="DeepSpeed is not installed")
    if optimizer == "schedulefree":
        pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    parts: dict[str, Any] = {
        "optim": {"optimizer": optimizer, "weight_decay": 0.0},
        "schedule": {"schedule": "constant"},
        "engine": {"dtype": dtype, **engine},
    }
    whole = train(config_of(tmp_path / "whole", (), **parts))
    pruned = train(config_of(tmp_path / "run", **parts))
    assert pruned.run.name == "run-3-experts"
    assert pruned.losses == pytest.approx(whole.losses, abs=1e-5 if dtype == "fp32" else 5e-3)
    assert whole.checkpoint is not None
    assert pruned.checkpoint is not None
    name = "model.layers.0.mlp.experts.down_proj"
    kept = [expert for expert in range(4) if expert != UNUSED]
    before, after = (
        load_file(path / "model.safetensors")[name] for path in (whole.checkpoint, pruned.checkpoint)
    )
    torch.testing.assert_close(after, before[kept], atol=1e-4 if dtype == "fp32" else 2e-2, rtol=0)


@pytest.mark.parametrize("log_routing", [False, True])
def test_both_folders_say_what_was_removed(
    log_routing: bool, one_unused_expert: None, tmp_path: Path
) -> None:
    result = train(config_of(tmp_path / "run", log_routing=log_routing))
    assert (result.steps_done, len(result.losses)) == (6, 6)
    step, left = event_of(tmp_path / "run", "pruned")
    assert (step, left["removed"], left["goes_on_in"]) == (3, [[UNUSED], [UNUSED]], str(result.run))
    assert left["share_of_assignments"][0][UNUSED] == 0
    step, came = event_of(result.run, "pruned")
    assert (step, came["came_from"], came["kept"]) == (3, str(tmp_path / "run"), left["kept"])
    with open_run(tmp_path / "run") as store:
        assert queries.scalars(store, ["loss"])["step"].tolist() == [0, 1, 2]
        assert [layer.num_experts for layer in store.info.model.layers] == [4, 4]
    with open_run(result.run) as store:
        assert queries.scalars(store, ["loss"])["step"].tolist() == [3, 4, 5]
        assert [layer.num_experts for layer in store.info.model.layers] == [3, 3]
        if log_routing:
            loads = store.sql("SELECT step, len(counts) AS n, list_sum(counts) AS c FROM expert_load")
            assert set(zip(loads["step"], loads["n"], loads["c"], strict=True)) == {
                (step, 3, 2 * 2 * 16 * 2) for step in (3, 4, 5)
            }


def test_a_run_resumed_on_either_side_comes_to_the_same(one_unused_expert: None, tmp_path: Path) -> None:
    whole = train(config_of(tmp_path / "whole"))
    config = config_of(tmp_path / "run")
    losses: tuple[float, ...] = ()
    for after, found in ((2, {}), (4, {"run": None, "resume": str(config.run)})):
        watcher = StopAfter(after)
        stopped = train(replace(config, **found), progress=watcher, interrupt=watcher.interrupt)
        losses += stopped.losses
    assert stopped.run.name == "run-3-experts"
    last = train(replace(config, run=None, resume=str(stopped.run)))
    assert losses + last.losses == whole.losses
    assert last.run == stopped.run


def test_a_folder_in_the_way_is_told_and_kept(one_unused_expert: None, tmp_path: Path) -> None:
    train(config_of(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "older")
    with pytest.raises(MoevizError, match=r"run-3-experts already holds a run, and step 3 prunes into it"):
        train(config_of(tmp_path / "run"))


@pytest.mark.parametrize("engine", [{"engine": "torch"}, {"engine": "deepspeed", "zero_stage": 2}], ids=str)
def test_the_most_used_experts_are_doubled_and_training_goes_on(
    engine: dict[str, Any], one_unused_expert: None, tmp_path: Path
) -> None:
    pytest.importorskip(engine["engine"], reason="DeepSpeed is not installed")
    grow = {"prune": {"grow_experts": ("3=6",)}, "checkpoint": {"save_every": 3, "keep_checkpoints": 4}}
    result = train(config_of(tmp_path / "run", (), engine=engine, log_routing=True, **grow))
    assert (result.run.name, result.steps_done, len(result.losses)) == ("run-6-experts", 6, 6)
    step, told = event_of(tmp_path / "run", "grown")
    shares = told["share_of_assignments"]
    for layer, copied in enumerate(told["copied"]):
        others = [expert for expert in range(4) if expert not in copied]
        assert (step, len(copied), told["removed"][layer]) == (3, 2, [])
        assert min(shares[layer][e] for e in copied) >= max(shares[layer][e] for e in others)
    before, after = (
        load_file(run / "checkpoints/step-00000003/model.safetensors")
        for run in (tmp_path / "run", result.run)
    )
    for name in ("mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"):
        old, new = (weights[f"model.layers.0.{name}"] for weights in (before, after))
        assert torch.equal(new[:4], old)
        same = torch.equal(new[4:], old[told["copied"][0]])
        assert same is ("gate.weight" not in name), "copies but for the router, where noise tells them apart"
    with open_run(result.run) as store:
        assert [layer.num_experts for layer in store.info.model.layers] == [6, 6]
