"""Between the hooks and the end of a step: reduces what the slots hold after each forward, and adds it up.

Layers that share E, K and score function are reduced together: a dozen kernels for all layers instead of a
dozen per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from moeviz.capture.micro_batch import MicroBatch
from moeviz.capture.reading import Reading, RouterSite
from moeviz.capture.reduce import Decisions, RoutingSums, stack, sum_decisions
from moeviz.capture.sampling import cut_rows, selection_scores
from moeviz.capture.scoring import is_ordered, is_ranked, score_of
from moeviz.capture.workspace import Workspace
from moeviz.records import ScoreFunction

_CHUNK = 2**24
"""Scores (L x T x E) of the layers reduced together at most: it bounds the memory to work in."""


@dataclass(eq=False)
class LayerGroup:
    """MoE layers that are reduced together."""

    layers: tuple[int, ...]
    sites: tuple[RouterSite, ...]
    score: ScoreFunction
    ranked: bool
    has_bias: bool
    ordered: bool = False
    """Whether slots come by falling selection score."""
    checked: bool = False

    @property
    def num_experts(self) -> int:
        return self.sites[0].num_experts

    @property
    def top_k(self) -> int:
        return self.sites[0].top_k

    @property
    def sums_squares(self) -> bool:
        """Whether the bias is added to logits: then their size says how much it weighs."""
        return self.has_bias and self.score == "softmax_topk"

    def bias(self, first: int = 0, stop: int | None = None) -> Tensor | None:
        """Selection biases as they are now, float32 [L, E], or None where the routers have none."""
        if not self.has_bias:
            return None
        biases = [bias.detach() for site in self.sites[first:stop] if (bias := site.bias()) is not None]
        return torch.stack(biases).float()


def group_layers(routers: Sequence[RouterSite]) -> list[LayerGroup]:
    """Layers with the same experts, top-k, scores, kind of bias, reader and device."""

    def key(layer: int) -> tuple[object, ...]:
        site = routers[layer]
        device = next((str(p.device) for p in site.module.parameters()), "")
        drops = getattr(site.read, "func", site.read)
        return (
            site.num_experts,
            site.top_k,
            site.score,
            site.bias() is not None,
            site.grouped,
            str(drops),
            device,
        )

    groups = []
    for _, members in groupby(sorted(range(len(routers)), key=lambda n: (str(key(n)), n)), key=key):
        layers = tuple(members)
        sites = tuple(routers[layer] for layer in layers)
        groups.append(
            LayerGroup(
                layers=layers,
                sites=sites,
                score=sites[0].score,
                ranked=not sites[0].grouped,
                has_bias=sites[0].bias() is not None,
            )
        )
    return groups


class RoutingPiece(NamedTuple):
    """Token-level decisions of the chosen sequences of one micro-batch, for some layers."""

    layers: tuple[int, ...]
    micro_batch: int
    experts_LNSK: Tensor
    """int16: the bits of uint16, which torch can hardly compute with."""
    weights_LNSK: Tensor


@dataclass(eq=False)
class StepSums:
    """What the routers of one step did so far."""

    sums: dict[int, RoutingSums] = field(default_factory=dict)
    """By index of the layer group."""
    routing: list[RoutingPiece] = field(default_factory=list)
    tokens: int = 0
    """Tokens of micro-batches without padding mask."""
    valid_tokens: Tensor | None = None
    """Valid tokens of those with one, a scalar on the device."""
    layers_seen: set[int] = field(default_factory=set)
    dropless: bool = True


class Collector:
    """Reduces readings into the sums of the step in progress."""

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        self.groups = groups
        self._biased = [index for index, group in enumerate(groups) if group.has_bias]
        self.step = StepSums()
        self._workspace = Workspace()

    def take(self) -> StepSums:
        """The sums of the step, and a fresh start."""
        done, self.step = self.step, StepSums()
        return done

    def biases(self) -> dict[int, Tensor]:
        """Selection biases of the groups that have one, as they are now."""
        return {
            index: bias_LE for index in self._biased if (bias_LE := self.groups[index].bias()) is not None
        }

    def count_tokens(self, micro_batch: MicroBatch) -> None:
        """Add the tokens of a micro-batch, without asking the device how many are padding."""
        if micro_batch.valid_BS is None:
            self.step.tokens += micro_batch.num_tokens
        else:
            valid = micro_batch.valid_BS.sum()
            before = self.step.valid_tokens
            self.step.valid_tokens = valid if before is None else before.to(valid.device) + valid

    def collect(
        self, micro_batch: MicroBatch, readings: Sequence[Reading | None], rows_N: Tensor | None
    ) -> None:
        """Reduce the readings (by layer; None: nothing read) of a micro-batch and keep the rows `rows_N`."""
        for index, group in enumerate(self.groups):
            for first, run in self._runs(group, readings):
                self._add(index, first, run, micro_batch, rows_N)

    def _runs(
        self, group: LayerGroup, readings: Sequence[Reading | None]
    ) -> Iterator[tuple[int, list[Reading]]]:
        """Neighbouring layers of a group with equally many tokens, in chunks: (first position, readings)."""
        found = {
            place: reading
            for place, layer in enumerate(group.layers)
            if (reading := readings[layer]) is not None
        }
        neighbours = groupby(
            enumerate(found), lambda pair: (pair[1] - pair[0], found[pair[1]].logits_TE.shape)
        )
        for _, run in neighbours:
            places = [place for _, place in run]
            logits_TE = found[places[0]].logits_TE
            size = max(1, _CHUNK // max(1, logits_TE.numel()))
            for start in range(0, len(places), size):
                yield places[start], [found[place] for place in places[start : start + size]]

    def _add(
        self, index: int, first: int, run: list[Reading], micro_batch: MicroBatch, rows_N: Tensor | None
    ) -> None:
        group, stop = self.groups[index], first + len(run)
        decisions, bias_LE = stack(run, self._workspace), group.bias(first, stop)
        if not group.checked:
            group.score = score_of(decisions, group.score)
            group.ranked = group.ranked and is_ranked(decisions, group.score, bias_LE)
            group.ordered = is_ordered(decisions, group.score, bias_LE)
            group.checked = True
        whole = len(decisions.logits[0]) == micro_batch.num_tokens
        valid_T = micro_batch.valid_T if whole else None
        if valid_T is not None:
            valid_T = valid_T.to(decisions.weights_LTK.device)
        sums = sum_decisions(
            decisions, group.score, bias_LE, valid_T, group.ranked, group.sums_squares, self._workspace
        )
        self._accumulate(index, first, stop, sums)
        self.step.layers_seen.update(group.layers[first:stop])
        self.step.dropless = self.step.dropless and decisions.dropped_LTK is None
        if rows_N is not None and whole:
            self._keep_rows(group, first, stop, decisions, bias_LE, micro_batch, rows_N)

    def _accumulate(self, index: int, first: int, stop: int, sums: RoutingSums) -> None:
        total = self.step.sums.get(index)
        num_layers = len(self.groups[index].layers)
        if total is None and stop - first == num_layers:
            self.step.sums[index] = sums
            return
        if total is None:
            width = sums.counts_LE.shape[1]
            total = RoutingSums(
                counts_LE=sums.counts_LE.new_zeros(num_layers, width),
                dropped_LE=sums.dropped_LE.new_zeros(num_layers, width),
                prob_sum_LE=sums.prob_sum_LE.new_zeros(num_layers, width),
                weight_sum_LE=sums.weight_sum_LE.new_zeros(num_layers, width),
                token_sums_NL=sums.token_sums_NL.new_zeros(sums.token_sums_NL.shape[0], num_layers),
            )
            self.step.sums[index] = total
        for mine, more in zip(total[:-1], sums[:-1], strict=True):
            mine[first:stop] += more
        total.token_sums_NL[:, first:stop] += sums.token_sums_NL

    def _keep_rows(
        self,
        group: LayerGroup,
        first: int,
        stop: int,
        decisions: Decisions,
        bias_LE: Tensor | None,
        micro_batch: MicroBatch,
        rows_N: Tensor,
    ) -> None:
        shape = (micro_batch.batch_size, micro_batch.length)
        rows_N = rows_N.to(decisions.weights_LTK.device)
        rank_LTK = None if group.ordered else selection_scores(decisions, group.score, bias_LE)
        experts, weights = cut_rows(decisions, rows_N, shape, rank_LTK)
        self.step.routing.append(RoutingPiece(group.layers[first:stop], micro_batch.index, experts, weights))
