"""The facts that travel from a training step to the store: frozen, plain numpy, no torch and no SQL.

One record says one thing about one step. The probe makes them, `derive` adds to them, a writer keeps them; nothing
else passes between capture and store, so either side can be replaced by a ten-line fake in a test.

Shape legend (the whole project): B batch, S sequence, T = B*S tokens, D width, F expert hidden, E experts, K experts
per token, H heads, L MoE layers, V vocabulary, N sampled sequences, Q query rows and C key columns of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

Severity = Literal["info", "warning", "error", "critical"]
ScoreFunction = Literal["softmax", "sigmoid", "softmax_topk", "unknown"]


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """One MoE layer of the watched model."""

    layer: int
    """Index among the MoE layers, 0 to L-1: the `layer` of every record and table."""
    name: str
    """Dotted module name of the router, for example `layers.3.mlp.gate`."""
    block: int
    """Index of the transformer block that holds it (dense blocks counted)."""
    num_experts: int
    top_k: int
    score: ScoreFunction = "unknown"
    has_bias: bool = False
    """Whether selection adds a bias that the gate weights do not see (auxiliary-loss-free balancing)."""


@dataclass(frozen=True, kw_only=True)
class AttentionInfo:
    """One attention core of the watched model."""

    layer: int
    """Index among all attention cores, 0-based: the transformer block's index."""
    name: str
    num_heads: int


