"""DeepSpeed's configuration: ours, and a file of the user's beneath it.

What both decide must agree: a run that took the file's batch size and reported the flag's would lie. Every
difference is told at once, with the flag that ends it; what only the file says (monitors, offloading, communication)
goes to DeepSpeed as it is. `auto`, as in files for transformers, means our value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moeviz.errors import MoevizError
from trainer.config import TrainConfig


class _Told(NamedTuple):
    """A value that the command line decides, and where a file says the same thing."""

    key: str
    value: Any
    remedy: str
    """What to give for the file's value, with {} for it; without {}: what to do instead."""


def deepspeed_config(config: TrainConfig, ranks: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run on so many ranks.

    Raises:
        MoevizError: the file of `config.engine.deepspeed_config` is no JSON, or says otherwise than the run.
    """
    ours = {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": config.data.gradient_accumulation_steps,
        "gradient_clipping": config.optim.grad_clip,
        # Without the check a bf16 step with a gradient that is not a number would be taken.
        "bf16": {"enabled": config.engine.dtype == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": config.engine.dtype == "fp16", "loss_scale": 0},
        "zero_optimization": {"stage": config.engine.zero_stage},
        # The optimizer is torch's AdamW, which DeepSpeed has not certified but works with.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    theirs = _file(config)
    problems = list(_conflicts(theirs, _decided(config, ranks)))
    if problems:
        raise MoevizError(
            f"{config.engine.deepspeed_config} and the run differ: {'; '.join(problems)}; or take these values out of "
            "the file"
        )
    merged = _merged(_without_auto(theirs), ours)
    if config.engine.has_deepspeed_experts and config.engine.zero_stage == 0:
        # DeepSpeed would clip by a mean over ranks of norms that each miss the others' experts; the engine clips.
        merged["gradient_clipping"] = 0.0
    if "steps_per_print" in theirs:
        merged["steps_per_print"] = theirs["steps_per_print"]
    return merged


def _file(config: TrainConfig) -> dict[str, Any]:
    path = config.engine.deepspeed_config
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MoevizError(f"deepspeed_config={path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise MoevizError(f"deepspeed_config={path} holds no JSON object; DeepSpeed's settings are one")
    return content


def _decided(config: TrainConfig, ranks: int) -> tuple[_Told, ...]:
    """Everything that both could decide."""
    data, optim, engine = config.data, config.optim, config.engine
    rate = "the rate belongs to --schedule, --warmup-steps and --learning-rate"
    return (
        _Told(
            "train_batch_size",
            data.sequences_per_step * ranks,
            "it is --batch-size x --gradient-accumulation-steps x --num-ranks",
        ),
        _Told("train_micro_batch_size_per_gpu", data.batch_size, "--batch-size {}"),
        _Told(
            "gradient_accumulation_steps",
            data.gradient_accumulation_steps,
            "--gradient-accumulation-steps {}",
        ),
        _Told("gradient_clipping", optim.grad_clip, "--grad-clip {}"),
        _Told("zero_optimization.stage", engine.zero_stage, "--zero-stage {}"),
        _Told("bf16.enabled", engine.dtype == "bf16", "choose with --dtype"),
        _Told("fp16.enabled", engine.dtype == "fp16", "choose with --dtype"),
        _Told("fp16.loss_scale", 0, "the scale finds itself"),
        _Told("amp.enabled", False, "choose with --dtype"),
        _Told("torch_autocast.enabled", False, "choose with --dtype"),
        _Told("optimizer.type", optim.optimizer, "--optimizer {}"),
        _Told("optimizer.params.lr", optim.learning_rate, "--learning-rate {}"),
        _Told("optimizer.params.betas", [optim.beta1, optim.beta2], "--beta1 and --beta2"),
        _Told("optimizer.params.eps", optim.adam_eps, "--adam-eps {}"),
        _Told("optimizer.params.weight_decay", optim.weight_decay, "--weight-decay {}"),
        _Told("scheduler.type", None, rate),
        _Told("zero_allow_untested_optimizer", True, "the run brings its own optimizer"),
        _Told("zero_force_ds_cpu_optimizer", False, "the run brings its own optimizer"),
    )


def _conflicts(theirs: Mapping[str, Any], decided: tuple[_Told, ...]) -> Iterator[str]:
    for told in decided:
        found = _at(theirs, told.key)
        if found is None or found == "auto" or _same(found, told.value):
            continue
        ours = "nothing" if told.value is None else json.dumps(told.value)
        yield f"{told.key}={json.dumps(found)} there and {ours} here ({told.remedy.format(found)})"


def _at(content: Any, key: str) -> Any:
    """The value behind a dotted key; None where it is not."""
    for name in key.split("."):
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return one.lower() == other.lower()
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if _is_number(one) and _is_number(other):
        return math.isclose(one, other, rel_tol=1e-9)
    return type(one) is type(other) and one == other


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without_auto(content: Mapping[str, Any]) -> dict[str, Any]:
    """What we decide anyway, or DeepSpeed by itself; its optimizer and schedule sections are ours, and checked."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in content.items()
        if value != "auto" and key not in ("optimizer", "scheduler")
    }


def _merged(beneath: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(beneath)
    for key, value in above.items():
        under = beneath.get(key)
        result[key] = (
            _merged(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
        )
    return result
