"""A user's DeepSpeed file: what it alone decides is honoured, and what differs from the run is told, all of it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import corpus_cache, no_packing, toy

from moeviz.commands.train import parse
from moeviz.errors import MoevizError
from trainer.config import EngineConfig, InputConfig, OptimConfig, TrainConfig
from trainer.engine_deepspeed_config import deepspeed_config
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]


def config_of(folder: Path, content: Any, **engine: Any) -> TrainConfig:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return TrainConfig(
        data=InputConfig(batch_size=4, gradient_accumulation_steps=3),
        optim=OptimConfig(learning_rate=1e-3, grad_clip=1.0),
        engine=EngineConfig(engine="deepspeed", zero_stage=2, deepspeed_config=path, **engine),
    )


AGREES = {
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 1,
    "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95], "weight_decay": "auto"}},
    "csv_monitor": {"enabled": True, "output_path": "logs", "job_name": "mine"},
    "wall_clock_breakdown": False,
}


def test_a_file_that_agrees_is_the_run_with_what_it_adds(tmp_path: Path) -> None:
    config = config_of(tmp_path, AGREES, dtype="bf16")
    plain = deepspeed_config(replace(config, engine=replace(config.engine, deepspeed_config=None)), 2)
    merged = deepspeed_config(config, 2)
    added = {key: value for key, value in merged.items() if plain.get(key) != value}
    assert added == {
        "train_batch_size": 24,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "csv_monitor": AGREES["csv_monitor"],
        "wall_clock_breakdown": False,
    }
    assert merged["bf16"] == {"enabled": True, "check_grad_overflow": True}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"train_batch_size": 32}, "train_batch_size=32 there and 24 here (it is --batch-size x"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu=8 there and 4 here (--batch-size 8)",
        ),
        ({"gradient_accumulation_steps": 1}, "(--gradient-accumulation-steps 1)"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 there and 1.0 here (--grad-clip 0.5)"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3 there and 2 here (--zero-stage 3)"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=true there and false here (choose with --dtype)"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true there and false here (choose with --dtype)"),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type="Lamb" there and "adamw" here'),
        ({"optimizer": {"params": {"lr": 0.1}}}, "params.lr=0.1 there and 0.001 here (--learning-rate 0.1)"),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler.type="WarmupLR" there and nothing here'),
    ],
)
def test_what_differs_is_named_with_both_values_and_the_remedy(
    content: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(MoevizError) as error:
        deepspeed_config(config_of(tmp_path, content), 2)
    assert told in str(error.value)
    assert "ds.json and the run differ" in str(error.value)
    assert "or take these values out of the file" in str(error.value)


def test_every_difference_is_told_at_once(tmp_path: Path) -> None:
    content = {"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    with pytest.raises(MoevizError) as error:
        deepspeed_config(config_of(tmp_path, content), 2)
    assert str(error.value).count(" there and ") == 3


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match=r"deepspeed_config=.*ds\.json"):
        deepspeed_config(config_of(tmp_path, content), 1)
    missing = config_of(tmp_path, {})
    (tmp_path / "ds.json").unlink()
    with pytest.raises(MoevizError, match="cannot be read as JSON"):
        deepspeed_config(missing, 1)


def test_the_file_implies_the_engine() -> None:
    for flag in ("--deepspeed-config", "--deepspeed", "--deepspeed_config"):
        engine = parse(["--preset", "smoke", flag, "ds.json"]).engine
        assert (engine.engine, engine.deepspeed_config) == ("deepspeed", Path("ds.json"))


def test_monitors_of_the_file_are_told_of_every_step(tmp_path: Path, no_packing: None) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monitor = {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "mine"}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"csv_monitor": monitor}))
    engine = {"engine": "deepspeed", "zero_stage": 1, "deepspeed_config": path}
    config = toy(tmp_path / "run", engine=engine, balance={"balance": "none", "z_coef": 0.0})
    result = train(config)
    columns, samples = {}, {}
    for name in ("train_loss", "lr"):
        file = tmp_path / "monitor" / "mine" / f"Train_Samples_{name}.csv"
        rows = list(csv.reader(file.open()))[1:]
        columns[name], samples[name] = [float(row[1]) for row in rows], [int(row[0]) for row in rows]
    assert columns["train_loss"] == pytest.approx(result.losses, rel=1e-6)
    assert samples["train_loss"] == samples["lr"] == [4 * step for step in range(1, 7)], "sequences so far"
    assert max(columns["lr"]) == pytest.approx(config.optim.learning_rate)
