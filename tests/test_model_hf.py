"""A checkpoint of transformers computes the same here, and ours there: logits, gradients, ragged batches.

Every family is a tiny random model with biases far from zero, saved by transformers in its hub format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.attention_config import MLAConfig, ReachConfig, RopeConfig
from model.config import ModelConfig
from model.expert_config import ExpertConfig, RouterConfig
from model.hf import from_hf, to_hf
from model.lm import MoELanguageModel
from model.presets import PRESETS

VOCAB, LENGTH = 47, 11
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MLA = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 20_000.0,
}
DEEPSEEK: dict[str, Any] = {
    **SHAPE,
    **MLA,
    "num_key_value_heads": 4,
    "attention_bias": True,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}


def _mixtral(**changes: Any) -> nn.Module:
    config = transformers.MixtralConfig(
        **{
            **SHAPE,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            **changes,
        }
    )
    return transformers.MixtralForCausalLM(config)


def _olmoe(**changes: Any) -> nn.Module:
    values = {
        **SHAPE,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    }
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**{**values, **changes}))


def _qwen2(**changes: Any) -> nn.Module:
    values = {
        **SHAPE,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "shared_expert_intermediate_size": 28,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
    }
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**{**values, **changes}))


def _qwen3(**changes: Any) -> nn.Module:
    values = {
        **SHAPE,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "attention_bias": True,
        "mlp_only_layers": [0, 2],
        "tie_word_embeddings": True,
    }
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**values, **changes}))


def _glm4(**changes: Any) -> nn.Module:
    values = {
        **SHAPE,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "attention_bias": True,
    }
    return transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**{**values, **changes}))


def _deepseek_v2(**changes: Any) -> nn.Module:
    values = {**DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy", **changes}
    config = transformers.DeepseekV2Config(**values)
    return transformers.DeepseekV2ForCausalLM(config)


def _deepseek_v3(**changes: Any) -> nn.Module:
    rope = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    values = {**DEEPSEEK, "q_lora_rank": 14, "rope_parameters": rope, **changes}
    config = transformers.DeepseekV3Config(**values)
    return transformers.DeepseekV3ForCausalLM(config)


def _gpt_oss(**changes: Any) -> nn.Module:
    values = {
        **SHAPE,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "swiglu_limit": 0.9,
        "rope_parameters": {**YARN, "truncate": False},
        "attn_implementation": "eager",
    }
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**values, **changes}))


def _gpt2(**changes: Any) -> nn.Module:
    shape = {name: value for name, value in SHAPE.items() if name not in ("hidden_size", "num_hidden_layers")}
    shape |= {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    dropped = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **dropped, n_inner=40, **changes))


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
    "glm4_moe": _glm4,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "gpt2": _gpt2,
}


@torch.no_grad()
def _spread(model: nn.Module) -> nn.Module:
    """Weights far from 0.02, norms from 1, biases and sinks from 0: near those values errors would hide."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3)
    return model.train()


def _ragged() -> tuple[Tensor, Tensor]:
    ids_BS = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :4] = 0
    mask_BS[1, :1] = 0
    return ids_BS, mask_BS


