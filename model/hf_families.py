"""The families of Hugging Face models that load here and that ours can be saved as.

Each class says what its config.json means beyond the keys that all share. The order of `FAMILIES` is the
order in which a model is offered to them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from model.attention_config import MLAConfig, ReachConfig, RopePairs
from model.config import ModelConfig
from model.expert_config import ExpertConfig, RouterConfig
from model.hf_config import Family, Json
from model.hf_gpt2 import Gpt2


class Mixtral(Family):
    model_type, architecture = "mixtral", "MixtralForCausalLM"
    refused = MappingProxyType({"router_jitter_noise": (0.0,)})
    renames = ((".mlp.", ".block_sparse_moe."),)
    expert_names = ("w1", "w3", "w2")

    def special(self, data: Json) -> dict[str, Any]:
        return {
            "num_experts": routed_experts(data),
            "expert_dim": data["intermediate_size"],
            "reach": ReachConfig(window=data.get("sliding_window")),
        }

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "head_dim": config.head_width,
            "num_local_experts": config.num_experts,
            "intermediate_size": config.expert_dim,
            "sliding_window": config.reach.window,
        }


class Olmoe(Family):
    model_type, architecture = "olmoe", "OlmoeForCausalLM"
    refused = MappingProxyType({"clip_qkv": ()})

    def special(self, data: Json) -> dict[str, Any]:
        return {
            "head_dim": None,
            "qk_norm": "projection",
            "attention_bias": "all" if data.get("attention_bias") else "none",
            "num_experts": routed_experts(data),
            "expert_dim": data["intermediate_size"],
            "router": RouterConfig(norm_topk=data.get("norm_topk_prob", False)),
        }

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "attention_bias": config.attention_bias != "none",
            "num_experts": config.num_experts,
            "intermediate_size": config.expert_dim,
            "norm_topk_prob": config.router.norm_topk,
            "clip_qkv": None,
        }


class QwenMoe(Family):
    """What Qwen2-MoE and Qwen3-MoE share."""

    refused = MappingProxyType({"use_sliding_window": (False,)})

    def special(self, data: Json) -> dict[str, Any]:
        dense = tuple(sorted(data.get("mlp_only_layers") or ()))
        leading = next((n for n in range(len(dense)) if dense[n] != n), len(dense))
        return {
            "first_dense_layers": leading,
            "dense_layers": dense[leading:],
            "moe_every": data.get("decoder_sparse_step", 1),
            "dense_ffn_dim": data["intermediate_size"],
            "num_experts": routed_experts(data),
            "expert_dim": data["moe_intermediate_size"],
            "router": RouterConfig(norm_topk=data.get("norm_topk_prob", False)),
        }

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "mlp_only_layers": [*range(config.first_dense_layers), *config.dense_layers],
            "decoder_sparse_step": config.moe_every,
            "intermediate_size": config.dense_dim,
            "num_experts": config.num_experts,
            "moe_intermediate_size": config.expert_dim,
            "norm_topk_prob": config.router.norm_topk,
            "use_sliding_window": False,
        }


class Qwen2Moe(QwenMoe):
    model_type, architecture = "qwen2_moe", "Qwen2MoeForCausalLM"
    renames = ((".shared_experts.", ".shared_expert."),)

    def special(self, data: Json) -> dict[str, Any]:
        return {
            **super().special(data),
            "attention_bias": "qkv" if data.get("qkv_bias", True) else "none",
            "num_shared_experts": 1,
            "shared_expert_dim": data["shared_expert_intermediate_size"],
            "experts": ExpertConfig(shared_expert_gate=True),
        }

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        return {
            **super().extra(config),
            "qkv_bias": config.attention_bias != "none",
            "shared_expert_intermediate_size": config.shared_dim,
        }


class Qwen3Moe(QwenMoe):
    model_type, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"

    def special(self, data: Json) -> dict[str, Any]:
        biased = data.get("attention_bias", False)
        return {**super().special(data), "qk_norm": "head", "attention_bias": "all" if biased else "none"}

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        biased = config.attention_bias != "none"
        return {**super().extra(config), "head_dim": config.head_width, "attention_bias": biased}


class DeepseekV2(Family):
    """MLA, softmax scores, groups ranked by their best expert."""

    model_type, architecture = "deepseek_v2", "DeepseekV2ForCausalLM"
    refused = MappingProxyType({"mlp_bias": (False,), "moe_layer_freq": (1,), "norm_topk_prob": (False,)})

    def read(self, data: Json) -> ModelConfig:
        config = super().read({**data, "head_dim": None})
        pairs: RopePairs = "neighbours" if data.get("rope_interleave", True) else "halves"
        return replace(config, rope=replace(config.rope, rope_pairs=pairs))

    def special(self, data: Json) -> dict[str, Any]:
        return {
            "attention": "mla",
            "num_kv_heads": None,
            "attention_bias": "all" if data.get("attention_bias") else "none",
            "mla": MLAConfig(
                q_lora_rank=data["q_lora_rank"],
                kv_lora_rank=data["kv_lora_rank"],
                qk_nope_head_dim=data["qk_nope_head_dim"],
                qk_rope_head_dim=data["qk_rope_head_dim"],
                v_head_dim=data["v_head_dim"],
            ),
            **deepseek_experts(data),
            "router": self.router(data),
        }

    def router(self, data: Json) -> RouterConfig:
        grouped = data.get("topk_method", "greedy") == "group_limited_greedy"
        return RouterConfig(
            norm_topk=False,
            scale=data.get("routed_scaling_factor", 1.0),
            num_groups=data["n_group"] if grouped else 1,
            top_groups=data["topk_group"] if grouped else 1,
            group_score="max",
        )

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        mla, router = config.mla, config.router
        return {
            "attention_bias": config.attention_bias != "none",
            "q_lora_rank": mla.q_lora_rank,
            "kv_lora_rank": mla.kv_lora_rank,
            "qk_nope_head_dim": mla.qk_nope_head_dim,
            "qk_rope_head_dim": mla.qk_rope_head_dim,
            "v_head_dim": mla.v_head_dim,
            **write_deepseek_experts(config),
            "norm_topk_prob": False,
            "topk_method": "group_limited_greedy" if router.num_groups > 1 else "greedy",
            "n_group": router.num_groups if router.num_groups > 1 else None,
            "topk_group": router.top_groups if router.num_groups > 1 else None,
        }


class DeepseekV3(DeepseekV2):
    """MLA, sigmoid scores, a bias that steers selection, groups ranked by their best two."""

    model_type, architecture = "deepseek_v3", "DeepseekV3ForCausalLM"
    refused = MappingProxyType({"moe_layer_freq": (1,)})

    def router(self, data: Json) -> RouterConfig:
        return biased_sigmoid_router(data)

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        return {
            **super().extra(config),
            "norm_topk_prob": config.router.norm_topk,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "n_group": config.router.num_groups,
            "topk_group": config.router.top_groups,
            "rope_interleave": config.rope.rope_pairs == "neighbours",
            "num_nextn_predict_layers": 0,
        }


class Glm4Moe(Family):
    """Grouped queries of which half of each head turns; DeepSeek-V3's routing."""

    model_type, architecture = "glm4_moe", "Glm4MoeForCausalLM"
    rotary_share = 0.5

    def special(self, data: Json) -> dict[str, Any]:
        return {
            "qk_norm": "head" if data.get("use_qk_norm") else "none",
            "attention_bias": "qkv" if data.get("attention_bias") else "none",
            **deepseek_experts(data),
            "router": biased_sigmoid_router(data),
        }

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "head_dim": config.head_width,
            "use_qk_norm": config.qk_norm != "none",
            "attention_bias": config.attention_bias != "none",
            "partial_rotary_factor": config.rope.rotary_share,
            **write_deepseek_experts(config),
            "norm_topk_prob": config.router.norm_topk,
            "n_group": config.router.num_groups,
            "topk_group": config.router.top_groups,
            "num_nextn_predict_layers": 0,
        }


