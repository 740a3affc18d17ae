"""Tensors of a micro-batch to sums per expert and per layer, on the device, without waiting for it.

Everything is a sum over valid tokens, so that micro-batches and ranks add up. Definitions (metrics C1 to
C8): z raw logits in float32; p the normalised scores, softmax(z), or for sigmoid gates s / sum(s) with s =
sigmoid(z) (DeepSeek-V3, eq. 18); the score that ranks experts is s, or p for softmax gates, plus the
selection bias.

The tables of scores are worked through in blocks that stay in a processor's cache, in place, in memory that is
kept: fresh pages cost more than the arithmetic.

Shapes: L layers that share E and K, T tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeviz.capture.reading import Reading
from moeviz.capture.workspace import Workspace
from moeviz.records import ScoreFunction

TOKEN_SUMS = ("entropy_nats", "lse_squared", "confidence", "logit_squared", "margin")
"""Names of the rows of `RoutingSums.token_sums_NL`. `logit_squared`: z^2, mean over experts."""

_BLOCK_CPU = 2**18
_BLOCK_DEVICE = 2**24
"""Scores (L x T x E) worked on at a time: two tables of the first size stay in a processor's cache (2 MB; half
of that takes as long, for twice the calls), 16 million keep an accelerator busy."""
_NARROW = 32
"""Experts below which a CPU reduces over them faster when tokens are what lies side by side: a row of 16 numbers is too
short to fill its registers (measured with AVX-512: 1.7 ns a number against 0.1)."""
_ROWS, _COLUMNS = -1, -2
"""The dimension of the experts in a table: [.., T, E] or, of narrow routers on a CPU, [.., E, T]."""
_LN2 = 0.6931471805599453
_TINY = 1.2e-38
"""Smallest normal number of float32: its logarithm is finite."""


class RoutingSums(NamedTuple):
    """Sums over the valid tokens of a micro-batch, for L layers."""

    counts_LE: Tensor
    """int64, before any capacity drop."""
    dropped_LE: Tensor
    """int64; zeros for dropless layers."""
    prob_sum_LE: Tensor
    weight_sum_LE: Tensor
    token_sums_NL: Tensor
    """float32, rows as in TOKEN_SUMS; NaN where a quantity has no meaning or was not asked for."""


class Decisions(NamedTuple):
    """The readings of L layers, stacked."""

    logits: tuple[Tensor, ...]
    """[T, E] of each layer, in the model's own type."""
    weights_LTK: Tensor
    """float32."""
    expert_ids_LTK: Tensor
    """int64."""
    dropped_LTK: Tensor | None
    unused_LTK: Tensor | None
    counts_LE: Tensor | None

    @property
    def logits_LTE(self) -> Tensor:
        """float32, copied at each call."""
        return torch.stack(self.logits).float()


class Scores(NamedTuple):
    """Scores of L layers, [L, T, E], and what their sums over experts tell of each token, [L, T]."""

    ranking_LTE: Tensor
    """What ranks the experts, without selection bias; for softmax gates the same tensor as `probs_LTE`."""
    probs_LTE: Tensor
    top_prob_LT: Tensor
    entropy_LT: Tensor
    lse_LT: Tensor


