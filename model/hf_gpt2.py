"""GPT-2 as a family of Hugging Face models: other keys, other names, matrices stored input first."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from model.block_config import BlockConfig
from model.config import ModelConfig
from model.hf_config import Family, Json


class Gpt2(Family):
    """Dense; for comparison, and to read checkpoints of its shape."""

    model_type, architecture = "gpt2", "GPT2LMHeadModel"
    prefix = "transformer."
    renames = (
        ("model.embed_tokens", "transformer.wte"),
        ("model.embed_positions", "transformer.wpe"),
        ("model.layers.", "transformer.h."),
        ("model.norm", "transformer.ln_f"),
        (".input_layernorm", ".ln_1"),
        (".post_attention_layernorm", ".ln_2"),
        (".self_attn.q_proj", ".attn.c_attn"),
        (".self_attn.k_proj", ".attn.c_attn"),
        (".self_attn.v_proj", ".attn.c_attn"),
        (".self_attn.o_proj", ".attn.c_proj"),
        (".mlp.up_proj", ".mlp.c_fc"),
        (".mlp.down_proj", ".mlp.c_proj"),
    )
    transposed = True
    refused = MappingProxyType(
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        }
    )

    def read(self, data: Json) -> ModelConfig:
        self.refuse(data)
        width = data.get("n_embd", 768)
        return ModelConfig(
            vocab_size=data.get("vocab_size", 50257),
            dim=width,
            num_layers=data.get("n_layer", 12),
            num_heads=data.get("n_head", 12),
            max_seq_len=data.get("n_positions", 1024),
            norm_eps=data.get("layer_norm_epsilon", 1e-5),
            init_std=data.get("initializer_range", 0.02),
            tie_embeddings=data.get("tie_word_embeddings", True),
            attention_bias="all",
            first_dense_layers=data.get("n_layer", 12),
            dense_ffn_dim=data.get("n_inner") or 4 * width,
            block=BlockConfig(norm="layer", positions="learned", dense_layer="gelu"),
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": config.vocab_size,
            "n_embd": config.dim,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_positions": config.max_seq_len,
            "n_inner": config.dense_dim,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tie_embeddings,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
