"""One transformer block: attention, then experts or a dense feed-forward layer, each on a normalised copy."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from model.attention import Attention
from model.config import ModelConfig
from model.feedforward import build_dense
from model.kv_latents import LatentCache
from model.kv_layer import LayerCache
from model.latent_attention import LatentAttention
from model.mla import LatentHeadAttention
from model.moe import SparseMoE
from model.norm import build_norm
from model.rope import RopeTables
from model.router import Routing
from model.router_draws import RouterDraws

_ATTENTIONS = {"gqa": Attention, "mla": LatentHeadAttention, "latent": LatentAttention}


class BlockOutput(NamedTuple):
    hidden_BSD: Tensor
    routing: Routing | None
    """None for a dense block."""


class Block(nn.Module):
    """Pre-norm residual block; parameter names of Mixtral (experts) and Llama (dense)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config)
        self.self_attn = _ATTENTIONS[config.attention](config, layer)
        self.post_attention_layernorm = build_norm(config)
        moe = config.is_moe(layer)
        self.mlp: nn.Module = SparseMoE(config) if moe else build_dense(config)

    def forward(
        self,
        x_BSD: Tensor,
        rope: RopeTables,
        valid_BC: Tensor | None = None,
        cache: LayerCache | LatentCache | None = None,
        draws: RouterDraws | None = None,
        readable_B1SC: Tensor | None = None,
    ) -> BlockOutput:
        """`readable_B1SC` says all about what may be read, in place of padding and the core's own rule."""
        mask = valid_BC if readable_B1SC is None else readable_B1SC
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, mask, cache)
        h_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, SparseMoE):
            valid_BS = None if valid_BC is None else valid_BC[:, -x_BSD.shape[1] :]
            y = self.mlp(h_BSD, draws, valid_BS)
            return BlockOutput(x_BSD + y.hidden_BSD, y.routing)
        return BlockOutput(x_BSD + self.mlp(h_BSD), None)