def stack(readings: Sequence[Reading], workspace: Workspace | None = None) -> Decisions:
    """Put the readings of layers with equal T, E and K on top of each other; the ids in the workspace, if given."""

    def together(parts: Sequence[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.stack(known) if len(known) == len(parts) else None

    return Decisions(
        tuple(reading.logits_TE for reading in readings),
        torch.stack([reading.weights_TK for reading in readings]).float(),
        _ids([reading.expert_ids_TK for reading in readings], workspace),
        together([reading.dropped_TK for reading in readings]),
        together([reading.unused_TK for reading in readings]),
        together([reading.counts_E for reading in readings]),
    )


def _ids(parts: list[Tensor], workspace: Workspace | None) -> Tensor:
    if workspace is None or parts[0].dtype != torch.int64:
        return torch.stack(parts).long()
    shape = (len(parts), *parts[0].shape)
    return torch.stack(parts, out=workspace.table("ids", shape, parts[0].device, torch.int64))


def scores_of(logits_LTE: Tensor, score: ScoreFunction) -> Scores:
    """Scores, their entropy in nats, and logsumexp of the logits. Every kind but sigmoid ranks by softmax."""
    tables = _tables(logits_LTE.clone(), torch.empty_like(logits_LTE), score)
    return Scores(tables.ranking, tables.probs, *_per_token(tables[2:], score))


class _Tables(NamedTuple):
    """The two tables of a block, and sums over experts that finish to the quantities of a token."""

    ranking: Tensor
    """[L, T, E] or [L, E, T], as the logits were."""
    probs: Tensor
    top_LT: Tensor
    """Largest logit."""
    total_exp_LT: Tensor
    """Sum of exp(z - largest z)."""
    total_LT: Tensor
    """Sum of the scores before they are normalised: the same for softmax, sum of s for sigmoid."""
    log_LT: Tensor
    """Sum of (score before it is normalised) x (its log2)."""


def _tables(logits: Tensor, spare: Tensor, score: ScoreFunction, experts: int = _ROWS) -> _Tables:
    """Scores in the memory of the arguments, both overwritten; `experts`: the dimension of the experts.

    exp2 and log2: on a CPU a quarter of the time of exp, and a third of that of softmax() with few experts.
    """
    top_LT = logits.amax(experts)
    if score == "sigmoid":
        torch.sigmoid(logits, out=spare)
        total_exp_LT = logits.sub_(top_LT.unsqueeze(experts)).div_(_LN2).exp2_().sum(experts)
        total_LT = spare.sum(experts)
        log2 = _log2_(torch.clamp_min(spare, _TINY, out=logits))
        log_LT = log2.mul_(spare).sum(experts)
        probs = torch.div(spare, total_LT.unsqueeze(experts), out=logits)
        return _Tables(spare, probs, top_LT, total_exp_LT, total_LT, log_LT)
    log2 = logits.sub_(top_LT.unsqueeze(experts)).div_(_LN2)
    torch.exp2(log2, out=spare)
    total_LT = spare.sum(experts)
    log_LT = log2.mul_(spare).sum(experts)
    probs = spare.div_(total_LT.unsqueeze(experts))
    return _Tables(probs, probs, top_LT, total_LT, total_LT, log_LT)


def _per_token(sums: Iterable[Tensor], score: ScoreFunction) -> tuple[Tensor, Tensor, Tensor]:
    """(largest probability, entropy in nats, logsumexp), [L, T]: p = score / total, H = ln total - sum p ln score."""
    top_LT, total_exp_LT, total_LT, log_LT = sums
    top_prob_LT = (top_LT.sigmoid() if score == "sigmoid" else 1) / total_LT
    entropy_LT = _LN2 * (_log2_(total_LT.clone()) - log_LT / total_LT)
    return top_prob_LT, entropy_LT, top_LT + _LN2 * _log2_(total_exp_LT.clone())


def _log2_(values: Tensor) -> Tensor:
    """log2 in place: NumPy's takes a quarter of the time of torch's on one core."""
    if not values.is_cpu or values.dtype != torch.float32:
        return values.log2_()
    array = values.numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        np.log2(array, out=array)
    return values


def selection_margin(
    ranking: Tensor, bias_LE: Tensor | None, expert_ids_LTK: Tensor, experts: int = _ROWS
) -> Tensor:
    """Score of the last selected expert minus that of the best unselected one, bias included, [L, T].

    Overwrites `ranking`, contiguous [L, T, E] or (`experts` -2) [L, E, T]: the largest tensor here is not copied.
    """
    if bias_LE is not None:
        ranking += bias_LE.unsqueeze(_tokens(experts))
    places = _places(expert_ids_LTK, ranking.shape, experts)
    # By their places in all of the table: gather and scatter along a dimension take three times as long.
    flat, index = ranking.view(-1), places.view(-1)
    selected = flat.index_select(0, index).view(places.shape)
    lowest_LT = selected.amin(experts)
    # A scatter of a tensor takes a third of the time that one of a number takes.
    flat.scatter_(0, index, selected.fill_(float("-inf")).view(-1))
    return lowest_LT - ranking.amax(experts)


def _places(expert_ids_LTK: Tensor, shape: Sequence[int], experts: int) -> Tensor:
    """Where the chosen scores lie in a contiguous table of that shape, [L, T, K] or [L, K, T] as the table is."""
    num_layers, num_tokens, num_experts = shape[0], shape[_tokens(experts)], shape[experts]
    device = expert_ids_LTK.device
    table_L11 = torch.arange(num_layers, device=device)[:, None, None] * (num_tokens * num_experts)
    token_T = torch.arange(num_tokens, device=device)
    if experts == _ROWS:
        return table_L11 + token_T[:, None] * num_experts + expert_ids_LTK
    ids_LKT = expert_ids_LTK.mT
    places_LKT = torch.empty(ids_LKT.shape, dtype=torch.int64, device=device)
    return torch.add(table_L11 + token_T, ids_LKT, alpha=num_tokens, out=places_LKT)


def _tokens(experts: int) -> int:
    """The dimension of the tokens, beside that of the experts."""
    return _ROWS + _COLUMNS - experts


def sum_decisions(
    decisions: Decisions,
    score: ScoreFunction,
    bias_LE: Tensor | None = None,
    valid_T: Tensor | None = None,
    ranked: bool = True,
    logit_squared: bool = False,
    workspace: Workspace | None = None,
) -> RoutingSums:
    """Sum the decisions of L layers over the tokens that count.

    Args:
        decisions: stacked readings.
        score: how logits become scores.
        bias_LE: selection bias, float32.
        valid_T: bool, False at padding; None: all tokens count.
        ranked: whether the K experts are the best by score and bias; False makes the margin NaN.
        logit_squared: sum the squared logits; they need a pass of their own over the scores.
        workspace: memory to work in, kept by the caller; None: fresh memory.
    """
    num_experts, top_k = decisions.logits[0].shape[-1], decisions.expert_ids_LTK.shape[-1]
    workspace = workspace or Workspace()
    assigned = _Assignments(decisions, num_experts, valid_T, workspace)
    per_token, prob_sum_LE = _Tokens(decisions, score), torch.zeros_like(assigned.weight_sum_LE)
    narrow = num_experts < _NARROW and decisions.logits[0].is_cpu
    experts = _COLUMNS if narrow else _ROWS
    for layers, tokens in _blocks(decisions.logits):
        assigned.add(layers, tokens)
        logits, spare = _load(decisions.logits[layers], tokens, workspace, experts)
        valid = None if valid_T is None else valid_T[tokens]
        if valid is not None:  # padding may hold NaN, which no later factor of 0 would remove
            logits.masked_fill_(~valid.unsqueeze(experts), 0.0)
        if logit_squared:
            per_token.square_LT[layers, tokens] = torch.mul(logits, logits, out=spare).mean(experts)
        tables = _tables(logits, spare, score, experts)
        per_token.keep(tables, layers, tokens)
        prob_sum_LE[layers] += _over_tokens(tables.probs, valid, experts)
        if ranked and top_k < num_experts:
            bias, ids_LTK = None if bias_LE is None else bias_LE[layers], decisions.expert_ids_LTK
            per_token.margin_LT[layers, tokens] = selection_margin(
                tables.ranking, bias, ids_LTK[layers, tokens], experts
            )
    token_sums_NL = _over_tokens(per_token.finished_RLT().permute(1, 2, 0), valid_T).T
    counts_LE, dropped_LE = assigned.counts()
    return RoutingSums(counts_LE, dropped_LE, prob_sum_LE, assigned.weight_sum_LE, token_sums_NL)


class _Tokens:
    """Sums over experts of each token, filled block by block and finished at once."""

    def __init__(self, decisions: Decisions, score: ScoreFunction) -> None:
        shape = decisions.expert_ids_LTK.shape[:2]
        self._score = score
        self._sums_RLT = decisions.weights_LTK.new_empty(len(_Tables._fields) - 2, *shape)
        self.square_LT, self.margin_LT = self._sums_RLT.new_full((2, *shape), float("nan"))

    def keep(self, tables: _Tables, layers: slice, tokens: slice) -> None:
        torch.stack(tables[2:], out=self._sums_RLT[:, layers, tokens])

    def finished_RLT(self) -> Tensor:
        """Rows as in TOKEN_SUMS."""
        top_prob_LT, entropy_LT, lse_LT = _per_token(self._sums_RLT, self._score)
        return torch.stack([entropy_LT, lse_LT.square_(), top_prob_LT, self.square_LT, self.margin_LT])


def _blocks(logits: Sequence[Tensor]) -> Iterator[tuple[slice, slice]]:
    """(layers, tokens) of tables that fit the budget: several layers, or a part of one."""
    num_tokens, num_experts = logits[0].shape
    budget = _BLOCK_CPU if logits[0].device.type == "cpu" else _BLOCK_DEVICE
    tokens = max(1, min(num_tokens, budget // num_experts))
    layers = max(1, budget // max(1, tokens * num_experts))
    for layer in range(0, len(logits), layers):
        for token in range(0, num_tokens, tokens):
            yield slice(layer, layer + layers), slice(token, token + tokens)


def _load(
    logits: Sequence[Tensor], tokens: slice, workspace: Workspace, experts: int
) -> tuple[Tensor, Tensor]:
    """The logits of a block in float32, and a table of the same size, both in the workspace."""
    parts = [logits_TE[tokens] for logits_TE in logits]
    shape = (len(parts), *parts[0].shape)
    table, spare = (workspace.table(name, shape, parts[0].device) for name in ("logits", "spare"))
    if parts[0].dtype == torch.float32:
        torch.stack(parts, out=table)
    else:
        for mine, part in zip(table, parts, strict=True):
            mine.copy_(part)
    if experts == _ROWS:
        return table, spare
    columns, spare = (rows.view(shape[0], shape[2], shape[1]) for rows in (spare, table))
    np.copyto(columns.numpy(), table.mT.numpy())  # half the time of Tensor.copy_
    return columns, spare


def _over_tokens(values: Tensor, valid_T: Tensor | None, experts: int = _ROWS) -> Tensor:
    """Sum over the tokens that count, [L, X]. Padding is skipped, not multiplied by 0: it may hold NaN."""
    if valid_T is not None:
        values = values.masked_fill(~valid_T.unsqueeze(experts), 0.0)
    return values.sum(_tokens(experts))


class _Assignments:
    """(counts, dropped, sum of gate weights) per expert, by scatter_add_: bincount would wait for CUDA."""

    def __init__(
        self, decisions: Decisions, num_experts: int, valid_T: Tensor | None, workspace: Workspace
    ) -> None:
        self._decisions, self._valid_T, self._workspace = decisions, valid_T, workspace
        ids_LTK = decisions.expert_ids_LTK
        shape = (ids_LTK.shape[0], num_experts)
        self._found_LE = torch.zeros(shape, dtype=torch.int64, device=ids_LTK.device)
        """By the ids, dropped ones included."""
        self._kept_LE = None if decisions.dropped_LTK is None else torch.zeros_like(self._found_LE)
        self.weight_sum_LE = decisions.weights_LTK.new_zeros(shape)

    def add(self, layers: slice, tokens: slice) -> None:
        """Take in the slots of some layers and tokens."""
        of, valid_T = self._decisions, self._valid_T
        ids_LTK, weights_LTK = of.expert_ids_LTK[layers, tokens], of.weights_LTK[layers, tokens]
        shape, device, num_experts = tuple(ids_LTK.shape), ids_LTK.device, self._found_LE.shape[1]
        first_L11 = torch.arange(shape[0], device=device)[:, None, None] * num_experts
        bins_LTK = self._workspace.table("bins", shape, device, torch.int64)
        bins = torch.add(ids_LTK, first_L11, out=bins_LTK).view(-1)
        one_LTK = self._workspace.table("ones", shape, device, torch.int64).fill_(1)
        if valid_T is not None:
            one_LTK *= valid_T[tokens, None]
            weights_LTK = weights_LTK.masked_fill(~valid_T[tokens, None], 0.0)
        if of.unused_LTK is not None:
            one_LTK *= ~of.unused_LTK[layers, tokens]
        self.weight_sum_LE[layers].view(-1).scatter_add_(0, bins, weights_LTK.reshape(-1))
        if not self._counted:
            self._found_LE[layers].view(-1).scatter_add_(0, bins, one_LTK.view(-1))
        if self._kept_LE is not None and of.dropped_LTK is not None:
            one_LTK *= ~of.dropped_LTK[layers, tokens]
            self._kept_LE[layers].view(-1).scatter_add_(0, bins, one_LTK.view(-1))

    @property
    def _counted(self) -> bool:
        """Whether the router's own counts hold: it counts padding too, and may forget the expert of a dropped slot."""
        return self._decisions.counts_LE is not None and self._valid_T is None

    def counts(self) -> tuple[Tensor, Tensor]:
        """(before any drop, dropped), int64 [L, E], once every block was added."""
        known_LE = self._decisions.counts_LE
        counts_LE = known_LE.long() if known_LE is not None and self._counted else self._found_LE
        if self._kept_LE is None:
            return counts_LE, torch.zeros_like(counts_LE)
        return counts_LE, counts_LE - self._kept_LE
