"""The part of a model's config that says how tokens read each other: positions, reach, latents.

Plain data without torch. Every field is a flag of the command line, so names are used once in the whole
tree. What depends on other parts of the model is checked by `ModelConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

AttentionKind = Literal["gqa", "mla", "latent"]
AttentionBias = Literal["none", "qkv", "all"]
AttentionKernel = Literal["auto", "eager", "sdpa", "flex", "flash"]
QKNorm = Literal["none", "head", "projection"]
RopeScaling = Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3"]
RopePairs = Literal["halves", "neighbours"]
Sparsity = Literal["none", "strided", "fixed", "blocks"]

_NEED_TRAINED_LENGTH = ("dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: which part of a head turns, and how a longer context than the trained one is reached."""

    rope_scaling: RopeScaling = "none"
    """none; linear (positions divided); ntk (a larger base); dynamic (ntk for the length at hand); yarn; llama3."""
    rope_factor: float = 1.0
    """How many times longer than the trained context the new one is."""
    rope_trained_len: int | None = None
    """Context in tokens before it was stretched; dynamic, yarn and llama3 need it."""
    rotary_share: float = 1.0
    """Share of a head's width that turns with position; the rest carries none (not for mla)."""
    rope_pairs: RopePairs = "halves"
    """Which two numbers turn together: i and i + D/2 (Llama), or neighbours (DeepSeek's checkpoints)."""
    yarn_beta_fast: float = 32.0
    """Pairs that turn more often than this within the trained context are left alone."""
    yarn_beta_slow: float = 1.0
    """Pairs that turn less often than this are slowed by the whole factor."""
    yarn_truncate: bool = True
    """Round the two borders to whole pairs (GPT-OSS does not)."""
    yarn_attention_factor: float | None = None
    """Factor on cosine and sine. None: 0.1 ln(rope_factor) + 1, or what the two fields below make of it."""
    yarn_mscale: float = 0.0
    """Weight of ln(rope_factor) in that factor (DeepSeek). 0: not used."""
    yarn_mscale_all_dim: float = 0.0
    """Weight of ln(rope_factor) in a factor on all scores of mla, squared (DeepSeek). 0: not used."""
    llama3_low_freq: float = 1.0
    """Pairs that turn less often than this within the trained context are slowed by the whole factor."""
    llama3_high_freq: float = 4.0
    """Pairs that turn more often than this are left alone."""
    local_rope_base: float | None = None
    """Base of layers with a window, which are then not stretched (Gemma 3). None: as all other layers."""

    def __post_init__(self) -> None:
        scaling, trained = self.rope_scaling, self.rope_trained_len
        if self.rope_factor < 1:
            raise ValueError(f"rope_factor={self.rope_factor} is below 1; 1 leaves the context as it is")
        if trained is None and scaling in _NEED_TRAINED_LENGTH:
            raise ValueError(
                f"rope_scaling={scaling} has no rope_trained_len; give the length that was trained before"
            )
        if trained is not None and trained < 1:
            raise ValueError(f"rope_trained_len={trained} is below 1; give a number of tokens")
        if not 0 < self.rotary_share <= 1:
            raise ValueError(f"rotary_share={self.rotary_share} is not in (0, 1]; 1 turns the whole head")
        for low, high in (("yarn_beta_slow", "yarn_beta_fast"), ("llama3_low_freq", "llama3_high_freq")):
            below, above = getattr(self, low), getattr(self, high)
            if not 0 < below < above:
                raise ValueError(f"{low}={below} is not between 0 and {high}={above}; lower it")

    @property
    def turn_factor(self) -> float:
        """Factor on cosine and sine, and so, squared, on the scores of what turns (YaRN's temperature)."""
        if self.rope_scaling != "yarn":
            return 1.0
        if self.yarn_attention_factor is not None:
            return self.yarn_attention_factor
        if self.yarn_mscale and self.yarn_mscale_all_dim:
            return self._mscale(self.yarn_mscale) / self._mscale(self.yarn_mscale_all_dim)
        return self._mscale(1.0)

    @property
    def score_factor(self) -> float:
        """Factor on the scores of whole heads: DeepSeek's `mscale_all_dim`, squared; 1 without scaling."""
        if self.rope_scaling == "none" or not self.yarn_mscale_all_dim:
            return 1.0
        return self._mscale(self.yarn_mscale_all_dim) ** 2

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.rope_factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class ReachConfig:
    """Which earlier positions a query may read. Everything below narrows plain causal attention."""

    window: int | None = None
    """Positions that a query of a local layer reads, its own included. None: all before it."""
    global_every: int = 0
    """With a window, every n-th layer reads everything: 2 alternates (GPT-OSS), 6 is Gemma 3. 0: no layer does."""
    sink_tokens: int = 0
    """First positions that stay visible beyond window and pattern (attention sinks, arXiv:2309.17453)."""
    sparsity: Sparsity = "none"
    """Pattern: strided, fixed (arXiv:1904.10509), or blocks (the own block and the one before it)."""
    sparse_block: int = 64
    """Stride of the pattern, in positions."""
    head_sinks: bool = False
    """A learned logit per head joins the softmax and reads nothing (GPT-OSS): heads may look at nothing."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} is below 1; a query reads at least itself")
        for name in ("global_every", "sink_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; 0 means none")
        if self.global_every and self.window is None:
            raise ValueError(f"global_every={self.global_every} has no window to differ from; give window")
        if self.sparse_block < 1:
            raise ValueError(f"sparse_block={self.sparse_block} is below 1; give a number of positions")

    def is_local(self, layer: int) -> bool:
        """Whether layer `layer` (0-based) has the window."""
        return self.window is not None and not (self.global_every and (layer + 1) % self.global_every == 0)


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values from one narrow latent."""

    q_lora_rank: int | None = None
    """Width of the latent that queries are made from. None: made from the stream directly."""
    kv_lora_rank: int = 64
    """Width of the latent c_KV that keys and values of all heads are made from, and that is cached."""
    qk_nope_head_dim: int = 32
    """Width of a head's query and key without position."""
    qk_rope_head_dim: int = 16
    """Width of the part with position, whose key all heads share."""
    v_head_dim: int = 32
    """Width of a head's value."""

    def __post_init__(self) -> None:
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not positive; give a number above 0")


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Two-stage latent attention: learned latents read the past, queries read the latents and what is near."""

    num_latents: int = 16
    """Learned latents of each key head, M."""
    latent_chunk: int = 64
    """Positions of a chunk: latents are read at its borders, and inside it queries read keys directly."""

    def __post_init__(self) -> None:
        for name in ("num_latents", "latent_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; give a positive number")