@dataclass(frozen=True, kw_only=True)
class LatentInfo:
    """Attention that works through latents: compressed vectors (MLA), or slots that read for the queries."""

    layer: int
    """The transformer block."""
    name: str
    """Dotted module name of the attention."""
    kind: Literal["mla", "two-stage"]
    width: int
    """Numbers of an MLA latent of keys and values; slots of each key head."""
    num_heads: int
    """Query heads; 0 where the module does not say."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a reader must know about the model to read its records."""

    family: str
    layers: tuple[LayerInfo, ...]
    attentions: tuple[AttentionInfo, ...] = ()
    latents: tuple[LatentInfo, ...] = ()
    num_parameters: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def max_experts(self) -> int:
        return max((layer.num_experts for layer in self.layers), default=0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelInfo:
        return cls(
            family=data["family"],
            layers=tuple(LayerInfo(**layer) for layer in data["layers"]),
            attentions=tuple(AttentionInfo(**core) for core in data.get("attentions", ())),
            latents=tuple(LatentInfo(**each) for each in data.get("latents", ())),
            num_parameters=data.get("num_parameters", 0),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadRecord:
    """Everything the routers of one optimizer step did, summed over its tokens: complete, every step, every layer.

    Sums, never means: sums of micro-batches and ranks add up. Columns past a layer's own number of experts are zero.
    """

    step: int
    rank: int
    ts: float
    """Seconds since the epoch at the end of the step."""
    tokens: int
    """Valid (not padded) tokens N of the step."""
    counts_LE: np.ndarray
    """int64. Assignments before any capacity drop; each row sums to tokens x top_k."""
    prob_sum_LE: np.ndarray | None = None
    """float32. Sum over tokens of the normalised scores p (softmax, or sigmoid divided by its sum)."""
    weight_sum_LE: np.ndarray | None = None
    """float32. Sum over tokens of the gate weights that were given to the expert."""
    bias_LE: np.ndarray | None = None
    """float32. Selection bias at the end of the step, where the router has one."""
    dropped_LE: np.ndarray | None = None
    """int64. Assignments dropped by a capacity limit; None for a dropless model."""
    token_sums: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Per-layer sums over tokens, float32 [L], by name: `entropy_nats` (H of p), `lse_squared` (logsumexp of the
    logits, squared), `confidence` (largest p), `margin` (score of slot K minus the best one not selected) ..."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRoutingRecord:
    """Token-level decisions of the sampled sequences of one step, for all MoE layers that share E and K."""

    step: int
    rank: int
    layers: np.ndarray
    """int [L']. Indices of the MoE layers that the first axis of the next two stands for."""
    seqs: np.ndarray
    """int [N]. Index of each sequence in the step (micro-batch x batch size + row)."""
    experts_LNSK: np.ndarray
    """uint16. Slots by falling selection score."""
    weights_LNSK: np.ndarray
    """float32. Gate weights; 0 for a slot that a capacity limit dropped."""
    lengths_N: np.ndarray
    """int. Valid tokens of each sequence; they are the first ones on axis S (padding is already cut)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceRecord:
    """The text behind `TokenRoutingRecord`: same step, rank and seqs."""

    step: int
    rank: int
    seqs: np.ndarray
    token_ids_NS: np.ndarray
    """int32."""
    lengths_N: np.ndarray
    domains: tuple[str | None, ...]
    token_loss_NS: np.ndarray | None = None
    """float32, nats. Loss of predicting the *next* token at each position; NaN where there is none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeRecord:
    """What the routers did with the fixed probe: the same tokens each time, in evaluation mode. No part of any load."""

    step: int
    """Optimizer steps that the weights have seen: under `step` training starts from these weights."""
    rank: int
    sequences: SequenceRecord
    """The probe itself, with the domain of each sequence."""
    routings: tuple[TokenRoutingRecord, ...]
    """One for each E and K; layers in which experts choose their tokens are left out."""
    layer_values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float32 [L] by name of the metric, what is not a function of the decisions alone: `probe_drift`, `router_cos`,
    `pes` ...; NaN where it is not known."""
    ts: float = 0.0
    """Seconds since the epoch at the pass."""
    head_entropy: Mapping[int, np.ndarray] = field(default_factory=dict)
    """float32 [H], 0 to 1, by transformer block: `attn_entropy` of every head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionRecord:
    """One attention map. Rows are queries and sum to 1 unless it was pooled."""

    step: int
    rank: int
    layer: int
    """Index of the attention core (the block), not of the MoE layer."""
    head: int
    seq: int
    map_QC: np.ndarray
    """float32."""
    q_len: int
    """Queries before pooling; equals map_QC.shape[0] when nothing was pooled."""
    k_len: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentRecord:
    """The latents of one attention layer: how much of their space is used, and a picture of one sequence.

    X is 1 for what all heads share (MLA), else the recorded heads; C numbers of a latent, or slots.
    """

    step: int
    rank: int
    layer: int
    """The transformer block, not the MoE layer."""
    name: Literal["kv", "q", "read", "write"]
    """MLA's latents of keys and values, or of queries; what slots read of the tokens, or tokens of the slots."""
    heads: tuple[int, ...]
    """Key heads of `read`, query heads of `write`; empty for MLA."""
    tokens: int
    """How many tokens `profile_XC` and `values` speak of."""
    seq: int
    """Whose picture `grid_XSC` is."""
    length: int
    """Tokens of that sequence behind the rows; more than rows when these are blocks of tokens."""
    first: int = 0
    """Which token of the sequence the first row is: in its first chunk nobody has slots to read."""
    grid_XSC: np.ndarray
    """float32. A row per token in order (or block of tokens): the latent; the weight of each slot on the token (a
    block: their sum, so that columns sum to 1); the weight of the token on each slot (a block: their mean)."""
    singular_XR: np.ndarray
    """float32. Singular values, largest first: of the centred latents of all tokens; of what the slots read of that
    sequence; of the map from its last tokens through the slots to earlier ones."""
    profile_XC: np.ndarray
    """float32. Standard deviation of each number; entropy / ln S of what each slot reads; mass of each slot."""
    values: Mapping[str, float]
    """Quantities of `moeviz metrics` about the layer, means over heads and sequences."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalarRecord:
    """Numbers of a step that belong to no layer: loss, lr, grad_norm, tokens_per_second, val_loss/DOMAIN ..."""

    step: int
    rank: int
    ts: float
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class MetricRecord:
    """Derived values of a step. An array is per MoE layer [L]; a float is run-level."""

    step: int
    values: Mapping[str, np.ndarray | float]


@dataclass(frozen=True, kw_only=True)
class AlertRecord:
    """One transition in the life of one alert episode. The latest record of an episode is its state."""

    episode: str
    """Identifies the episode: `RULE/layer/first step`."""
    rule: str
    rule_version: int
    layer: int | None
    """MoE layer, or None for a run-level alert."""
    experts: tuple[int, ...]
    severity: Severity
    raised_step: int
    updated_step: int
    cleared_step: int | None
    value: float
    """The quantity that the rule watches, now."""
    peak: float
    """Its worst value in this episode."""
    threshold: float
    message: str
    remedy: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened to the run: started, resumed, checkpoint, ended, dropped samples, intervention."""

    step: int
    rank: int
    ts: float
    kind: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AnalysisValue:
    """One number that a job found out about a part of the model, with what chance alone would show."""

    part: Literal["run", "layer", "expert", "head"]
    layer: int
    """MoE layer; for a head the block of its attention; -1 for the run."""
    index: int
    """Expert or head; -1 for a layer or the run."""
    name: str
    """Name of the quantity, as `moeviz metrics` lists them where it does."""
    value: float
    null_mean: float = float("nan")
    """Its mean under chance; NaN where chance says nothing."""
    null_sd: float = float("nan")
    label: str = ""
    """What it is about: a domain, a token, the other expert ... ; empty: the part as a whole."""

    @property
    def hidden(self) -> bool:
        """Whether chance explains it: not three standard deviations away from the null. False without a null."""
        return abs(self.value - self.null_mean) < 3 * self.null_sd


@dataclass(frozen=True, kw_only=True, eq=False)
class AnalysisRecord:
    """What a job on a probe of fixed tokens found, made on request and not while training."""

    step: int
    values: tuple[AnalysisValue, ...]


Record = (
    LoadRecord
    | TokenRoutingRecord
    | SequenceRecord
    | ProbeRecord
    | AttentionRecord
    | LatentRecord
    | ScalarRecord
    | MetricRecord
    | AlertRecord
    | EventRecord
    | AnalysisRecord
)


class Sink(Protocol):
    """Where records go. Calls come from one thread at a time.

    `write` may raise: whoever stands between training and a sink (`store.BackgroundSink`) catches, counts and
    reports once. A sink never changes a record.
    """

    def write(self, record: Record) -> None: ...

    def flush(self) -> None:
        """Make everything written so far visible to readers."""

    def close(self) -> None:
        """Flush and release; further writes are an error."""
