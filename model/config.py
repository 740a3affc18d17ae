"""What a model is, as plain data: frozen dataclasses the command line can read without torch.

Whether a combination makes sense is decided here, once, in `__post_init__`; whoever reads a config trusts it.
Sizes follow the legend of the project: D width, F hidden width of one expert, E experts, K experts per token,
H heads, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from model.attention_config import (
    AttentionBias,
    AttentionKernel,
    AttentionKind,
    LatentConfig,
    MLAConfig,
    QKNorm,
    ReachConfig,
    RopeConfig,
)
from model.block_config import BlockConfig
from model.expert_config import ExpertConfig, RouterConfig
from model.head_config import HeadConfig

__all__ = ["ModelConfig", "RouterConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Mixture-of-Experts language model."""

    vocab_size: int = 4096
    """Number of token ids, V."""
    dim: int = 256
    """Width of the residual stream, D."""
    num_layers: int = 6
    """Transformer blocks, dense ones included."""
    num_heads: int = 4
    """Query heads, H."""
    num_kv_heads: int | None = None
    """Key and value heads, each serving equally many query heads. None: num_heads; 1: multi-query."""
    head_dim: int | None = None
    """Width of one head. None: dim / num_heads."""
    max_seq_len: int = 512
    """Longest sequence the model is trained on and may generate, in tokens."""
    attention: AttentionKind = "gqa"
    """gqa (grouped queries; covers multi-head and multi-query), mla (DeepSeek), or latent (in two stages)."""
    attention_bias: AttentionBias = "none"
    """Biases on no projection, on queries, keys and values (Qwen2), or on all; in mla on its outer ones."""
    attention_kernel: AttentionKernel = "auto"
    """What computes attention; auto: flash-attn on CUDA where it is installed and fits, torch's SDPA else."""
    qk_norm: QKNorm = "none"
    """RMSNorm on queries and keys: none, per head (Qwen3), or over the whole projection (OLMoE)."""
    rope_base: float = 10_000.0
    """Base of the rotary position frequencies."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary positions beyond their base."""
    reach: ReachConfig = field(default_factory=ReachConfig)
    """Which earlier positions a query may read."""
    mla: MLAConfig = field(default_factory=MLAConfig)
    """Widths of attention=mla."""
    latents: LatentConfig = field(default_factory=LatentConfig)
    """Sizes of attention=latent."""
    norm_eps: float = 1e-5
    """Added to the mean square, or the variance, in every norm."""
    block: BlockConfig = field(default_factory=BlockConfig)
    """What blocks are made of around attention and experts."""
    tie_embeddings: bool = False
    """Use the token embedding as the output matrix too."""
    first_dense_layers: int = 0
    """Leading blocks with an ordinary feed-forward layer instead of experts."""
    moe_every: int = 1
    """Of the blocks behind those, every n-th has experts, counted from the first block: 2 alternates."""
    dense_layers: tuple[int, ...] = ()
    """Further blocks (0-based) without experts."""
    dense_ffn_dim: int | None = None
    """Hidden width of those feed-forward layers. None: as wide as the experts one token uses together."""
    num_experts: int = 8
    """Routed experts of a layer, E."""
    top_k: int = 2
    """Routed experts that each token uses, K."""
    expert_dim: int = 256
    """Hidden width of one routed expert, F."""
    num_shared_experts: int = 0
    """Experts that every token uses, beside the routed ones (kept as one wide feed-forward layer)."""
    shared_expert_dim: int | None = None
    """Hidden width of one shared expert. None: expert_dim."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How tokens choose experts."""
    experts: ExpertConfig = field(default_factory=ExpertConfig)
    """What an expert computes."""
    heads: HeadConfig = field(default_factory=HeadConfig)
    """What is predicted beside the next token, in training."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        self._check_positive()
        self._check_attention()
        if self.num_moe_layers > 0:
            self._check_routing()

    def _check_positive(self) -> None:
        names = [
            "vocab_size",
            "dim",
            "num_layers",
            "num_heads",
            "max_seq_len",
            "num_experts",
            "top_k",
            "expert_dim",
            "moe_every",
        ]
        names += ["num_kv_heads", "head_dim", "dense_ffn_dim", "shared_expert_dim"]
        names += ["rope_base", "norm_eps", "init_std"]
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not positive; give a number above 0")
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={self.num_shared_experts} is negative; 0 means none")
        if not 0 <= self.first_dense_layers <= self.num_layers:
            raise ValueError(
                f"first_dense_layers={self.first_dense_layers} is not between 0 and "
                f"num_layers={self.num_layers}; lower it or add layers"
            )

        for layer in self.dense_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"dense_layers={self.dense_layers} names block {layer}, but num_layers={self.num_layers}; "
                    "blocks count from 0"
                )
        if self.experts.shared_expert_gate and not self.num_shared_experts:
            raise ValueError(
                "shared_expert_gate=True has nothing to weigh; give num_shared_experts=1 or leave it out"
            )

    def _check_attention(self) -> None:
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"dim={self.dim} is not a multiple of num_heads={self.num_heads}; change one or give head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.kv_heads}; "
                "every key head serves the same number of query heads"
            )
        self._check_reach()
        if self.block.positions == "learned":
            if self.attention != "gqa":
                raise ValueError(
                    f"positions=learned does not fit attention={self.attention}, whose keys carry theirs; use rotary"
                )
            return
        if self.rotary_width % 2 or self.rotary_width == 0:
            name = "qk_rope_head_dim" if self.attention == "mla" else "head_dim"
            share = "" if self.rope.rotary_share == 1 else f" of which rotary_share={self.rope.rotary_share}"
            raise ValueError(
                f"{name}={self.rope_head_width}{share} is odd; rotary positions turn pairs, give an even width"
            )

    def _check_reach(self) -> None:
        kind, reach = self.attention, self.reach
        narrowed = (
            reach.window is not None or reach.sparsity != "none" or reach.sink_tokens or reach.head_sinks
        )
        if kind == "latent" and narrowed:
            raise ValueError(
                f"attention=latent with {reach} has two reaches; latents see all and queries their chunk: "
                "leave window, sink_tokens, sparsity and head_sinks at their defaults"
            )
        if kind == "mla" and self.qk_norm != "none":
            raise ValueError(
                f"qk_norm={self.qk_norm} does not fit attention=mla, which norms its latents; use none"
            )
        if kind == "mla" and self.num_kv_heads not in (None, self.num_heads):
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not fit attention=mla, whose heads share a latent; "
                "leave it out"
            )

    def _check_routing(self) -> None:
        experts, router = self.num_experts, self.router
        if self.top_k > experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={experts}; lower top_k or add experts")
        if experts % router.num_groups:
            raise ValueError(
                f"num_experts={experts} is not a multiple of router.num_groups={router.num_groups}; "
                "groups have equal sizes"
            )
        group = experts // router.num_groups
        if self.top_k > group * router.top_groups:
            raise ValueError(
                f"top_k={self.top_k} exceeds the {group * router.top_groups} experts of "
                f"router.top_groups={router.top_groups} groups of {group}; lower top_k or raise top_groups"
            )
        if router.num_groups > 1 and router.group_score == "top2_sum" and group < 2:
            raise ValueError(
                f"router.group_score=top2_sum needs two experts in a group, but num_experts={experts} in "
                f"{router.num_groups} groups leaves {group}; use group_score=max or fewer groups"
            )

    @property
    def kv_heads(self) -> int:
        """Key and value heads, with the default filled in."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head, with the default filled in."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rope_head_width(self) -> int:
        """Width of what positions may turn: a head, or the part of it with position in mla."""
        return self.mla.qk_rope_head_dim if self.attention == "mla" else self.head_width

    @property
    def rotary_width(self) -> int:
        """Width of what they do turn."""
        if self.block.positions == "learned":
            return 0
        share = 1.0 if self.attention == "mla" else self.rope.rotary_share
        return int(self.rope_head_width * share)

    @property
    def softmax_scale(self) -> float:
        """Factor on the scores q k^T."""
        if self.attention != "mla":
            return self.head_width**-0.5
        return (self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim) ** -0.5 * self.rope.score_factor

    @property
    def num_moe_layers(self) -> int:
        """Blocks with experts, L."""
        return sum(self.is_moe(layer) for layer in range(self.num_layers))

    @property
    def shared_dim(self) -> int:
        """Hidden width of all shared experts together; 0 without."""
        return self.num_shared_experts * (self.shared_expert_dim or self.expert_dim)

    @property
    def dense_dim(self) -> int:
        """Hidden width of a dense block's feed-forward layer, with the default filled in."""
        return self.dense_ffn_dim or self.top_k * self.expert_dim + self.shared_dim

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` (0-based) has experts."""
        patterned = layer >= self.first_dense_layers and (layer + 1) % self.moe_every == 0
        return patterned and layer not in self.dense_layers

    def is_causal(self) -> bool:
        """Whether no position can see what comes behind it; if not, generation is not what was trained."""
        return self.num_moe_layers == 0 or self.router.is_causal

    def looks_ahead(self) -> str:
        """How this model sees later tokens, and so what its numbers are worth; empty for a causal one."""
        if self.is_causal():
            return ""
        if self.router.chooser == "expert":
            return (
                "router.chooser=expert is not causal: experts choose among all tokens of a sequence, later ones "
                "included, so its losses, in training and in evaluation, are not those of predicting the next token, "
                "and text is written without what they relied on"
            )
        return (
            "router.drop_order=prob is not causal: in training later tokens push earlier ones out of a full expert, so "
            "its training losses know of the future; evaluation and generation drop none, and choose otherwise"
        )

    def num_parameters(self) -> int:
        """Every trained number; a tied output matrix counts once, the selection bias not at all."""
        return self._parameters_with(self.num_experts) + self.num_mtp_parameters()

    def num_active_parameters(self) -> int:
        """Parameters that one token passes through: all but the E - K experts it does not use.

        Modules that predict further tokens are left out: nothing passes through them when text is generated.
        """
        return self._parameters_with(self.top_k)

    def num_mtp_parameters(self) -> int:
        """Those of the modules that predict further tokens, which share embedding and output matrix."""
        norm = self.dim * (2 if self.block.norm == "layer" else 1)
        block = self._attention_parameters() + 2 * norm + self._dense_parameters()
        return self.heads.mtp_depth * (3 * norm + 2 * self.dim**2 + block)

    def _parameters_with(self, experts: int) -> int:
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        norm = self.dim * (2 if self.block.norm == "layer" else 1)
        places = self.max_seq_len * self.dim if self.block.positions == "learned" else 0
        block = self._attention_parameters() + 2 * norm
        matrices = 2 if self.router.router_noise == "shazeer" else 1
        router = self.num_experts * (matrices * self.dim + self.router.router_bias)
        inward = self.experts.inward_matrices
        expert = (inward + 1) * self.dim * self.expert_dim
        if self.experts.expert_bias:
            expert += inward * self.expert_dim + self.dim
        shared = 3 * self.dim * self.shared_dim + self.dim * self.experts.shared_expert_gate
        moe = router + experts * expert + shared
        dense = (self.num_layers - self.num_moe_layers) * self._dense_parameters()
        layers = self.num_layers * block + self.num_moe_layers * moe + dense
        contrastive = self.dim * (self.dim + self.heads.contrastive_width)
        return embeddings + places + layers + norm + (contrastive if self.heads.contrastive_width else 0)

    def _dense_parameters(self) -> int:
        if self.block.dense_layer == "gelu":
            return 2 * self.dim * self.dense_dim + self.dense_dim + self.dim
        return 3 * self.dim * self.dense_dim

    def _attention_parameters(self) -> int:
        if self.attention == "mla":
            return self._mla_parameters()
        q_dim, kv_dim = self.num_heads * self.head_width, self.kv_heads * self.head_width
        norms = {"none": 0, "head": 2 * self.head_width, "projection": q_dim + kv_dim}[self.qk_norm]
        biases = {"none": 0, "qkv": q_dim + 2 * kv_dim, "all": q_dim + 2 * kv_dim + self.dim}
        latents = self.latents.num_latents * kv_dim if self.attention == "latent" else 0
        return 2 * self.dim * (q_dim + kv_dim) + norms + biases[self.attention_bias] + latents + self._sinks()

    def _mla_parameters(self) -> int:
        mla, heads = self.mla, self.num_heads
        qk_width, out = mla.qk_nope_head_dim + mla.qk_rope_head_dim, heads * mla.v_head_dim
        queries = self.dim * heads * qk_width
        if mla.q_lora_rank is not None:
            queries = mla.q_lora_rank * (self.dim + 1 + heads * qk_width)
        down = self.dim * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank
        up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        bias = 0
        if self.attention_bias != "none":
            bias = (mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_rope_head_dim
            bias += self.dim if self.attention_bias == "all" else 0
        return queries + down + up + out * self.dim + bias + self._sinks()

    def _sinks(self) -> int:
        return self.num_heads if self.reach.head_sinks else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data for JSON, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises ValueError for a field that this version does not know."""
        values = dict(data)
        for name, kind in _NESTED.items():
            if isinstance(values.get(name), Mapping):
                values[name] = _build(kind, values[name], f"{name}.")
        if "dense_layers" in values:
            values["dense_layers"] = tuple(values["dense_layers"])
        return _build(cls, values, "")


_NESTED = {
    "block": BlockConfig,
    "router": RouterConfig,
    "experts": ExpertConfig,
    "heads": HeadConfig,
    "rope": RopeConfig,
    "reach": ReachConfig,
    "mla": MLAConfig,
    "latents": LatentConfig,
}
"""Fields that are configs themselves."""


def _build(kind: type, data: Mapping[str, Any], prefix: str) -> Any:
    known = {f.name for f in fields(kind)}
    for name in data:
        if name not in known:
            raise ValueError(
                f"{prefix}{name} is no field of {kind.__name__}; the fields are {', '.join(sorted(known))}. "
                "Was the checkpoint written by a newer version?"
            )
    return kind(**data)
