"""The tables of a run: one definition for segments, for the views over them and for a packed file.

Lists keep a row per (step, layer) instead of one per expert or token: 1.5 bytes a routing decision instead of
16. A change of any column is a new SCHEMA_VERSION; readers refuse versions they do not know instead of
guessing.
"""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

SCHEMA_VERSION = 1


class Column(NamedTuple):
    name: str
    type: pa.DataType
    doc: str


class Table(NamedTuple):
    name: str
    doc: str
    columns: tuple[Column, ...]
    order: tuple[str, ...]
    """Sort order of merged and packed rows: what readers filter on, slowest first."""
    sampled: bool = False
    """Rows of a sample: a full queue or disk may drop them, and says how many."""
    on_request: bool = False
    """Rows of a job that nobody need run: a run without this table is whole. New tables of this kind need no new
    SCHEMA_VERSION, because older readers never ask for them and this one takes their absence for no rows."""

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([pa.field(column.name, column.type) for column in self.columns])


def _list(type_: pa.DataType) -> pa.ListType:
    return pa.list_(type_)


_U8, _U16, _U32, _U64, _I32 = pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.int32()
_F32, _F64, _TEXT = pa.float32(), pa.float64(), pa.string()

_STEP = Column("step", _I32, "optimizer step")
_RANK = Column("rank", _U16, "process that wrote the row")
_LAYER = Column("layer", _U16, "index among the MoE layers, 0 to L-1")
_TS = Column("ts", _F64, "seconds since the epoch")
_SEQ = Column("seq", _U32, "sequence of the step: micro-batch x batch size + row")

MEANS = {
    "entropy_nats": "entropy_nats",
    "lse_squared": "z_loss",
    "confidence": "confidence",
    "margin": "margin",
}
"""Name in `LoadRecord.token_sums` -> column of expert_load with its mean; others: `metrics` as mean/NAME."""

EXPERT_LOAD = Table(
    "expert_load",
    "What the routers did: complete, one row per (step, layer). Lists have one entry per expert.",
    (
        _STEP,
        _RANK,
        _LAYER,
        _TS,
        Column("tokens", _U32, "valid tokens of the step"),
        Column("counts", _list(_U32), "assignments per expert before any drop; sums to tokens x K"),
        Column(
            "prob_sum",
            _list(_F32),
            "sum over tokens of the normalised scores, to 16 significant bits; NULL when not recorded",
        ),
        Column(
            "weight_sum",
            _list(_F32),
            "sum over tokens of the gate weights, to 16 significant bits; NULL when not recorded",
        ),
        Column("bias", _list(_F32), "selection bias at the end of the step; NULL where the router has none"),
        Column("dropped", _list(_U32), "assignments dropped by a capacity limit; NULL for a dropless model"),
        Column("entropy_nats", _F32, "mean entropy of a token's normalised scores, nats"),
        Column("z_loss", _F32, "mean of logsumexp(logits) squared"),
        Column("confidence", _F32, "mean of a token's largest normalised score"),
        Column("margin", _F32, "mean score gap between the last selected and the best unselected expert"),
    ),
    ("layer", "step", "rank"),
)

LOAD_LOD = Table(
    "load_lod",
    "Loads of whole buckets of steps, made when segments are merged, so that long curves stay fast.",
    (
        Column("step", _I32, "first step of the bucket, a multiple of span"),
        Column("span", _I32, "steps the bucket spans: 100 or 10,000"),
        _LAYER,
        Column("steps", _I32, "steps recorded in the bucket"),
        Column("assignments", _U64, "sum of counts over steps and experts"),
        Column("counts", _list(_U64), "assignments per expert, summed over the bucket"),
        Column("lo", _list(_F32), "smallest relative load of a step, per expert"),
        Column("hi", _list(_F32), "largest relative load of a step, per expert"),
    ),
    ("layer", "span", "step"),
)

ROUTING = Table(
    "routing",
    "Token-level decisions of sampled sequences, one row per (step, layer, sequence).",
    (
        _STEP,
        _RANK,
        _LAYER,
        _SEQ,
        Column("n_tokens", _I32, "valid tokens of the sequence"),
        Column("k", _U8, "experts per token"),
        Column("experts", _list(_U16), "n_tokens x k expert ids, token by token, slots by falling score"),
        Column("weights", _list(_U8), "gate weights as round(255 x weight / weight_scale), same order"),
        Column("weight_scale", _F32, "gate weight of code 255: 1 unless some weight of the row exceeds 1"),
    ),
    ("layer", "step", "seq"),
    sampled=True,
)

SEQUENCES = Table(
    "sequences",
    "The text behind routing: token ids and losses of the sampled sequences.",
    (
        _STEP,
        _RANK,
        _SEQ,
        Column("domain", _TEXT, "domain of the training mixture, where known"),
        Column("n_tokens", _I32, "valid tokens of the sequence"),
        Column("token_ids", _list(_I32), "ids, to be joined with vocab"),
        Column("token_loss", _list(_F32), "nats, loss of predicting the next token; NaN where there is none"),
    ),
    ("step", "seq"),
    sampled=True,
)

ATTENTION = Table(
    "attention",
    "Sampled attention maps, 8 bits scaled by the maximum of each row.",
    (
        _STEP,
        _RANK,
        Column("layer", _U16, "index of the attention core: the transformer block"),
        Column("head", _U16, "head"),
        _SEQ,
        Column("q_len", _I32, "queries before pooling"),
        Column("k_len", _I32, "keys before pooling"),
        Column("rows", _I32, "rows of the map"),
        Column("cols", _I32, "columns of the map"),
        Column("row_max", _list(_F32), "value of code 255 in each row"),
        Column("map", _list(_U8), "rows x cols codes, row by row"),
    ),
    ("layer", "step", "head", "seq"),
    sampled=True,
)

