"""Grouped-query attention (Ainslie et al. 2023), which is multi-head with G = H and multi-query with G = 1.

The product softmax(q k^T) v sits in a core (`model.attention_core`), a module of its own. Here H counts query
heads, G key and value heads, S queries, C keys, and D is the width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention_core import AttentionCore
from model.attention_kernels import build_core
from model.config import ModelConfig
from model.kv_layer import Held, LayerCache
from model.linear import Linear
from model.masks import visible_slots
from model.norm import RMSNorm
from model.rope import RopeTables, rotate


class Attention(nn.Module):
    """Project to heads, turn by position, attend, project back; parameter names of Llama."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        q_dim, kv_dim = config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.head_width = config.head_width
        self.qk_norm = config.qk_norm
        self.rope_pairs = config.rope.rope_pairs
        biased = config.attention_bias != "none"
        self.q_proj = Linear(config.dim, q_dim, bias=biased)
        self.k_proj = Linear(config.dim, kv_dim, bias=biased)
        self.v_proj = Linear(config.dim, kv_dim, bias=biased)
        self.o_proj = Linear(q_dim, config.dim, bias=config.attention_bias == "all")
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(config.head_width if per_head else q_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_width if per_head else kv_dim, config.norm_eps)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.reach.head_sinks else None
        self.core: AttentionCore = build_core(config, layer)

    def forward(
        self,
        x_BSD: Tensor,
        rope: RopeTables,
        valid_BC: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`rope` ends with the angles of these S positions; it begins earlier for a cache that rotates late."""
        q_BHSD, k_BGSD = self._queries_and_keys(x_BSD)
        q_BHSD = rotate(q_BHSD, rope.last(x_BSD.shape[1]), self.rope_pairs)
        late = cache is not None and cache.rotates_late
        if not late:
            k_BGSD = rotate(k_BGSD, rope, self.rope_pairs)
        held = hold(cache, k_BGSD, self._split(self.v_proj(x_BSD)))
        if late:
            held = held._replace(k_BGCD=rotate(held.k_BGCD, rope, self.rope_pairs))
        heads_BHSD = attend(self.core, q_BHSD, held, valid_BC, cache, self.sinks)
        return self.o_proj(heads_BHSD.transpose(1, 2).flatten(2))

    def _queries_and_keys(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.q_proj(x_BSD), self.k_proj(x_BSD)
        if self.qk_norm == "projection":
            return self._split(self.q_norm(q)), self._split(self.k_norm(k))
        q_BHSD, k_BGSD = self._split(q), self._split(k)
        if self.qk_norm == "head":
            return self.q_norm(q_BHSD), self.k_norm(k_BGSD)
        return q_BHSD, k_BGSD

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, heads * D] -> [B, heads, S, D]."""
        return x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)


def hold(cache: LayerCache | None, k_BGSD: Tensor, v_BGSD: Tensor) -> Held:
    """What may be read: the new keys and values, behind those of the cache."""
    return Held(k_BGSD, v_BGSD, None) if cache is None else cache.append(k_BGSD, v_BGSD)


def attend(
    core: AttentionCore,
    q_BHSD: Tensor,
    held: Held,
    valid_BC: Tensor | None,
    cache: LayerCache | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Run the core over what is held, and tell the cache what was read."""
    mask = valid_BC
    if cache is not None and held.positions is not None:
        mask = visible_slots(core.reach, q_BHSD.shape[2], cache.length, held.positions, valid_BC)
        if 1 < mask.shape[1] < q_BHSD.shape[1]:
            mask = mask.repeat_interleave(q_BHSD.shape[1] // mask.shape[1], dim=1)
    more = {} if sinks_H is None else {"sinks_H": sinks_H}
    out_BHSD = core(q_BHSD, held.k_BGCD, held.v_BGCD, mask, **more)
    if cache is not None and cache.observes:
        visible = core.visible_keys(q_BHSD.shape[2], held.k_BGCD.shape[2], mask, q_BHSD.device)
        cache.observe(q_BHSD, held.k_BGCD, core.softmax_scale, visible)
    return out_BHSD


def set_attention_core(model: nn.Module, core: type[AttentionCore], config: ModelConfig) -> None:
    """Exchange the core of every attention layer, for example for `EagerCore` to check a fused one."""
    for module in model.modules():
        old = getattr(module, "core", None)
        if isinstance(old, AttentionCore) and old.exchangeable:
            module.core = core(config, old.layer)