class GptOss(Family):
    """A learned sink per head, windows in every other layer, biases everywhere, clamped experts."""

    model_type, architecture = "gpt_oss", "GptOssForCausalLM"
    renames = ((".mlp.gate.", ".mlp.router."),)
    interleaved_experts = True

    def special(self, data: Json) -> dict[str, Any]:
        local = [kind == "sliding_attention" for kind in data.get("layer_types") or ()]
        alternating = [layer % 2 == 0 for layer in range(data["num_hidden_layers"])]
        if local and local != alternating and any(local) and not all(local):
            raise ValueError(
                f"layer_types={data['layer_types']} is not implemented; windows can be in every other layer, "
                "in all or in none"
            )
        windowed = not local or any(local)
        return {
            "head_dim": data.get("head_dim", 64),
            "attention_bias": "all" if data.get("attention_bias", True) else "none",
            "reach": ReachConfig(
                window=data["sliding_window"] if windowed else None,
                global_every=2 if local in ([], alternating) else 0,
                head_sinks=True,
            ),
            "num_experts": routed_experts(data),
            "expert_dim": data["intermediate_size"],
            "router": RouterConfig(score="softmax_topk", router_bias=True),
            "experts": ExpertConfig(
                expert_activation="clamped",
                expert_bias=True,
                swiglu_alpha=data.get("swiglu_alpha", 1.702),
                swiglu_limit=data.get("swiglu_limit", 7.0),
            ),
        }

    def extra(self, config: ModelConfig) -> dict[str, Any]:
        local = [config.reach.is_local(layer) for layer in range(config.num_layers)]
        return {
            "head_dim": config.head_width,
            "attention_bias": config.attention_bias != "none",
            "sliding_window": config.reach.window,
            "layer_types": ["sliding_attention" if each else "full_attention" for each in local],
            "num_local_experts": config.num_experts,
            "intermediate_size": config.expert_dim,
            "swiglu_alpha": config.experts.swiglu_alpha,
            "swiglu_limit": config.experts.swiglu_limit,
        }


