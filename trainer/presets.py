"""Named runs: every model preset with training values that suit its size, and a few of the trainer's own.

A preset is the set of defaults that the command line starts from; any flag overrides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType

from model.config import ModelConfig, RouterConfig
from model.presets import PRESETS as MODEL_PRESETS
from model.presets import from_depth
from moeviz.errors import MoevizError
from moeviz.policy import SamplingPolicy
from trainer.config import (
    BalanceConfig,
    EvaluationConfig,
    InputConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)

_DEPTH = "depth-"


def demo() -> TrainConfig:
    """The two-minute tour: a 3M parameter model on thirteen domains, 400 steps of 16 x 128 tokens."""
    return TrainConfig(
        preset="demo",
        max_steps=400,
        model=MODEL_PRESETS["demo"](),
        data=InputConfig(seq_len=128, batch_size=16),
        optim=OptimConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(warmup_steps=20),
        balance=BalanceConfig(balance="bias", bias_step=5e-3),
        evaluation=EvaluationConfig(eval_every=100, eval_sequences=16),
    )


def demo_mla() -> TrainConfig:
    """The tour with multi-head latent attention: what its compressed keys and values hold."""
    return _with_latents("demo-mla")


def demo_slots() -> TrainConfig:
    """The tour with two-stage attention: which tokens its slots read, and who reads the slots."""
    return _with_latents("demo-slots")


def _with_latents(preset: str) -> TrainConfig:
    return replace(
        demo(),
        preset=preset,
        model=MODEL_PRESETS[preset](),
        sampling=SamplingPolicy(latent_every=10, latent_layers="all"),
    )


def collapse() -> TrainConfig:
    """The demo with nothing that balances its experts: softmax, one expert a token. Watch the alerts."""
    tour = demo()
    router = RouterConfig(score="softmax", norm_topk=False)
    return replace(
        tour,
        preset="collapse",
        model=replace(tour.model, top_k=1, num_shared_experts=0, router=router),
        balance=BalanceConfig(balance="none", z_coef=0.0),
    )


def smoke() -> TrainConfig:
    """Twenty steps of a toy on generated text, in seconds: what a test or a first installation runs."""
    return TrainConfig(
        preset="smoke",
        max_steps=20,
        model=ModelConfig(
            vocab_size=300, dim=32, num_layers=2, num_heads=2, max_seq_len=32, num_experts=4, expert_dim=32
        ),
        data=InputConfig(train_data="generated", bytes_per_domain=40_000, seq_len=32, batch_size=4),
        optim=OptimConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(warmup_steps=5),
        sampling=SamplingPolicy(route_every=5, attention_every=10, attention_heads=1),
        evaluation=EvaluationConfig(eval_every=10, eval_sequences=4),
    )


def of_model(name: str, model: ModelConfig) -> TrainConfig:
    """2,000 steps of 4,096 tokens, or one sequence: enough to see a small model's experts take sides."""
    seq_len = min(model.max_seq_len, 256)
    return TrainConfig(
        preset=name,
        max_steps=2000,
        model=model,
        data=InputConfig(seq_len=seq_len, batch_size=max(4096 // seq_len, 1)),
        optim=OptimConfig(learning_rate=1e-3 if model.dim <= 256 else 5e-4),
        schedule=ScheduleConfig(warmup_steps=100),
        balance=BalanceConfig(balance="bias" if model.router.selection_bias else "aux"),
        evaluation=EvaluationConfig(eval_every=250),
    )


_OWN: Mapping[str, Callable[[], TrainConfig]] = MappingProxyType(
    {
        "demo": demo,
        "demo-mla": demo_mla,
        "demo-slots": demo_slots,
        "collapse": collapse,
        "smoke": smoke,
    }
)


def preset_names() -> list[str]:
    """Every preset; `depth-N` for any N comes on top."""
    return [*_OWN, *(name for name in MODEL_PRESETS if name not in _OWN)]


def train_preset(name: str) -> TrainConfig:
    """The training config of a preset.

    Args:
        name: one of `preset_names()`, or `depth-N`: one dial, a sensible model of N blocks.

    Raises:
        MoevizError: no such preset.
    """
    if name in _OWN:
        return _OWN[name]()
    if name in MODEL_PRESETS:
        return of_model(name, MODEL_PRESETS[name]())
    depth = name.removeprefix(_DEPTH)
    if name.startswith(_DEPTH) and depth.isdecimal() and int(depth) > 0:
        return of_model(name, from_depth(int(depth)))
    near = get_close_matches(name, preset_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise MoevizError(f"preset={name} is unknown; {hint}there are {', '.join(preset_names())} and depth-N")
