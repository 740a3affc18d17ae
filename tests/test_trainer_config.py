"""The configuration is checked data: every flag named once, every bad value refused with a remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import ModelConfig
from moeviz.errors import MoevizError
from moeviz.policy import SamplingPolicy
from trainer.config import (
    AlertingConfig,
    BalanceConfig,
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    GuardConfig,
    InputConfig,
    OptimConfig,
    PruneConfig,
    ScheduleConfig,
    TrainConfig,
    flag_names,
)

TRAINER_FLAGS = """
--preset --run --resume --init-from --freeze --train-only --max-steps --max-minutes --seed --log-routing --log-every
--train-data --val-data --tokenizer --validation-fraction --bytes-per-domain --domain-weights
--mixture --document-mask
--seq-len --batch-size --gradient-accumulation-steps
--optimizer --learning-rate --weight-decay --beta1 --beta2 --adam-eps --grad-clip --expert-grad-every
--schedule --warmup-steps --min-lr-ratio --decay-share --lr-steps
--balance --aux-coef --z-coef --bias-step --orthogonality-coef --contrastive-coef --mtp-coef
--route-every --route-sequences --attention-every --attention-heads --attention-size
--latent-every --latent-layers --latent-tokens
--max-decisions-per-second --max-megabytes-per-second --max-run-megabytes
--alert-thresholds --circulating-rules --on-alert-command --on-alert-url --alert-min-severity
--use-wandb --use-tensorboard --use-trackio --tracker-project --tracker-every
--eval-every --eval-sequences --probe-every --probe-sequences --save-every --keep-checkpoints --keep-best
--max-bad-steps --spike-rewind --spike-window --spike-sd --max-rewinds
--on-alert --respond-every --prune-experts --grow-experts --prune-window
--engine --zero-stage --deepspeed-config --num-ranks --expert-parallel --expert-gate --pipeline-stages --rank-timeout
--dtype --auto-batch --gradient-checkpointing --compile
--device --threads --keep-freed-memory
"""


def test_the_flags_of_the_trainer_are_these() -> None:
    flags = flag_names()
    model_flags = flag_names(ModelConfig)
    assert [flag for flag in flags if flag not in model_flags] == TRAINER_FLAGS.split()
    for flag in [
        "--dim",
        "--num-layers",
        "--num-heads",
        "--num-kv-heads",
        "--num-experts",
        "--top-k",
        "--vocab-size",
    ]:
        assert flag in model_flags


def test_every_flag_is_named_once() -> None:
    flags = flag_names()
    assert len(flags) == len(set(flags))


def test_a_config_survives_json() -> None:
    config = TrainConfig(
        run=Path("runs/a"),
        model=ModelConfig(num_experts=5, num_kv_heads=2, head_dim=6),
        data=InputConfig(train_data="texts"),
        sampling=SamplingPolicy(route_sequences="all"),
        alerting=AlertingConfig(alert_thresholds=("dead_line=0.01",), circulating_rules=True),
        engine=EngineConfig(engine="deepspeed", zero_stage=2),
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_where_alerts_are_told_is_not_kept_with_the_run() -> None:
    told = AlertingConfig(on_alert_command="page --token secret", on_alert_url="https://hooks.test/secret")
    config = TrainConfig(alerting=told)
    assert "secret" not in json.dumps(config.to_dict())
    assert TrainConfig.from_dict(config.to_dict()) == replace(config, alerting=AlertingConfig())


def test_a_field_of_another_version_is_refused() -> None:
    with pytest.raises(MoevizError, match=r"frobnicate.*use the version that wrote it"):
        TrainConfig.from_dict(TrainConfig().to_dict() | {"frobnicate": 1})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InputConfig(batch_size=0), "batch_size=0 is below 1"),
        (lambda: OptimConfig(learning_rate=0.0), "learning_rate=0.0 is not positive"),
        (lambda: OptimConfig(beta2=1.0), "beta2=1.0 is not in"),
        (lambda: OptimConfig(grad_clip=-1.0), "grad_clip=-1.0 is negative"),
        (lambda: OptimConfig(adam_eps=0.0), "adam_eps=0.0 is not positive"),
        (lambda: ScheduleConfig(min_lr_ratio=1.5), "min_lr_ratio=1.5 is not between"),
        (lambda: ScheduleConfig(warmup_steps=-1), "warmup_steps=-1 is negative"),
        (lambda: ScheduleConfig(lr_steps=0), "lr_steps=0 is below 1"),
        (lambda: BalanceConfig(z_coef=-0.1), "z_coef=-0.1 is negative"),
        (lambda: EvaluationConfig(eval_sequences=0), "eval_sequences=0 is below 1"),
        (lambda: EvaluationConfig(probe_every=-1), "probe_every=-1 is negative"),
        (lambda: EvaluationConfig(probe_sequences=0), "probe_sequences=0 is below 1"),
        (lambda: CheckpointConfig(keep_checkpoints=0), "keep_checkpoints=0 is below 1"),
        (lambda: AlertingConfig(alert_thresholds=("dead_lime=1",)), "'dead_lime' is no threshold"),
        (lambda: AlertingConfig(on_alert_url="localhost"), "no address"),
        (lambda: AlertingConfig(on_alert_command=""), "is empty"),
        (lambda: EngineConfig(threads=0), "threads=0 is below 1"),
        (
            lambda: EngineConfig(deepspeed_config=Path("ds.json")),
            "ds.json with engine=torch would be read by nobody",
        ),
        (lambda: EngineConfig(num_ranks=0), "num_ranks=0 is below 1"),
        (lambda: EngineConfig(rank_timeout=0), "rank_timeout=0 is not positive"),
        (lambda: GuardConfig(max_bad_steps=-1), "max_bad_steps=-1 is negative"),
        (lambda: PruneConfig(prune_experts=("soon=4",)), "is no STEP=EXPERTS"),
        (lambda: TrainConfig(prune=PruneConfig(prune_experts=("5=8",))), "so nothing can leave"),
        (
            lambda: TrainConfig(prune=PruneConfig(grow_experts=("5=17",))),
            "the 8 experts before and twice as many",
        ),
        (lambda: PruneConfig(prune_experts=("5=6",), grow_experts=("5=8",)), "both prunes and grows"),
        (lambda: TrainConfig(prune=PruneConfig(prune_experts=("5=1",))), "is not between top_k=2"),
        (lambda: GuardConfig(spike_window=1), "spike_window=1 is below 2"),
        (lambda: GuardConfig(spike_sd=0.0), "spike_sd=0.0 is not positive"),
        (
            lambda: TrainConfig(optim=OptimConfig(optimizer="schedulefree")),
            "schedule=cosine lowers the rate twice; add --schedule constant",
        ),
        (
            lambda: TrainConfig(
                optim=OptimConfig(optimizer="schedulefree"),
                schedule=ScheduleConfig(schedule="constant"),
                engine=EngineConfig(engine="deepspeed", zero_stage=3),
            ),
            "zero_stage=3 has neither whole; use --zero-stage 2 or less, or --engine torch",
        ),
        (
            lambda: TrainConfig(
                prune=PruneConfig(prune_experts=("5=4",)),
                engine=EngineConfig(engine="deepspeed", zero_stage=3),
            ),
            "prune_experts needs whole weights, and zero_stage=3 has none; use --zero-stage 2",
        ),
        (lambda: EngineConfig(engine="deepspeed", dtype="bf16", zero_stage=0), "use zero_stage=1"),
        (
            lambda: EngineConfig(engine="deepspeed", compile=True),
            "use --engine torch, or leave --compile out",
        ),
        (
            lambda: EngineConfig(engine="deepspeed", auto_batch=True, zero_stage=3),
            "auto_batch cannot try a micro-batch on divided weights; use --zero-stage 2",
        ),
        (lambda: TrainConfig(max_steps=0), "max_steps=0 is below 1"),
    ],
)
def test_a_bad_value_names_itself_and_the_rule(make: object, message: str) -> None:
    with pytest.raises(MoevizError, match=message):
        make()  # type: ignore[operator]


def test_balancing_by_bias_gives_the_routers_a_bias_and_nothing_else_changes() -> None:
    config = TrainConfig(balance=BalanceConfig(balance="bias"))
    assert config.architecture.router.selection_bias
    back = replace(config.architecture, router=replace(config.architecture.router, selection_bias=False))
    assert back == config.model
    assert TrainConfig(balance=BalanceConfig(balance="aux")).architecture == config.model


def test_longer_sequences_make_the_model_longer() -> None:
    assert TrainConfig(data=InputConfig(seq_len=700)).architecture.max_seq_len == 700
    assert TrainConfig(data=InputConfig(seq_len=7)).architecture.max_seq_len == ModelConfig().max_seq_len


def test_tokens_of_a_step_count_every_micro_batch() -> None:
    data = InputConfig(batch_size=3, gradient_accumulation_steps=5, seq_len=7)
    assert (data.sequences_per_step, data.tokens_per_step) == (15, 105)


def test_reading_a_config_needs_no_torch() -> None:
    code = "import sys, trainer.config, trainer.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
