"""Grouped-query attention (Ainslie et al. 2023), which is multi-head with G = H and multi-query with G = 1.

The product softmax(q k^T) v sits in a core, a module of its own called as `core(q, k, v)`: whoever wants to
see attention hooks the core and computes the rows it cares about from q and k; nothing here returns
weights. `EagerCore` spells the formula out and is the oracle of the others.

Here H counts query heads, G key and value heads, S queries, C keys (C >= S: the queries are the last S of
the C positions), and D is the width of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kv_cache import LayerCache
from model.norm import RMSNorm
from model.precision import at_least_float32
from model.rope import RopeTables, rotate


def visible_keys(num_queries: int, num_keys: int, valid_BC: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query may read: bool [S, C], or [B, 1, S, C] where padding differs between sequences.

    Query s stands at position C - S + s and reads nothing after itself. A query always reads its own
    position, also where that is padding: a row without any key would be 0/0.
    """
    query_S1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_C = torch.arange(num_keys, device=device)
    causal_SC = key_C <= query_S1
    if valid_BC is None:
        return causal_SC
    return causal_SC & (valid_BC[:, None, None, :] | (key_C == query_S1))


class AttentionCore(nn.Module):
    """softmax(q k^T * softmax_scale) v, causal. A hook reads the attributes to recompute any row."""

    causal = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.softmax_scale = config.head_width**-0.5
        self.num_kv_groups = config.num_heads // config.kv_heads
        """Query heads that share one key head; query head h reads key head h // num_kv_groups."""

    def forward(
        self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, valid_BC: Tensor | None = None
    ) -> Tensor:
        """Returns [B, H, S, D]. `valid_BC` is False at padding keys."""
        raise NotImplementedError


class EagerCore(AttentionCore):
    """The formula, line by line; memory grows with S x C."""

    def forward(
        self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, valid_BC: Tensor | None = None
    ) -> Tensor:
        k_BHCD = k_BGCD.repeat_interleave(self.num_kv_groups, dim=1)
        v_BHCD = v_BGCD.repeat_interleave(self.num_kv_groups, dim=1)
        scores_BHSC = at_least_float32(q_BHSD @ k_BHCD.transpose(-1, -2)) * self.softmax_scale
        visible = visible_keys(q_BHSD.shape[2], k_BGCD.shape[2], valid_BC, q_BHSD.device)
        weights_BHSC = scores_BHSC.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        return weights_BHSC.to(v_BHCD.dtype) @ v_BHCD


class SdpaCore(AttentionCore):
    """torch's scaled_dot_product_attention, which picks a fused kernel where it can."""

    def forward(
        self, q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, valid_BC: Tensor | None = None
    ) -> Tensor:
        queries, keys = q_BHSD.shape[2], k_BGCD.shape[2]
        plain = valid_BC is None and queries in (1, keys)
        return F.scaled_dot_product_attention(
            q_BHSD,
            k_BGCD,
            v_BGCD,
            attn_mask=None if plain else visible_keys(queries, keys, valid_BC, q_BHSD.device),
            # torch aligns its causal mask to the first key: right only for a square one, and one query sees
            # all keys.
            is_causal=plain and queries > 1,
            scale=self.softmax_scale,
            enable_gqa=self.num_kv_groups > 1,
        )


class Attention(nn.Module):
    """Project to heads, turn by position, attend, project back; parameter names of Llama."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        q_dim, kv_dim = config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.head_width = config.head_width
        self.qk_norm = config.qk_norm
        self.q_proj = nn.Linear(config.dim, q_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(config.head_width if per_head else q_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_width if per_head else kv_dim, config.norm_eps)
        self.core: AttentionCore = SdpaCore(config)

    def forward(
        self,
        x_BSD: Tensor,
        rope: RopeTables,
        valid_BC: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        q_BHSD, k_BGSD = self._queries_and_keys(x_BSD)
        q_BHSD, k_BGSD = rotate(q_BHSD, rope), rotate(k_BGSD, rope)
        v_BGSD = self._split(self.v_proj(x_BSD))
        if cache is not None:
            k_BGSD, v_BGSD = cache.append(k_BGSD, v_BGSD)
        heads_BHSD = self.core(q_BHSD, k_BGSD, v_BGSD, valid_BC)
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
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


def set_attention_core(model: nn.Module, core: type[AttentionCore], config: ModelConfig) -> None:
    """Exchange the core of every attention layer, for example for `EagerCore` to check a fused one."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.core = core(config)
