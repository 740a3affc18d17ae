"""What is recorded, and how much: one small object from the command line and from `watch(...)`.

Loads and scalars are always complete. Token-level rows and attention maps are sampled, because their volume is a
budget of the user's, not a consequence of the model: a limit in decisions, bytes or both thins the sampling while it
runs, and each change is an event of the run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moeviz.errors import MoevizError


@dataclass(frozen=True, kw_only=True)
class SamplingPolicy:
    """How much of a run's routing is written down."""

    route_every: int = 10
    """Record token-level routing every n optimizer steps (1: every step; 0: never)."""
    route_sequences: int | Literal["all"] = 4
    """How many sequences of such a step are recorded, or `all` of them."""
    attention_every: int = 50
    """Record attention maps every n optimizer steps (0: never)."""
    attention_heads: int = 4
    """Heads per attention core whose maps are recorded, spread evenly over the heads."""
    attention_size: int = 128
    """Side of a recorded map at most; longer sequences are averaged in blocks."""
    latent_every: int = 50
    """Record latents of attention (MLA, two-stage) every n optimizer steps (0: never)."""
    latent_layers: int | Literal["all"] = 4
    """Attention layers whose latents are recorded, spread evenly over the model, or `all` of them."""
    latent_tokens: int = 1024
    """Tokens of a step whose latents are looked at; give ten per dimension of a latent, or its rank looks low."""

    max_decisions_per_second: float = 0.0
    """Thin the sampling to this many (token, layer, slot) decisions a second on each rank (0: no limit)."""
    max_megabytes_per_second: float = 0.0
    """Thin the sampling to this many megabytes on disk a second on each rank (0: no limit)."""
    max_run_megabytes: float = 0.0
    """Thin the sampling as the run's samples approach this many megabytes on each rank, then end it (0: no limit)."""

    def __post_init__(self) -> None:
        for name in ("route_every", "attention_every", "attention_heads", "latent_every"):
            value = getattr(self, name)
            if value < 0:
                raise MoevizError(f"{name}={value} is negative; give 0 for never, or a positive number")
        for name in ("max_decisions_per_second", "max_megabytes_per_second", "max_run_megabytes"):
            value = getattr(self, name)
            if not value >= 0:
                raise MoevizError(f"{name}={value} is no limit; give 0 for none, or a positive number")
        if self.route_sequences != "all" and self.route_sequences < 0:
            raise MoevizError(
                f"route_sequences={self.route_sequences} is negative; give 0 or more sequences, or 'all'"
            )
        if self.latent_layers != "all" and self.latent_layers < 0:
            raise MoevizError(
                f"latent_layers={self.latent_layers} is negative; give 0 or more layers, or 'all'"
            )
        if self.latent_tokens < 2:
            raise MoevizError(
                f"latent_tokens={self.latent_tokens} is below 2; one token spans no space, 1024 is the default"
            )
        if self.attention_size < 8:
            raise MoevizError(f"attention_size={self.attention_size} is below 8; a smaller map shows nothing")

    def routes_at(self, step: int) -> bool:
        """Whether token-level rows of `step` are recorded."""
        return self.route_every > 0 and self.route_sequences != 0 and step % self.route_every == 0

    def attends_at(self, step: int) -> bool:
        """Whether attention maps of `step` are recorded."""
        return self.attention_every > 0 and self.attention_heads > 0 and step % self.attention_every == 0

    def shows_latents_at(self, step: int) -> bool:
        """Whether latents of `step` are recorded, where the model has any."""
        return self.latent_every > 0 and self.latent_layers != 0 and step % self.latent_every == 0

    @property
    def has_budget(self) -> bool:
        """Whether any limit is set."""
        return max(self.max_decisions_per_second, self.max_megabytes_per_second, self.max_run_megabytes) > 0

    def thinned(self, level: int, sequences: int) -> SamplingPolicy:
        """This policy at about 1/2^level of its volume: fewer sequences down to one, then fewer steps.

        Args:
            level: 0 or more.
            sequences: of a step, which is what `all` means.
        """
        if level == 0:
            return self
        wanted = sequences if self.route_sequences == "all" else self.route_sequences
        halvings = min(level, max(1, wanted).bit_length() - 1)
        return replace(
            self,
            route_sequences=wanted >> halvings,
            route_every=self.route_every << (level - halvings),
            attention_every=self.attention_every << level,
            latent_every=self.latent_every << level,
        )

    def silenced(self) -> SamplingPolicy:
        """This policy without any samples."""
        return replace(self, route_every=0, attention_every=0, latent_every=0)


EVERYTHING = SamplingPolicy(route_every=1, route_sequences="all")
"""Every decision of every token of every step."""
