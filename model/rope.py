"""Rotary positions (Su et al. 2021): queries and keys turn by an angle that grows with their position.

Pairs are (i, i + D/2), the layout of Llama and its checkpoints, not neighbours. The tables are computed
once per forward pass in float32 and kept in no buffer: `model.bfloat16()` would round a buffer, and rounded
angles are wrong by whole radians a few hundred positions on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig


class RopeTables(NamedTuple):
    """Cosine and sine of every position's angles; D is the width of one head, both halves alike."""

    cos_SD: Tensor
    sin_SD: Tensor


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position of each of the D/2 pairs, base^(-2i/D), float32."""
    width = config.head_width
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / config.rope_base**exponents


def rope_tables(config: ModelConfig, start: int, length: int, like: Tensor) -> RopeTables:
    """Tables for positions start .. start + length - 1, on the device and in the dtype of `like`."""
    positions_S = torch.arange(start, start + length, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions_S, inverse_frequencies(config, like.device))
    angles_SD = torch.cat((angles, angles), dim=-1)
    return RopeTables(angles_SD.cos().to(like.dtype), angles_SD.sin().to(like.dtype))


def rotate(x_BHSD: Tensor, rope: RopeTables) -> Tensor:
    """Turn every head of `x_BHSD` by its position's angles."""
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * rope.cos_SD + torch.cat((-second, first), dim=-1) * rope.sin_SD
