"""What a Hugging Face config.json means here, and the other way round: what its families have in common.

`read` turns its keys into a `ModelConfig`; `write` is the inverse. A family can hold a model if what it
writes reads back as the same model: no list of supported options that could fall behind. What a config says
that this model cannot do is refused, never ignored: a checkpoint that loads computes what it always did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any

from model.attention_config import LatentConfig, MLAConfig, RopeConfig
from model.config import ModelConfig
from model.expert_config import ExpertConfig, RouterConfig
from model.head_config import HeadConfig
from model.hf_rope import fixed_base, read_rope, write_rope

Json = Mapping[str, Any]


class Family:
    """Keys that most families share; they differ in what follows from them."""

    model_type: str
    architecture: str
    refused: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    """Keys with the values that this model computes, None always among them; any other is an error."""
    rotary_share = 1.0
    """Share of a head that turns where the config does not say."""

    renames: tuple[tuple[str, str], ...] = ()
    """(our part of a tensor's name, theirs)."""
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """What the three matrices of an expert are called in a checkpoint."""
    transposed = False
    """Whether matrices are stored input first and queries, keys and values as one (GPT-2)."""
    prefix = ""
    """What names begin with, left out in checkpoints of the model without its head."""
    interleaved_experts = False
    """Whether experts are stored in GPT-OSS's order: stacked, transposed, gate and up in turns."""

    def hub_name(self, name: str) -> str:
        """Their name of our tensor `name`."""
        for ours, theirs in self.renames:
            name = name.replace(ours, theirs)
        return name

    def read(self, data: Json) -> ModelConfig:
        """The model of a config.json. Raises ValueError for what this model cannot do."""
        self.refuse(data)
        base, rope = read_rope(data, rotary_share=self.rotary_share)
        shared = {
            "vocab_size": data["vocab_size"],
            "dim": data["hidden_size"],
            "num_layers": data["num_hidden_layers"],
            "num_heads": data["num_attention_heads"],
            "num_kv_heads": data.get("num_key_value_heads") or data["num_attention_heads"],
            "head_dim": data.get("head_dim"),
            "max_seq_len": data["max_position_embeddings"],
            "norm_eps": data["rms_norm_eps"],
            "tie_embeddings": data.get("tie_word_embeddings", False),
            "top_k": data["num_experts_per_tok"],
            "init_std": data.get("initializer_range", 0.02),
            "rope_base": base,
            "rope": rope,
        }
        return ModelConfig(**{**shared, **self.special(data)})

    def refuse(self, data: Json) -> None:
        """Raise ValueError for a value that this model does not compute."""
        for key, allowed in {"hidden_act": ("silu",), **self.refused}.items():
            if data.get(key) not in (None, *allowed):
                raise ValueError(
                    f"{key}={data[key]} of this {self.model_type} is not implemented; "
                    f"{key} can be {' or '.join(str(value) for value in allowed)}"
                )

    def special(self, data: Json) -> dict[str, Any]:
        """Fields of `ModelConfig` that this family derives in its own way."""
        raise NotImplementedError

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of config.json."""
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": config.vocab_size,
            "hidden_size": config.dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_seq_len,
            "initializer_range": config.init_std,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "num_experts_per_tok": config.top_k,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **write_rope(config),
            **self.extra(config),
        }

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of this family alone."""
        raise NotImplementedError

    def differences(self, config: ModelConfig) -> list[str]:
        """What of `config` this family cannot say, as `field=value`; empty if it can say all.

        Raises ValueError if what it makes of it is no model at all.
        """
        return _differences(comparable(config), comparable(self.read(self.write(config))))


def comparable(config: ModelConfig) -> ModelConfig:
    """`config` with its defaults filled in and without what does not change the function it computes."""
    if config.num_moe_layers == 0:
        dense = config.dense_dim
        config = replace(config, router=RouterConfig(), experts=ExpertConfig(), num_shared_experts=0)
        config = replace(config, num_experts=8, top_k=2, expert_dim=256, dense_ffn_dim=dense)
    if config.block.positions == "learned":
        config = replace(config, rope=RopeConfig(), rope_base=10_000.0)
    rope, router, experts = config.rope, config.router, config.experts
    if rope.rope_scaling in ("none", "ntk"):
        share, pairs, local = rope.rotary_share, rope.rope_pairs, rope.local_rope_base
        rope = RopeConfig(rotary_share=share, rope_pairs=pairs, local_rope_base=local)
    if router.num_groups == 1:
        router = replace(router, group_score="top2_sum")
    if router.score == "softmax_topk":
        router = replace(router, norm_topk=True)
    if experts.expert_activation != "clamped":
        experts = replace(experts, swiglu_alpha=1.702, swiglu_limit=7.0)
    return replace(
        config,
        attention_kernel="auto",
        init_std=0.02,
        heads=HeadConfig(),
        num_kv_heads=config.kv_heads,
        head_dim=None if config.attention == "mla" else config.head_width,
        mla=config.mla if config.attention == "mla" else MLAConfig(),
        latents=config.latents if config.attention == "latent" else LatentConfig(),
        dense_ffn_dim=config.dense_dim if config.num_moe_layers < config.num_layers else None,
        first_dense_layers=0,
        moe_every=1,
        dense_layers=tuple(layer for layer in range(config.num_layers) if not config.is_moe(layer)),
        num_shared_experts=1 if config.shared_dim else 0,
        shared_expert_dim=config.shared_dim or None,
        rope_base=fixed_base(config),
        rope=rope,
        router=router,
        experts=experts,
    )


def _differences(wanted: Any, possible: Any, prefix: str = "") -> list[str]:
    found = []
    for each in fields(wanted):
        ours, theirs = getattr(wanted, each.name), getattr(possible, each.name)
        if ours == theirs:
            continue
        if is_dataclass(ours):
            found += _differences(ours, theirs, f"{prefix}{each.name}.")
        else:
            found.append(f"{prefix}{each.name}={ours}")
    return found
