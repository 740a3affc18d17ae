"""softmax(q k^T) v as a module of its own, called as `core(q, k, v)`, with exchangeable kernels.

Whoever wants to see attention hooks the core and computes the rows it cares about from q and k; nothing
here returns weights. `EagerCore` spells the formula out and is the oracle of the others.

Here H counts query heads, G key and value heads, S queries, C keys (C >= S: the queries are the last S of
the C positions), and D is the width of one head. Values may have a width of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.masks import Reach, visible_keys
from model.precision import at_least_float32


class AttentionCore(nn.Module):
    """softmax(q k^T * softmax_scale) v, causal. A hook reads the attributes to recompute any row."""

    causal = True
    exchangeable = True
    """Whether another core may stand in its place."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.softmax_scale = config.softmax_scale
        self.num_kv_groups = 1 if config.attention == "mla" else config.num_heads // config.kv_heads
        """Query heads that share one key head; query head h reads key head h // num_kv_groups."""
        self.reach = Reach.of(config.reach, layer)

    @property
    def window(self) -> int | None:
        """Last positions that a query reads, or None for all."""
        return self.reach.window

    def visible_keys(
        self, num_queries: int, num_keys: int, mask: Tensor | None, device: torch.device
    ) -> Tensor:
        """What each query of a call reads: bool [B or 1, H or 1, S, C], from the call's `mask`."""
        if mask is not None and mask.dim() == 4:
            return mask
        return visible_keys(self.reach, num_queries, num_keys, mask, device)

    def forward(
        self,
        q_BHSD: Tensor,
        k_BGCD: Tensor,
        v_BGCD: Tensor,
        mask: Tensor | None = None,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Returns [B, H, S, width of a value].

        Args:
            q_BHSD: queries, at the last S of the C positions.
            k_BGCD: keys.
            v_BGCD: values.
            mask: bool. [B, C]: False at padding keys, and the core's own rule for the rest. [B or 1, H or 1,
                S, C]: everything that may be read, and no other rule.
            sinks_H: a logit for each head that joins its softmax and reads nothing.
        """
        raise NotImplementedError


class EagerCore(AttentionCore):
    """The formula, line by line; memory grows with S x C."""

    def forward(
        self,
        q_BHSD: Tensor,
        k_BGCD: Tensor,
        v_BGCD: Tensor,
        mask: Tensor | None = None,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        shared = q_BHSD.shape[1] // k_BGCD.shape[1]
        k_BHCD = k_BGCD.repeat_interleave(shared, dim=1)
        v_BHCD = v_BGCD.repeat_interleave(shared, dim=1)
        scores_BHSC = at_least_float32(q_BHSD @ k_BHCD.transpose(-1, -2)) * self.softmax_scale
        visible = self.visible_keys(q_BHSD.shape[2], k_BGCD.shape[2], mask, q_BHSD.device)
        scores_BHSC = scores_BHSC.masked_fill(~visible, float("-inf"))
        if sinks_H is None:
            weights_BHSC = scores_BHSC.softmax(dim=-1)
        else:
            sinks = sinks_H.to(scores_BHSC.dtype)[None, :, None, None].expand(*scores_BHSC.shape[:3], 1)
            weights_BHSC = torch.cat((scores_BHSC, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        return weights_BHSC.to(v_BHCD.dtype) @ v_BHCD


class SdpaCore(AttentionCore):
    """torch's scaled_dot_product_attention, which picks a fused kernel where it can."""

    def forward(
        self,
        q_BHSD: Tensor,
        k_BGCD: Tensor,
        v_BGCD: Tensor,
        mask: Tensor | None = None,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        queries, keys = q_BHSD.shape[2], k_BGCD.shape[2]
        plain = mask is None and sinks_H is None and self.reach.plain and queries in (1, keys)
        visible = None if plain else self.visible_keys(queries, keys, mask, q_BHSD.device)
        if sinks_H is not None:
            assert visible is not None
            q_BHSD, k_BGCD, v_BGCD = with_sink_key(q_BHSD, k_BGCD, v_BGCD, sinks_H / self.softmax_scale)
            visible = F.pad(visible, (1, 0), value=True)
        width = v_BGCD.shape[-1]
        if queries == 1 and torch.compiler.is_compiling() and q_BHSD.device.type == "cpu":
            return one_query(q_BHSD, k_BGCD, v_BGCD, visible, self.softmax_scale)
        q_BHSD, k_BGCD, v_BGCD = of_one_width(q_BHSD, k_BGCD, v_BGCD)
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD,
            k_BGCD,
            v_BGCD,
            attn_mask=visible,
            # torch aligns its causal mask to the first key: right only for a square one, and one query sees
            # all keys.
            is_causal=plain and queries > 1,
            scale=self.softmax_scale,
            enable_gqa=q_BHSD.shape[1] != k_BGCD.shape[1],
        )
        return out_BHSD[..., :width]


def one_query(
    q_BH1D: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, visible: Tensor | None, softmax_scale: float
) -> Tensor:
    """The formula for one query, [B, H, 1, width of a value], as products and sums that a compiler fuses.

    A compiled step of a small model takes a fifth to a third less time with it than with torch's kernel.
    """
    q_BGQ1D = at_least_float32(q_BH1D).unflatten(1, (k_BGCD.shape[1], -1))
    scores_BHC = (q_BGQ1D * at_least_float32(k_BGCD)[:, :, None]).sum(dim=-1).flatten(1, 2) * softmax_scale
    if visible is not None:
        scores_BHC = scores_BHC.masked_fill(~visible[:, :, 0], float("-inf"))
    weights_BGQC = scores_BHC.softmax(dim=-1).unflatten(1, (k_BGCD.shape[1], -1))
    out_BGQD = (weights_BGQC[..., None] * at_least_float32(v_BGCD)[:, :, None]).sum(dim=-2)
    return out_BGQD.flatten(1, 2)[:, :, None].to(q_BH1D.dtype)


def of_one_width(q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros behind the narrower of keys and values: fused kernels take one width only.

    With the widths of MLA (48 and 32) the zeros make attention 1.6 times faster at 512 positions on a CPU, and
    2.7 times at 1,024.
    """
    missing = k_BGCD.shape[-1] - v_BGCD.shape[-1]
    if missing > 0:
        return q_BHSD, k_BGCD, F.pad(v_BGCD, (0, missing))
    if missing < 0:
        return F.pad(q_BHSD, (0, -missing)), F.pad(k_BGCD, (0, -missing)), v_BGCD
    return q_BHSD, k_BGCD, v_BGCD


def with_sink_key(
    q_BHSD: Tensor, k_BGCD: Tensor, v_BGCD: Tensor, sinks_H: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in which key 0 stands for the sinks: kernels without sinks then have them.

    Heads grow by 8 numbers (kernels want a multiple): the first is the head's sink in every query, 1 in key 0
    and 0 in all others. Key 0 is 0 elsewhere, and so is its value: it takes weight and gives nothing.
    """
    sinks = sinks_H.to(q_BHSD.dtype)[None, :, None, None].expand(*q_BHSD.shape[:3], 1)
    q_BHSD = F.pad(torch.cat((q_BHSD, sinks), dim=-1), (0, 7))
    sink_key = F.pad(k_BGCD.new_ones(*k_BGCD.shape[:2], 1, 1), (k_BGCD.shape[-1], 7))
    k_BGCD = torch.cat((sink_key, F.pad(k_BGCD, (0, 8))), dim=2)
    return q_BHSD, k_BGCD, F.pad(v_BGCD, (0, 0, 1, 0))