LATENTS = Table(
    "latents",
    "Latents of attention: spectra, profiles and a picture of one sequence. Their other numbers are in metrics.",
    (
        _STEP,
        _RANK,
        Column("layer", _U16, "index of the attention core: the transformer block"),
        Column("name", _TEXT, "kv, q: compressed vectors (MLA); read, write: the two stages of slots"),
        Column("head", _U16, "key head of read, query head of write; NULL for what all heads share"),
        Column("tokens", _I32, "tokens behind profile and behind the values in metrics"),
        _SEQ,
        Column("first", _I32, "token of that sequence that the first row of the grid is"),
        Column("length", _I32, "tokens behind the rows of the grid"),
        Column("rows", _I32, "rows of the grid: tokens in order, or blocks of them"),
        Column("cols", _I32, "columns of the grid: numbers of a latent, or slots"),
        Column("singular", _list(_F32), "singular values, largest first"),
        Column(
            "profile",
            _list(_F32),
            "kv, q: standard deviation of each number; read: entropy / ln S of each slot; write: mass of each slot",
        ),
        Column("lo", _F32, "value of code 0"),
        Column("hi", _F32, "value of code 255"),
        Column("grid", _list(_U8), "rows x cols codes, row by row"),
    ),
    ("layer", "step", "name", "head"),
    sampled=True,
    on_request=True,
)

METRICS = Table(
    "metrics",
    "Derived values of a step.",
    (
        _STEP,
        Column(
            "layer", _U16, "MoE layer; of latents the transformer block; NULL for a value of the whole run"
        ),
        Column("name", _TEXT, "name of the metric"),
        Column("value", _F64, "its value"),
    ),
    ("name", "layer", "step"),
)

SCALARS = Table(
    "scalars",
    "Numbers of a step that belong to no layer: loss, lr, grad_norm, tokens_per_second, val_loss/DOMAIN ...",
    (_STEP, _RANK, _TS, Column("name", _TEXT, "name of the scalar"), Column("value", _F64, "its value")),
    ("name", "step", "rank"),
)

ALERTS = Table(
    "alerts",
    "Life cycle of alerts: a row per transition; the newest row of an episode is its state.",
    (
        Column("step", _I32, "step of this transition"),
        _TS,
        Column("episode", _TEXT, "RULE/layer/first step"),
        Column("rule", _TEXT, "name of the rule"),
        Column("rule_version", _I32, "version of the rule"),
        Column("layer", _U16, "MoE layer; NULL for the whole run"),
        Column("experts", _list(_U16), "experts concerned"),
        Column("severity", _TEXT, "info, warning, error or critical"),
        Column("raised_step", _I32, "step that opened the episode"),
        Column("cleared_step", _I32, "step that closed it; NULL while open"),
        Column("value", _F64, "watched quantity at this step"),
        Column("peak", _F64, "its worst value in the episode"),
        Column("threshold", _F64, "threshold of the rule"),
        Column("message", _TEXT, "what happened"),
        Column("remedy", _TEXT, "what to do"),
        Column("evidence", _TEXT, "JSON"),
    ),
    ("step", "ts"),
)

EVENTS = Table(
    "events",
    "What happened to the run: started, resumed, checkpoint, ended, dropped samples, interventions.",
    (_STEP, _RANK, _TS, Column("kind", _TEXT, "kind of event"), Column("detail", _TEXT, "JSON")),
    ("step", "ts"),
)

ANALYSIS = Table(
    "analysis",
    "What `moeviz analyze` found about experts, layers and heads, each value beside its null.",
    (
        _STEP,
        Column("part", _TEXT, "run, layer, expert or head"),
        Column("layer", _U16, "MoE layer; for a head the block of its attention; NULL for the run"),
        Column("unit", _U16, "expert or head; NULL for a layer or the run"),
        Column("name", _TEXT, "name of the quantity"),
        Column(
            "label", _TEXT, "what it is about: a domain, a token, the other expert; empty: the whole part"
        ),
        Column("value", _F64, "its value"),
        Column("null_mean", _F64, "its mean under chance; NULL where chance says nothing"),
        Column("null_sd", _F64, "standard deviation under chance"),
    ),
    ("name", "layer", "unit", "label"),
    on_request=True,
)

PROBE_ROUTING = Table(
    "probe_routing",
    "Decisions about the fixed probe: the same tokens every time, in evaluation mode, apart from training's routing.",
    ROUTING.columns,
    ROUTING.order,
    on_request=True,
)

PROBE_SEQUENCES = Table(
    "probe_sequences",
    "The tokens of the fixed probe and the domain of each sequence, at every step at which it was run.",
    SEQUENCES.columns,
    SEQUENCES.order,
    on_request=True,
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        ROUTING,
        SEQUENCES,
        ATTENTION,
        LATENTS,
        METRICS,
        SCALARS,
        ALERTS,
        EVENTS,
        ANALYSIS,
        PROBE_SEQUENCES,
        PROBE_ROUTING,
        LOAD_LOD,
        EXPERT_LOAD,
    )
}
"""In flush order: expert_load last, so that a step seen there is complete in the other tables of that rank.
"""

VOCAB_SCHEMA = pa.schema([("token_id", _I32), ("text", _TEXT)])
"""vocab.parquet, once per run: the text of each token id."""


def segment_schema(table: str, run_id: str) -> pa.Schema:
    """The Arrow schema of a segment, with the schema version and the run's id in the Parquet metadata."""
    return TABLES[table].schema.with_metadata(
        {"moeviz_schema": str(SCHEMA_VERSION), "moeviz_run": run_id, "moeviz_table": table}
    )
