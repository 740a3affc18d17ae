"""Between the hooks and the end of a step: reduces what the slots hold after each forward, and adds it up.

Layers that share E, K and score function are reduced together: a dozen kernels for all layers instead of a
dozen per layer. On an accelerator that happens at once, because the kernels run by themselves. On a CPU the
readings wait for the writer's thread where they may (see `backlog`), because there the step would wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
from torch import Tensor

from moeviz.capture import host_sums
from moeviz.capture.backlog import Backlog
from moeviz.capture.bias import CopiedBias
from moeviz.capture.host_sums import sum_on_host
from moeviz.capture.layer_groups import LayerGroup
from moeviz.capture.micro_batch import MicroBatch
from moeviz.capture.reading import Reading
from moeviz.capture.reduce import Decisions, stack, sum_decisions
from moeviz.capture.sampling import cut_rows, selection_scores
from moeviz.capture.step_sums import RoutingPiece, StepSums
from moeviz.capture.workspace import Workspace

_CHUNK = 2**24
"""Scores (L x T x E) of the layers reduced together at most: it bounds the memory to work in."""


class Collector:
    """Reduces readings into the sums of the step in progress."""

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        self.groups = groups
        self.backlog = Backlog(groups)
        self.biased = [index for index, group in enumerate(groups) if group.has_bias]
        self.step = StepSums()
        self._next: StepSums | None = None
        """Made in a forward, so that the end of the step finds it."""
        self._workspace = Workspace()
        if any(group.device == "cpu" for group in groups):
            host_sums.load()  # now, for no step should wait

    def take(self) -> StepSums:
        """The sums of the step, and a fresh start."""
        done, self.step, self._next = self.step, self._next or StepSums(), None
        return done

    def biases(self) -> dict[int, CopiedBias]:
        """Selection biases of the groups that have one, as they are now."""
        return {
            index: copied for index in self.biased if (copied := self.groups[index].copy_bias()) is not None
        }

    def count_tokens(self, micro_batch: MicroBatch) -> None:
        """Add the tokens of a micro-batch, without asking the device how many are padding."""
        if self._next is None:
            self._next = StepSums()
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
            whole = _whole(group, readings)
            for first, run in self._runs(group, readings) if whole is None else [(0, whole)]:
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
        whole = len(run[0].logits_TE) == micro_batch.num_tokens
        valid_T, copied = micro_batch.valid_T if whole else None, group.copy_bias(first, stop)
        if valid_T is not None:
            valid_T = valid_T.to(run[0].weights_TK.device)
        pile = self.backlog.pile(index, first, run, copied, valid_T)
        if pile is not None:
            self.step.piles.append(pile)
            self.step.waiting_bytes += pile.held.size
        self.step.layers_seen.update(group.layers[first:stop])
        self.step.dropless = self.step.dropless and any(reading.dropped_TK is None for reading in run)
        wanted = rows_N if whole else None
        if pile is not None and wanted is None:
            return  # as in most steps
        bias_LE = None if copied is None else copied.tensor()
        with torch.no_grad(), _in_full_precision(run[0].logits_TE.device.type):
            decisions = stack(run, self._workspace)
            if pile is None:
                group.check(decisions, bias_LE)
                scored = group.score, bias_LE, valid_T, group.ranked, group.sums_squares
                sums = sum_on_host(run, *scored) or sum_decisions(decisions, *scored, self._workspace)
                self.step.add(index, len(group.layers), first, sums)
            if wanted is not None:
                self._keep_rows(group, first, stop, decisions, bias_LE, micro_batch, wanted)

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


def _in_full_precision(device_type: str) -> AbstractContextManager[object]:
    """Autocast off, where it is on."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _whole(group: LayerGroup, readings: Sequence[Reading | None]) -> list[Reading] | None:
    """What all layers of a group read, of equally many tokens and not too many for one go: mostly it is so."""
    run = [reading for layer in group.layers if (reading := readings[layer]) is not None]
    if len(run) < len(group.layers):
        return None
    shape = run[0].logits_TE.shape
    if len(run) * shape.numel() > _CHUNK or any(reading.logits_TE.shape != shape for reading in run):
        return None
    return run
