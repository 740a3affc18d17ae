"""Rotary positions (Su et al. 2021): queries and keys turn by an angle that grows with their position.

Pairs are (i, i + D/2), the layout of Llama and its checkpoints, or neighbours, that of DeepSeek's. The tables
are computed once per forward pass in float32 and kept in no buffer: `model.bfloat16()` would round a buffer,
and rounded angles are wrong by whole radians a few hundred positions on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.attention_config import RopePairs
from model.config import ModelConfig
from model.rope_scaling import inverse_frequencies


class RopeTables(NamedTuple):
    """Cosine and sine of every position's angles; D is the width that turns, both halves alike."""

    cos_SD: Tensor
    sin_SD: Tensor

    def last(self, length: int) -> RopeTables:
        """The tables of the last `length` positions."""
        if length == self.cos_SD.shape[0]:
            return self
        return RopeTables(self.cos_SD[-length:], self.sin_SD[-length:])


def rope_tables(
    config: ModelConfig,
    start: int,
    length: int,
    like: Tensor,
    *,
    local: bool = False,
    total_length: int | None = None,
) -> RopeTables:
    """Tables for positions start .. start + length - 1, on the device and in the dtype of `like`.

    Without rotary positions they have width 0, and `rotate` turns nothing.

    `local` and `total_length` are those of `inverse_frequencies`. In two-stage latent attention positions
    count from the start of a chunk.
    """
    if config.rotary_width == 0:
        none_S0 = like.new_empty(length, 0)
        return RopeTables(none_S0, none_S0)
    positions_S = torch.arange(start, start + length, dtype=torch.float32, device=like.device)
    if config.attention == "latent":
        total_length = config.latents.latent_chunk
        positions_S = positions_S % total_length
    frequencies = inverse_frequencies(config, like.device, local=local, total_length=total_length)
    angles = torch.outer(positions_S, frequencies)
    angles_SD = torch.cat((angles, angles), dim=-1)
    plain = local and config.rope.local_rope_base is not None
    factor = 1.0 if plain else config.rope.turn_factor
    return RopeTables((angles_SD.cos() * factor).to(like.dtype), (angles_SD.sin() * factor).to(like.dtype))


def rotate(x_BHSD: Tensor, rope: RopeTables, pairs: RopePairs = "halves") -> Tensor:
    """Turn every head of `x_BHSD` by its position's angles, as far as the tables are wide.

    Neighbours come out sorted into halves, queries and keys alike: their products are the same.
    """
    width = rope.cos_SD.shape[-1]
    if width == 0:
        return x_BHSD
    if width < x_BHSD.shape[-1]:
        turned, rest = x_BHSD.split((width, x_BHSD.shape[-1] - width), dim=-1)
        return torch.cat((rotate(turned, rope, pairs), rest), dim=-1)
    if pairs == "neighbours":
        x_BHSD = torch.cat((x_BHSD[..., 0::2], x_BHSD[..., 1::2]), dim=-1)
    first, second = x_BHSD.chunk(2, dim=-1)
    return torch.addcmul(x_BHSD * rope.cos_SD, torch.cat((-second, first), dim=-1), rope.sin_SD)
