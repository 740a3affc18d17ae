"""The part of a model's config that says what its blocks are made of around attention and experts, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Norm = Literal["rms", "layer"]
Positions = Literal["rotary", "learned"]
DenseLayer = Literal["swiglu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Norms, positions and dense layers: by default those of Llama and its descendants; the others are GPT-2's."""

    norm: Norm = "rms"
    """rms: RMSNorm; layer: LayerNorm, with a mean and a bias."""
    positions: Positions = "rotary"
    """rotary: queries and keys turn; learned: a vector for each of max_seq_len places, added to the embedding."""
    dense_layer: DenseLayer = "swiglu"
    """Blocks without experts: swiglu, three matrices; gelu, two with biases (tanh approximation)."""
