"""A run that predicts further tokens: their loss is recorded and lowered, routing is that of the model alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import TOY, StopAfter, corpus_cache, no_packing, toy

from model.generate import Sampling, generate
from model.head_config import HeadConfig
from moeviz.policy import EVERYTHING
from moeviz.store.queries_series import scalars
from moeviz.store.reader import open_run
from trainer.checkpoint import load_checkpoint
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]

pytestmark = pytest.mark.usefixtures("no_packing")
FURTHER = replace(TOY.model, heads=HeadConfig(mtp_depth=2))


def _run(folder: Path, **changes: Any) -> TrainResult:
    return train(toy(folder, **{"model": FURTHER, "max_steps": 12, **changes}))


def _further(folder: Path) -> list[float]:
    with open_run(folder) as store:
        rows = scalars(store, ["mtp_loss"])
    return rows.sort_values("step")["value"].tolist()


def test_the_loss_of_further_tokens_is_recorded_and_falls(tmp_path: Path, corpus_cache: Path) -> None:
    result = _run(tmp_path / "run", log_routing=True, sampling=EVERYTHING)
    told = _further(tmp_path / "run")
    assert len(told) == 12
    assert told[-1] < told[0]
    with open_run(tmp_path / "run") as store:
        model = store.info.model
        assert [layer.name for layer in model.layers] == [
            "model.layers.0.mlp.gate",
            "model.layers.1.mlp.gate",
        ]
        assert {core.layer for core in model.attentions} == {0, 1}
        assert model.num_parameters == FURTHER.num_parameters()
    assert result.checkpoint is not None
    loaded = load_checkpoint(result.checkpoint).model
    assert generate(loaded, torch.tensor([[1, 2, 3]]), Sampling(max_new_tokens=3)).shape == (1, 3)


def test_a_coefficient_of_zero_leaves_the_model_as_it_would_be_without(
    tmp_path: Path, corpus_cache: Path
) -> None:
    balance = {"mtp_coef": 0.0}
    weights = [
        load_file(
            _run(tmp_path / str(depth), model=model, balance=balance, max_steps=3).checkpoint
            / "model.safetensors"
        )
        for depth, model in ((0, TOY.model), (2, FURTHER))
    ]
    # Modules are built behind the model and drawn after it, so it begins with the same numbers.
    assert all(bool((weights[1][name] == value).all()) for name, value in weights[0].items())


@pytest.mark.parametrize("masked", [False, True])
def test_a_resumed_run_is_the_run(masked: bool, tmp_path: Path, corpus_cache: Path) -> None:
    data = {"document_mask": masked}
    whole = _run(tmp_path / "whole", max_steps=6, data=data)
    stop = StopAfter(3)
    train(
        toy(tmp_path / "cut", model=FURTHER, max_steps=6, data=data), progress=stop, interrupt=stop.interrupt
    )
    again = train(toy(tmp_path / "cut", model=FURTHER, max_steps=6, data=data, resume=str(tmp_path / "cut")))
    assert whole.losses[3:] == again.losses
    assert _further(tmp_path / "whole") == _further(tmp_path / "cut")


def test_deepspeed_takes_the_same_steps(tmp_path: Path, corpus_cache: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    plain = _run(tmp_path / "plain", max_steps=4)
    zero = _run(tmp_path / "zero", max_steps=4, engine={"engine": "deepspeed", "zero_stage": 2})
    assert zero.losses == pytest.approx(plain.losses, rel=1e-4)
    assert _further(tmp_path / "zero") == pytest.approx(_further(tmp_path / "plain"), rel=1e-4)
