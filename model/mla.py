"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): all heads' keys and values from one latent.

A token is kept as its latent c_KV (R numbers) and one rotated key that all heads share (P numbers). There
are two ways to attend to it, equal but for rounding. Expanded: make every head's keys and values again; right
for many queries. Absorbed: multiply the up-projections into queries and outputs, and all heads read the
latents themselves, like multi-query attention with keys of R + P numbers; right for a few queries and a long
cache.

The latent passes through `latents`, a module that does nothing: hook it to see c_KV.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import attend, hold
from model.attention_core import AttentionCore
from model.attention_kernels import build_core
from model.config import ModelConfig
from model.kv_layer import Held, LayerCache
from model.linear import Linear
from model.norm import RMSNorm
from model.rope import RopeTables, rotate

_LATENT_EPS = 1e-6
"""Of the norms of latents, whatever the model's other norms add."""


class Latents(nn.Module):
    """Hands on the latents of new tokens, c_KV [B, S, R] after its norm, for hooks to see."""

    def forward(self, c_BSR: Tensor) -> Tensor:
        return c_BSR


class LatentHeadAttention(nn.Module):
    """MLA; parameter names of DeepSeek-V2 and V3."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        mla, heads, biased = config.mla, config.num_heads, config.attention_bias != "none"
        self.num_heads = heads
        self.nope, self.turned, self.v_width = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        self.rank = mla.kv_lora_rank
        self.rope_pairs = config.rope.rope_pairs
        q_dim = heads * (self.nope + self.turned)
        if mla.q_lora_rank is None:
            self.q_proj = Linear(config.dim, q_dim, bias=False)
        else:
            self.q_a_proj = Linear(config.dim, mla.q_lora_rank, bias=biased)
            self.q_a_layernorm = RMSNorm(mla.q_lora_rank, _LATENT_EPS)
            self.q_b_proj = Linear(mla.q_lora_rank, q_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(config.dim, self.rank + self.turned, bias=biased)
        self.kv_a_layernorm = RMSNorm(self.rank, _LATENT_EPS)
        self.kv_b_proj = Linear(self.rank, heads * (self.nope + self.v_width), bias=False)
        self.o_proj = Linear(heads * self.v_width, config.dim, bias=config.attention_bias == "all")
        self.latents = Latents()
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.reach.head_sinks else None
        self.core: AttentionCore = build_core(config, layer)
        self.absorb: bool | None = None
        """Which of the two ways; None: whichever multiplies less."""

    def forward(
        self,
        x_BSD: Tensor,
        rope: RopeTables,
        valid_BC: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`rope` ends with the angles of these S positions; it begins earlier for a cache that rotates late."""
        q_BHSN, q_BHSP = self._queries(x_BSD, rope.last(x_BSD.shape[1]))
        c_BSR, key_BSP = self.kv_a_proj_with_mqa(x_BSD).split((self.rank, self.turned), dim=-1)
        c_BSR = self.latents(self.kv_a_layernorm(c_BSR))
        key_B1SP = key_BSP[:, None]
        late = cache is not None and cache.rotates_late
        if not late:
            key_B1SP = rotate(key_B1SP, rope, self.rope_pairs)
        held = hold(cache, key_B1SP, c_BSR[:, None])
        if late:
            held = held._replace(k_BGCD=rotate(held.k_BGCD, rope, self.rope_pairs))
        absorbs = self.absorb if self.absorb is not None else self._absorbing_pays(x_BSD.shape[1], held)
        attend_to = self._absorbed if absorbs else self._expanded
        heads_BHSV = attend_to(q_BHSN, q_BHSP, held, valid_BC, cache)
        return self.o_proj(heads_BHSV.transpose(1, 2).flatten(2))

    def _queries(self, x_BSD: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor]:
        """The parts without and with position."""
        if hasattr(self, "q_proj"):
            q = self.q_proj(x_BSD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        q_BHSD = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q_BHSN, q_BHSP = q_BHSD.split((self.nope, self.turned), dim=-1)
        return q_BHSN, rotate(q_BHSP, rope, self.rope_pairs)

    def _absorbing_pays(self, queries: int, held: Held) -> bool:
        """Whether reading latents of R numbers costs less than making C keys and values of all heads."""
        keys = held.k_BGCD.shape[2]
        made = self.nope + self.v_width
        expanded = keys * (self.rank * made + queries * (made + self.turned))
        absorbed = queries * (self.rank * made + keys * (2 * self.rank + self.turned))
        return absorbed < expanded

    def _expanded(
        self,
        q_BHSN: Tensor,
        q_BHSP: Tensor,
        held: Held,
        valid_BC: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        made = self.kv_b_proj(held.v_BGCD[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_BHCN, v_BHCV = made.split((self.nope, self.v_width), dim=-1)
        shared_BHCP = held.k_BGCD.expand(-1, self.num_heads, -1, -1)
        k_BHCD = torch.cat((k_BHCN, shared_BHCP), dim=-1)
        q_BHSD = torch.cat((q_BHSN, q_BHSP), dim=-1)
        return attend(self.core, q_BHSD, Held(k_BHCD, v_BHCV, held.positions), valid_BC, cache, self.sinks)

    def _absorbed(
        self,
        q_BHSN: Tensor,
        q_BHSP: Tensor,
        held: Held,
        valid_BC: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        up_HOR = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        key_HNR, value_HVR = up_HOR.split((self.nope, self.v_width), dim=1)
        q_BHSD = torch.cat((q_BHSN @ key_HNR.to(q_BHSN.dtype), q_BHSP), dim=-1)
        k_B1CD = torch.cat((held.v_BGCD, held.k_BGCD), dim=-1)
        latent = Held(k_B1CD, held.v_BGCD, held.positions)
        read_BHSR = attend(self.core, q_BHSD, latent, valid_BC, cache, self.sinks)
        return read_BHSR @ value_HVR.to(read_BHSR.dtype).transpose(-1, -2)
