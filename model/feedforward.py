"""Feed-forward networks: SwiGLU (Shazeer 2020) in dense blocks and shared experts, and GPT-2's for comparison."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.linear import Linear


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=False)
        self.up_proj = Linear(dim, hidden_dim, bias=False)
        self.down_proj = Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GeluFeedForward(nn.Module):
    """down(gelu(up(x))) with biases, as GPT-2 computes it (Hendrycks & Gimpel 2016, tanh approximation)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = Linear(dim, hidden_dim)
        self.down_proj = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


def build_dense(config: ModelConfig) -> nn.Module:
    """The layer of a block without experts."""
    kind = GeluFeedForward if config.block.dense_layer == "gelu" else FeedForward
    return kind(config.dim, config.dense_dim)
