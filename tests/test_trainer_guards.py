"""A step that is not a number is skipped and told; the run stops when they come in a row."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_runs import StopAfter, corpus_cache, no_packing, toy

from model.lm import MoELanguageModel
from moeviz.errors import MoevizError
from moeviz.store import queries_series as queries
from moeviz.store.reader import open_run
from trainer import step as step_module
from trainer.config import TrainConfig
from trainer.engine import build_engine
from trainer.gradients import expert_grad_norms
from trainer.loss_scale import LossScale
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]

pytestmark = pytest.mark.usefixtures("no_packing")

MICRO_BATCHES = 2
"""Of a step of the toy."""


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps whose second micro-batch has a loss that is not a number, forward or only backward."""
    steps: set[int] = set()
    calls = [0]
    honest = step_module.training_loss

    def loss(output: Any, config: Any) -> Tensor:
        step, micro = divmod(calls[0], MICRO_BATCHES)
        calls[0] += 1
        value = honest(output, config)
        return value * math.nan if step in steps and micro == 1 else value

    monkeypatch.setattr(step_module, "training_loss", loss)
    return steps


def weights_of(result: TrainResult) -> dict[str, Tensor]:
    assert result.checkpoint is not None
    return load_file(result.checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    ("engine", "stage", "dtype"),
    [
        ("torch", 0, "fp32"),
        ("deepspeed", 0, "fp32"),
        ("deepspeed", 1, "bf16"),
        ("deepspeed", 2, "fp32"),
        ("deepspeed", 3, "fp32"),
    ],
)
def test_a_step_with_a_gradient_that_is_no_number_changes_nothing(
    engine: str, stage: int, dtype: str, poison: set[int], tmp_path: Path
) -> None:
    pytest.importorskip(engine, reason="DeepSpeed is not installed")
    parts = {"engine": engine, "zero_stage": stage, "dtype": dtype}
    poison.add(2)
    two = train(toy(tmp_path / "two", engine=parts, max_steps=2, evaluation={"eval_every": 0}))
    config = toy(tmp_path / "run", engine=parts, checkpoint={"save_every": 3}, evaluation={"eval_every": 0})
    watcher = StopAfter(3)
    # The counter of micro-batches went on; the skipped step is step 2 of this run.
    poison.clear()
    poison.add(2 + 2)
    three = train(config, progress=watcher, interrupt=watcher.interrupt)
    before, after = weights_of(two), weights_of(three)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert any("it is skipped (1 in a row)" in note for note in watcher.notes)
    with open_run(tmp_path / "run") as store:
        events = queries.events(store)
    skipped = events[events["kind"] == "step_skipped"]
    assert skipped["step"].tolist() == [2]
    assert "nan" in str(skipped["detail"].tolist()[0])


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_remedy(poison: set[int], tmp_path: Path) -> None:
    poison.update({1, 3, 4, 5})
    with pytest.raises(MoevizError, match=r"step 5 has .* after 2 skipped steps; lower learning_rate=0.01"):
        train(toy(tmp_path / "run", guard={"max_bad_steps": 2}, evaluation={"eval_every": 0}))


def test_bad_steps_that_are_not_in_a_row_are_survived(poison: set[int], tmp_path: Path) -> None:
    poison.update({1, 3, 5})
    result = train(toy(tmp_path / "run", guard={"max_bad_steps": 1}, evaluation={"eval_every": 0}))
    assert result.steps_done == 6
    assert all(math.isfinite(float(value.float().abs().max())) for value in weights_of(result).values())


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_long_peace() -> None:
    scale = LossScale("fp16")
    start = scale.value
    assert scale.update(finite=False)
    assert scale.value == start / 2
    for _ in range(2000):
        assert not scale.update(finite=True)
    assert scale.value == start
    while scale.value > 1:
        assert scale.update(finite=False)
    assert not scale.update(finite=False), "at 1 the scale is not to blame"
    assert not LossScale("fp32").update(finite=False)


def test_unscaling_gives_the_gradient_back() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    scale = LossScale("fp16")
    (weight.sum() * 2 * scale.value).backward()
    scale.unscale([weight])
    assert torch.equal(weight.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_fp16_trains_as_fp32_does_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    exact = train(toy(tmp_path / "fp32", evaluation={"eval_every": 0}))
    half = train(toy(tmp_path / "fp16", engine={"dtype": "fp16"}, evaluation={"eval_every": 0}))
    assert half.losses == pytest.approx(exact.losses, abs=2e-2)
    config = toy(tmp_path / "stopped", engine={"dtype": "fp16"}, evaluation={"eval_every": 0})
    watcher = StopAfter(2)
    first = train(config, progress=watcher, interrupt=watcher.interrupt)
    second = train(replace(config, run=None, resume=str(config.run)))
    assert first.losses + second.losses == half.losses
    one, other = weights_of(half), weights_of(second)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {value.dtype for name, value in one.items() if "experts" in name} == {torch.float16}


def test_gradient_norms_of_experts_are_those_of_autograd(tmp_path: Path) -> None:
    """The sum of squares over a layer's experts is that of its stacks, and it is recorded every n steps."""
    config = toy(tmp_path / "run", max_steps=5, optim={"expert_grad_every": 2}, evaluation={"eval_every": 0})
    train(config)
    with open_run(tmp_path / "run") as store:
        rows = store.sql("SELECT DISTINCT name, step FROM scalars WHERE name LIKE 'expert_grad_norm/%'")
    assert set(rows["step"]) == {0, 2, 4}
    assert set(rows["name"]) == {
        f"expert_grad_norm/{layer}/{expert}" for layer in range(2) for expert in range(4)
    }


@pytest.mark.parametrize(("engine", "stage"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 2)])
def test_a_norm_is_over_all_weights_of_an_expert(engine: str, stage: int) -> None:
    pytest.importorskip(engine, reason="DeepSpeed is not installed")
    config = TrainConfig(
        model=toy(Path("none")).model,
        data=toy(Path("none")).data,
        engine=toy(Path("none"), engine={"engine": engine, "zero_stage": stage}).engine,
    )
    torch.manual_seed(0)
    built = build_engine(MoELanguageModel(config.architecture), config)
    twin = MoELanguageModel(config.architecture)
    twin.load_state_dict(built.weights())
    ids = torch.randint(0, 280, (2, 17), generator=torch.Generator().manual_seed(3))
    built.backward(built.forward(ids[:, :-1], ids[:, 1:]).ce)  # type: ignore[arg-type]
    norms = expert_grad_norms(built)
    twin(ids[:, :-1], ids[:, 1:]).ce.backward()
    experts = twin.model.layers[1].mlp.experts  # type: ignore[union-attr]
    for expert in range(4):
        parts = torch.cat(
            [experts.gate_up_proj.grad[expert].flatten(), experts.down_proj.grad[expert].flatten()]
        )
        assert norms[f"expert_grad_norm/1/{expert}"] == pytest.approx(float(parts.norm()), rel=1e-4)
    built.destroy()
