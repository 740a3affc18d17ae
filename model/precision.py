"""Which dtype a product runs in, where autocast cannot decide it.

Autocast knows `F.linear` but neither `F.grouped_mm` nor our own ops, so those ask here and cast by hand.
The router must never run below float32: with bfloat16 logits 2.7 % of tokens change experts at 64 experts,
top-8.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would give a product of `x`, or `x.dtype` where autocast is off."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it was wider (float64 in gradient checks)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Products inside run in the dtype of their operands."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()  # an autocast that changes nothing costs as much as a small product
    return torch.autocast(x.device.type, enabled=False)
