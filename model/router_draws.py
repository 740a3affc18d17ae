"""Chance in routing, drawn once per forward pass and outside of any recomputed region.

A router that drew its own noise would draw other noise when a checkpointed block is recomputed, and choose
other experts than the ones whose outputs were used. So the decoder draws for all layers and hands each router
its share. Draws are a function of (seed, rank, number of passes): the number is saved with the model, and a
resumed run draws what the uninterrupted one would have drawn. Nothing is drawn in evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig

_LARGE_ODD = 0x9E3779B97F4A7C15
"""Spreads neighbouring counters over all seeds."""


class RouterDraws(NamedTuple):
    """Of one layer; None for what the config does not ask for."""

    noise_TE: Tensor | None
    """Standard normal or Gumbel, float32."""
    jitter_TD: Tensor | None
    """Factors on the router's input, in [1 - router_jitter, 1 + router_jitter]."""
    off_E: Tensor | None
    """bool. Experts that no token may choose in this pass."""


class DrawSource(nn.Module):
    """Draws for every MoE layer of a model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.passes = 0
        """Training passes so far."""
        self.rank: int | None = None
        """Who draws: ranks with one number draw alike. None: this process among all."""

    @torch.compiler.disable
    def forward(self, num_tokens: int, device: torch.device) -> list[RouterDraws]:
        """One set of draws for each MoE layer."""
        rank = self.rank
        if rank is None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        mixed = (self.passes + 1) * _LARGE_ODD ^ (self.config.router.noise_seed << 20) ^ (rank << 8)
        generator = torch.Generator(device).manual_seed(mixed % (1 << 63))
        self.passes += 1
        return [self._layer(num_tokens, device, generator) for _ in range(self.config.num_moe_layers)]

    def _layer(self, num_tokens: int, device: torch.device, generator: torch.Generator) -> RouterDraws:
        router, experts = self.config.router, self.config.num_experts
        noise_TE = jitter_TD = off_E = None
        if router.router_noise == "shazeer":
            noise_TE = torch.randn(num_tokens, experts, generator=generator, device=device)
        elif router.router_noise == "gumbel":
            uniform_TE = torch.rand(num_tokens, experts, generator=generator, device=device)
            noise_TE = -(-uniform_TE.clamp_min(1e-20).log()).log()
        if router.router_jitter:
            uniform_TD = torch.rand(num_tokens, self.config.dim, generator=generator, device=device)
            jitter_TD = 1 + router.router_jitter * (2 * uniform_TD - 1)
        if router.expert_dropout:
            off_E = self._switched_off(generator, device)
        return RouterDraws(noise_TE, jitter_TD, off_E)

    def _switched_off(self, generator: torch.Generator, device: torch.device) -> Tensor:
        """Each expert with probability `expert_dropout`, but never so many that a token finds too few."""
        share = self.config.router.expert_dropout
        luck_E = torch.rand(self.config.num_experts, generator=generator, device=device)
        kept = luck_E.topk(self.config.top_k).values.amin()
        return (luck_E < share) & (luck_E < kept)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.passes])

    def set_extra_state(self, state: Tensor) -> None:
        self.passes = int(state[0])