def _logits(model: Any, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(model, MoELanguageModel):
            return model(ids_BS, attention_mask_BS=mask_BS).logits_BSV[mask_BS.bool()]
        return model(ids_BS, attention_mask=mask_BS).logits[mask_BS.bool()]


def _assert_same_function(ours: MoELanguageModel, theirs: nn.Module) -> None:
    ids_BS, mask_BS = _ragged()
    expected = _logits(theirs, ids_BS, mask_BS)
    torch.testing.assert_close(_logits(ours, ids_BS, mask_BS), expected, rtol=1e-4, atol=1e-4)


def _assert_same_gradients(
    ours: MoELanguageModel, theirs: nn.Module, family: str, share: float = 1e-4, noise: float = 1e-7
) -> None:
    """Of the mean loss of a ragged batch, all parameters, to a `share` of each one's largest gradient.

    Below `noise` is what gradients are that are 0 on paper: a router's whose only choice has weight 1 whatever it says.
    """
    ids_BS, mask_BS = _ragged()
    # The first token of a text is predicted from padding, where anything may stand.
    first_BS = mask_BS.cumsum(1) <= 1
    labels_BS = ids_BS.masked_fill(first_BS, -100)
    shifted_BS = torch.cat((labels_BS[:, 1:], labels_BS.new_full((3, 1), -100)), dim=1)
    ours.train()(ids_BS, shifted_BS, attention_mask_BS=mask_BS).ce.backward()
    theirs(ids_BS, attention_mask=mask_BS, labels=labels_BS).loss.backward()
    expected = _gradients(theirs, family)
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        twin = _our_layout(name, expected[name], family)
        atol = share * float(twin.abs().max()) + noise
        torch.testing.assert_close(
            parameter.grad, twin, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_computes_the_same_here(family: str, tmp_path: Path) -> None:
    theirs = _spread(FAMILIES[family]())
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = from_hf(tmp_path)
    assert not ours.training
    _assert_same_function(ours, theirs)
    _assert_same_gradients(ours, theirs, family, share=1e-5, noise=1e-8)


def _gradients(theirs: nn.Module, family: str) -> dict[str, Tensor]:
    """Their gradients by our names."""
    found = {_our_name(name): parameter.grad for name, parameter in theirs.named_parameters()}
    if family != "gpt2":
        return found
    ours: dict[str, Tensor] = {}
    for name, grad in found.items():
        name = name.replace("transformer.wte", "model.embed_tokens").replace("wpe", "embed_positions")
        name = (
            name.replace("transformer.h.", "model.layers.")
            .replace("ln_f", "norm")
            .replace("transformer", "model")
        )
        name = name.replace("ln_1", "input_layernorm").replace("ln_2", "post_attention_layernorm")
        name = name.replace("attn.c_proj", "self_attn.o_proj")
        name = name.replace("c_fc", "up_proj").replace("mlp.c_proj", "mlp.down_proj")
        if grad.ndim == 2 and "embed" not in name:
            grad = grad.t()
        if "c_attn" in name:
            for part, rows in zip("qkv", grad.chunk(3), strict=True):
                ours[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        else:
            ours[name] = grad
    return ours


def _our_name(name: str) -> str:
    return name.replace(".mlp.router.", ".mlp.gate.").replace(".shared_expert.", ".shared_experts.")


def _our_layout(name: str, theirs: Tensor, family: str) -> Tensor:
    """GPT-OSS: gate and up side by side, not in turns, and one row for each output."""
    if family != "gpt_oss" or ".experts." not in name:
        return theirs
    if "gate_up" in name:
        theirs = torch.cat((theirs[..., 0::2], theirs[..., 1::2]), dim=-1)
    return theirs if name.endswith("bias") else theirs.transpose(1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_is_opened_by_transformers(family: str, tmp_path: Path) -> None:
    theirs = _spread(FAMILIES[family]())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_hf(tmp_path / "theirs")
    to_hf(ours, tmp_path / "ours", family=family, max_shard_bytes=40_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    _assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(theirs)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _assert_same_function(ours, again)


def _assert_same_files(ours: Path, theirs: Path) -> None:
    """Same tensors in our many files as in their one."""
    actual = {name: value for path in ours.glob("*.safetensors") for name, value in load_file(path).items()}
    expected = load_file(theirs / "model.safetensors")
    if json.loads((theirs / "config.json").read_text())["tie_word_embeddings"]:
        expected.pop("lm_head.weight", None)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_experts_saved_in_stacks_load_as_well(tmp_path: Path) -> None:
    theirs = _spread(_qwen3())
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    _assert_same_function(from_hf(tmp_path), theirs)


def test_the_config_of_older_versions_is_read(tmp_path: Path) -> None:
    theirs = _spread(_deepseek_v3())
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    rope = data.pop("rope_parameters")
    data["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    path.write_text(json.dumps({**data, "rope_scaling": rope}))
    _assert_same_function(from_hf(tmp_path), theirs)


def test_dtype_is_the_stored_one_or_the_one_asked_for(tmp_path: Path) -> None:
    _spread(_glm4()).bfloat16().save_pretrained(tmp_path)
    stored, wide = from_hf(tmp_path), from_hf(tmp_path, dtype=torch.float32)
    assert stored.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, stored.lm_head.weight.float())
    bias = stored.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32


OURS: dict[str, Any] = {"vocab_size": VOCAB, "dim": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 64}


@pytest.mark.parametrize(
    ("values", "family"),
    [
        ({"reach": ReachConfig(window=8)}, "mixtral"),
        ({"rope": RopeConfig(rope_scaling="ntk", rope_factor=4.0)}, "mixtral"),
        ({"qk_norm": "projection", "top_k": 1}, "olmoe"),
        ({"qk_norm": "head", "moe_every": 2}, "qwen3_moe"),
        (
            {
                "attention_bias": "qkv",
                "num_shared_experts": 2,
                "experts": ExpertConfig(shared_expert_gate=True),
            },
            "qwen2_moe",
        ),
        (
            {"num_shared_experts": 1, "router": RouterConfig(score="sigmoid", selection_bias=True)},
            "glm4_moe",
        ),
        (
            {"attention": "mla", "mla": MLAConfig(**MLA), "router": RouterConfig(norm_topk=False)},
            "deepseek_v2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_family_is_found_for_a_model(values: dict[str, Any], family: str, tmp_path: Path) -> None:
    if values.get("attention") == "mla":
        values = {**values, "rope": RopeConfig(rope_pairs="neighbours")}
    ours = MoELanguageModel(ModelConfig(**OURS, **values)).eval()
    to_hf(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.model_type == family
    _assert_same_function(ours, theirs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": "latent"}, "attention=latent"),
        ({"reach": ReachConfig(window=4, sink_tokens=2)}, "nearest, mixtral, has no reach.sink_tokens=2"),
        ({"experts": ExpertConfig(expert_bias=True)}, "experts.expert_bias=True"),
        ({"experts": ExpertConfig(expert_activation="gelu")}, "experts.expert_activation=gelu"),
    ],
)
def test_a_model_of_no_family_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        to_hf(MoELanguageModel(ModelConfig(**OURS, **values)), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist; give a folder"):
        from_hf(tmp_path)
    model = _mixtral()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"already holds a config\.json"):
        to_hf(MoELanguageModel(ModelConfig(**OURS)), tmp_path)
    path, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    data, weights = json.loads(path.read_text()), load_file(file)

    def expect(message: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        path.write_text(json.dumps(config))
        save_file(tensors, file)
        with pytest.raises(ValueError, match=message):
            from_hf(tmp_path)

    expect("model_type=rwkv is not implemented; there are mixtral", data | {"model_type": "rwkv"}, weights)
    expect("hidden_act=gelu of this mixtral is not implemented", data | {"hidden_act": "gelu"}, weights)
    expect("has shape .* where config.json promises", data | {"vocab_size": VOCAB + 1}, weights)
    expect("no place for: extra", data, weights | {"extra": torch.zeros(2)})
    norm = "model.norm.weight"
    expect(f"lacks {norm}", data, {name: value for name, value in weights.items() if name != norm})


def test_gpt2_as_it_was_published_without_its_head(tmp_path: Path) -> None:
    """The first checkpoints name no `transformer.` and keep the causal mask among the weights."""
    theirs = _spread(_gpt2())
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(bare, file)
    _assert_same_function(from_hf(tmp_path), theirs)


def test_a_model_without_experts_is_a_gpt2_whatever_its_experts_would_be(tmp_path: Path) -> None:
    config = replace(
        PRESETS["gpt2-tiny"](),
        **OURS,
        first_dense_layers=2,
        num_experts=4,
        router=RouterConfig(selection_bias=True),
    )
    ours = MoELanguageModel(config).eval()
    to_hf(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.model_type == "gpt2"
    _assert_same_function(ours, theirs)