def routed_experts(data: Json) -> int:
    """E, under either of the names that versions of one family have used."""
    return data["num_local_experts"] if "num_local_experts" in data else data["num_experts"]


def deepseek_experts(data: Json) -> dict[str, Any]:
    """Routed, shared and dense widths in the keys that DeepSeek and GLM share."""
    return {
        "first_dense_layers": data.get("first_k_dense_replace", 0),
        "dense_ffn_dim": data["intermediate_size"],
        "num_experts": data["n_routed_experts"],
        "expert_dim": data["moe_intermediate_size"],
        "num_shared_experts": data.get("n_shared_experts") or 0,
    }


def write_deepseek_experts(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `deepseek_experts`."""
    return {
        "first_k_dense_replace": config.first_dense_layers,
        "intermediate_size": config.dense_dim,
        "n_routed_experts": config.num_experts,
        "moe_intermediate_size": config.expert_dim,
        "n_shared_experts": config.shared_dim // config.expert_dim,
        "routed_scaling_factor": config.router.scale,
    }


def biased_sigmoid_router(data: Json) -> RouterConfig:
    """DeepSeek-V3's router, which GLM-4 took over."""
    return RouterConfig(
        score="sigmoid",
        norm_topk=data.get("norm_topk_prob", True),
        scale=data["routed_scaling_factor"],
        num_groups=data.get("n_group") or 1,
        top_groups=data.get("topk_group") or 1,
        selection_bias=True,
    )


FAMILIES: tuple[Family, ...] = (
    Mixtral(),
    Olmoe(),
    Qwen3Moe(),
    Qwen2Moe(),
    Glm4Moe(),
    DeepseekV3(),
    DeepseekV2(),
    GptOss(),
    Gpt2(),
)
"""Every family, in the order in which a model is offered to them."""


def family_of(model_type: str) -> Family:
    """The family of a config.json's `model_type`. Raises ValueError for one that is not implemented."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise ValueError(
        f"model_type={model_type} is not implemented; there are {', '.join(f.model_type for f in FAMILIES)}"
    )


def family_for(config: ModelConfig) -> Family:
    """The first family that can hold `config`. Raises ValueError, naming the nearest one and what it lacks."""
    lacking = []
    for family in FAMILIES:
        with suppress(ValueError):
            lacking.append((family.differences(config), family))
    nearest, family = min(lacking, key=lambda each: len(each[0]))
    if nearest:
        raise ValueError(
            f"no family of transformers computes this model; the nearest, {family.model_type}, has no "
            f"{', '.join(nearest)}. Change that, or keep the checkpoint in moeviz's own format"
        )
    return family
