"""How fast each pair of a head turns, also when the context is longer than the one that was trained.

Positions beyond the trained ones meet angles that no weight has seen. Each scaling slows pairs down so that
the longer context turns them no further than training did: all alike (linear), the slow ones most (NTK), or
only those that never completed a turn (YaRN, llama3). Frequencies are float32, radians per position, [D/2].

`dynamic` depends on the length it is meant for. Here that is an argument, never the longest sequence seen so
far: a model that remembers it answers one prompt differently after having read another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from model.attention_config import RopeConfig, RopeScaling
from model.config import ModelConfig


def inverse_frequencies(
    config: ModelConfig,
    device: torch.device | None = None,
    *,
    local: bool = False,
    total_length: int | None = None,
) -> Tensor:
    """Radians per position of each pair, float32 [D/2].

    Args:
        config: the model.
        device: where to compute them.
        local: for the layers with a window, which may have a base of their own and are then not scaled.
        total_length: tokens the sequence will have, for `dynamic`. None: no more than were trained.
    """
    rope, width = config.rope, config.rotary_width
    if local and rope.local_rope_base is not None:
        return _plain(rope.local_rope_base, width, device)
    return _SCALINGS[rope.rope_scaling](rope, config.rope_base, width, total_length, device)


def _plain(base: float, width: int, device: torch.device | None) -> Tensor:
    """base^(-2i/D)."""
    return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


_Scaling = Callable[[RopeConfig, float, int, int | None, torch.device | None], Tensor]


def _none(
    rope: RopeConfig, base: float, width: int, total: int | None, device: torch.device | None
) -> Tensor:
    return _plain(base, width, device)


def _linear(
    rope: RopeConfig, base: float, width: int, total: int | None, device: torch.device | None
) -> Tensor:
    """Position interpolation (arXiv:2306.15595): every position divided by the factor."""
    return _plain(base, width, device) / rope.rope_factor


def _ntk(rope: RopeConfig, base: float, width: int, total: int | None, device: torch.device | None) -> Tensor:
    """A base for which the slowest pair is slowed by exactly the factor and the fastest not at all."""
    return _plain(_stretched(base, rope.rope_factor, width), width, device)


def _dynamic(
    rope: RopeConfig, base: float, width: int, total: int | None, device: torch.device | None
) -> Tensor:
    """NTK for `total` tokens: untouched up to the trained length, then a base that grows with the excess."""
    trained = rope.rope_trained_len
    assert trained is not None
    ratio = max(total or trained, trained) / trained
    return _plain(_stretched(base, rope.rope_factor * ratio - (rope.rope_factor - 1), width), width, device)


def _stretched(base: float, factor: float, width: int) -> float:
    return base * factor ** (width / (width - 2)) if width > 2 else base


def _yarn(
    rope: RopeConfig, base: float, width: int, total: int | None, device: torch.device | None
) -> Tensor:
    """YaRN (arXiv:2309.00071), section 3.2.

    Linear for slow pairs, untouched for fast ones, a ramp between.
    """
    trained = rope.rope_trained_len
    assert trained is not None

    def pair_that_turns(times: float) -> float:
        """Index of the pair with so many turns in the trained context."""
        return width * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_that_turns(rope.yarn_beta_fast), pair_that_turns(rope.yarn_beta_slow)
    if rope.yarn_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    slowed = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    plain = _plain(base, width, device)
    return plain / rope.rope_factor * slowed + plain * (1 - slowed)


def _llama3(
    rope: RopeConfig, base: float, width: int, total: int | None, device: torch.device | None
) -> Tensor:
    """Llama 3.1: YaRN's idea with a ramp over turns instead of pairs."""
    assert rope.rope_trained_len is not None
    plain = _plain(base, width, device)
    turns = rope.rope_trained_len * plain / (2 * math.pi)
    low, high = rope.llama3_low_freq, rope.llama3_high_freq
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / rope.rope_factor * (1 - kept) + plain * kept


_SCALINGS: Mapping[RopeScaling, _Scaling] = MappingProxyType(
    {
        "none": _none,
        "linear": _linear,
        "ntk": _ntk,
        "dynamic": _dynamic,
        "yarn": _yarn,
        "llama3": _llama3,
    }
)
