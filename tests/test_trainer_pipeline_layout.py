"""Stages and replicas: who holds what, how states of stages become that of a model, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import toy

from model.config import ModelConfig
from model.head_config import HeadConfig
from model.lm import MoELanguageModel
from moeviz.errors import MoevizError
from trainer.checkpoint import Checkpoint
from trainer.config import EngineConfig, InputConfig, OptimConfig, TrainConfig
from trainer.frozen import freeze
from trainer.optim import build_optimizer, parameter_groups
from trainer.pipeline_layout import Layout, check_stages, is_here, keep_stage, spans
from trainer.pipeline_state import Names, optimizer_part, part_of_optimizer, whole_optimizer
from trainer.resume import check_resumable, on_ranks
from trainer.train import train

SHAPE: dict[str, Any] = {
    "vocab_size": 11,
    "dim": 8,
    "num_layers": 5,
    "num_heads": 2,
    "num_experts": 3,
    "top_k": 2,
    "expert_dim": 6,
}


def stages_of_a_model(stages: int, **changes: Any) -> tuple[MoELanguageModel, list[MoELanguageModel]]:
    """A model, and each of its stages."""
    made = []
    for stage in range(-1, stages):
        torch.manual_seed(0)
        made.append(MoELanguageModel(ModelConfig(**{**SHAPE, **changes})))
        if stage >= 0:
            layout = Layout(rank=stage, num_stages=stages, num_replicas=1)
            keep_stage(made[-1], layout, torch.device("cpu"))
    return made[0], made[1:]


@pytest.mark.parametrize(("layers", "stages"), [(1, 1), (5, 2), (5, 3), (8, 3), (7, 7), (12, 5)])
def test_every_block_has_one_stage_and_the_last_stages_have_least(layers: int, stages: int) -> None:
    found = spans(layers, stages)
    assert [block for span in found for block in span] == list(range(layers))
    sizes = [len(span) for span in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_each_rank_has_one_place() -> None:
    layouts = [Layout.of(rank, 6, 3) for rank in range(6)]
    assert len({(each.stage, each.replica) for each in layouts}) == 6
    for each in layouts:
        assert each.chain(each.replica)[each.stage] == each.rank
        assert each.alike(each.stage)[each.replica] == each.rank
    assert [each.is_first for each in layouts] == [True, False, False] * 2
    assert [each.is_last for each in layouts] == [False, False, True] * 2


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"heads": HeadConfig(mtp_depth=1, contrastive_width=4)}]
)
def test_stages_hold_all_weights_once_but_for_the_shared_embedding(
    stages: int, changes: dict[str, Any]
) -> None:
    whole, parts = stages_of_a_model(stages, **changes)
    expected = dict(whole.named_parameters())
    shared = {"model.embed_tokens.weight"} if changes else set()
    shared = set() if "heads" in changes and not changes["heads"].mtp_depth else shared
    for name, weight in expected.items():
        held = [dict(part.named_parameters())[name] for part in parts]
        here = [each for each in held if is_here(each)]
        assert len(here) == (2 if name in shared else 1), name
        assert all(torch.equal(each, weight) for each in here)
        assert all(each.shape == weight.shape for each in held)
    for part in parts:
        assert [name for name, _ in part.named_parameters()] == list(expected)
        assert all(is_here(buffer) for buffer in part.buffers())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizers_of_stages_are_that_of_the_model(optimizer: Any) -> None:
    config = OptimConfig(optimizer=optimizer)
    whole, parts = stages_of_a_model(2)

    def names_of(model: MoELanguageModel, *, here: bool) -> Names:
        named = [pair for pair in model.named_parameters() if is_here(pair[1]) or not here]
        names = {id(weight): name for name, weight in named}
        groups = parameter_groups(named, config.weight_decay, muon=optimizer == "muon")
        return [[names[id(weight)] for weight in group["params"]] for group in groups]

    def stepped(model: MoELanguageModel) -> torch.optim.Optimizer:
        named = [pair for pair in model.named_parameters() if is_here(pair[1])]
        for name, weight in named:
            weight.grad = torch.full_like(weight, 0.01 * len(name))
        built = build_optimizer(named, config)
        built.step()
        return built

    expected = stepped(whole).state_dict()
    optimizers = [stepped(part) for part in parts]
    own = [names_of(part, here=True) for part in parts]
    everything = names_of(parts[1], here=False)
    told = [optimizer_part(each.state_dict(), names) for each, names in zip(optimizers, own, strict=True)]
    found = whole_optimizer(told, everything)
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)
    for each, names in zip(optimizers, own, strict=True):
        back = part_of_optimizer(expected, everything, names)
        torch.testing.assert_close(back["state"], each.state_dict()["state"], rtol=0, atol=0)
        assert back["param_groups"] == each.state_dict()["param_groups"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_stages": 0}, "pipeline_stages=0 is below 1"),
        ({"pipeline_stages": 2, "engine": "deepspeed"}, "engine=deepspeed.*use --engine torch"),
        ({"pipeline_stages": 2, "num_ranks": 3}, "does not divide num_ranks=3; give --num-ranks a multiple"),
        ({"pipeline_stages": 2, "auto_batch": True}, "auto_batch.*leave --auto-batch out"),
        ({"pipeline_stages": 2, "compile": True}, "compile.*leave --compile out"),
    ],
)
def test_engines_that_make_no_pipeline_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoevizError, match=message):
        EngineConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"pipeline_stages": 3}}, "pipeline_stages=3 exceeds num_layers=2.*give at most 2"),
        ({"prune": {"prune_experts": ("2=3",)}}, "with prune_experts.*use --pipeline-stages 1"),
        ({"response": {"on_alert": ("DEAD=reinit_router",)}}, "with on_alert reinit_router"),
        (
            {"log_routing": True, "sampling": {"max_run_megabytes": 5.0}},
            "with a limit on samples.*--route-sequences",
        ),
    ],
)
def test_runs_that_stages_cannot_do_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoevizError, match=message):
        toy(Path("run"), **{"engine": {"pipeline_stages": 2}, **changes})


def test_one_process_is_no_pipeline(tmp_path: Path) -> None:
    config = toy(tmp_path / "run", engine={"pipeline_stages": 2})
    with pytest.raises(
        MoevizError, match=r"pipeline_stages=2, but 1 process runs; start .* with --num-ranks 2"
    ):
        train(config)


def test_a_stage_without_anything_to_train_is_refused() -> None:
    model = MoELanguageModel(ModelConfig(**SHAPE))
    freeze(model, (), ("model.layers.4.*",))
    check_stages(model, 1)
    with pytest.raises(MoevizError, match="pipeline_stages=2 leaves stage 0 nothing to train"):
        check_stages(model, 2)


def test_ranks_that_hold_a_model_together_read_the_same_sequences() -> None:
    def staged(config: TrainConfig, stages: int) -> TrainConfig:
        return replace(config, engine=replace(config.engine, pipeline_stages=stages))

    config = TrainConfig(data=InputConfig(batch_size=4, gradient_accumulation_steps=3))
    pipeline = Checkpoint(
        path=Path("step-00000002"), step=2, config=staged(config, 2), model_config=config.model, num_ranks=2
    )
    alone = staged(pipeline.config, 1)
    assert on_ranks(pipeline, alone, 1) is alone
    check_resumable(pipeline, alone, 1)
    assert on_ranks(pipeline, pipeline.config, 4).data.sequences_per_step == 6
    with pytest.raises(MoevizError, match="12 sequences, which 5 ranks cannot share"):
        on_ranks(pipeline, alone, 5)
