"""Readings on a CPU wait for the writer's thread, so that the step does not wait for their sums.

On a CPU a sum is work of the thread that asks for it. In the step it runs on cold caches, layer by layer of one
step; in the writer's thread the steps of a second are summed in one go. What waits is references to tensors that
autograd holds anyway; past `ROOM_BYTES`, and on accelerators, nothing waits.

A tensor that training writes to after its forward cannot wait. Such a model is noticed by the version counters of
its tensors: the step is lost, said and counted, and from then on everything is summed at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from moeviz.capture.bias import CopiedBias
from moeviz.capture.host_sums import sum_on_host
from moeviz.capture.layer_groups import LayerGroup
from moeviz.capture.reading import Reading
from moeviz.capture.reduce import RoutingSums, stack, sum_decisions
from moeviz.capture.step_sums import Pile, StepSums
from moeviz.capture.workspace import Workspace
from moeviz.errors import MoevizError

ROOM_BYTES = 64e6
"""Memory of the readings that wait, at most."""
_TOGETHER = 2**20
"""Scores (L x T x E) of the steps that are summed in one go, at most."""


class Backlog:
    """What of a model's readings waits, and the work on it."""

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        self._groups = groups
        self._workspace = Workspace()
        self._room = _Room(ROOM_BYTES)
        self._work = threading.Lock()
        self._training_thread = threading.get_ident()
        self._one_core: int | None = None
        """The thread that was told to use one core only."""
        self._closed = False

    def pile(
        self,
        index: int,
        first: int,
        readings: Sequence[Reading],
        bias: CopiedBias | None,
        valid_T: Tensor | None,
    ) -> Pile | None:
        """Take in readings of neighbouring layers of a group, or None: they must be summed at once."""
        if self._closed or not self._groups[index].checked or not readings[0].logits_TE.is_cpu:
            return None
        if any(reading.logits_TE.is_inference() for reading in readings):  # these count no versions
            return None
        size = len(readings) * sum(tensor.nbytes for tensor in readings[0][:3])  # of one shape
        held = self._room.take(size)
        if held is None:
            return None
        valid_T = None if valid_T is None else valid_T.clone()  # the mask may be a buffer that is filled anew
        return Pile(index, first, readings, bias, valid_T, _versions(readings), held)

    def settle(self, steps: Sequence[StepSums]) -> None:
        """Sum what waits of these steps, in any thread; what goes wrong is left as the `failure` of its step.

        An error ends the waiting for good: later readings are summed in their step, which tells more about it.
        """
        work = [(step, pile) for step in steps for pile in step.piles]
        if not work:
            return
        with self._work, torch.no_grad():
            self._spare_the_cores()
            for step in steps:
                step.piles = []
            alike: dict[tuple[object, ...], list[tuple[StepSums, Pile]]] = {}
            for step, pile in work:
                alike.setdefault(_kind(pile), []).append((step, pile))
            for same in alike.values():
                self._sum(same)

    def _sum(self, work: Sequence[tuple[StepSums, Pile]]) -> None:
        """Sum piles of the same layers and shape, several at a time; one by one where that fails."""
        first = work[0][1]
        scores = sum(reading.logits_TE.numel() for reading in first.readings)
        together = max(1, _TOGETHER // max(1, scores)) if first.valid_T is None else 1
        for start in range(0, len(work), together):
            part = work[start : start + together]
            try:
                self._sum_alike(part)
            except Exception as error:
                self._closed = True
                if len(part) == 1:
                    part[0][0].failure = error
                    continue
                for one in part:
                    self._sum([one])

    def _sum_alike(self, part: Sequence[tuple[StepSums, Pile]]) -> None:
        first = part[0][1]
        for _, pile in part:
            if _versions(pile.readings) != pile.versions:
                name = self._groups[pile.index].sites[pile.first].name
                raise MoevizError(
                    f"a tensor of router {name} was written to after its forward, before its sums were taken: the "
                    "sums of this step are lost; those of later steps are taken at once, which costs more time"
                )
        group, num_layers = self._groups[first.index], len(first.readings)
        biases = [pile.bias.tensor() for _, pile in part if pile.bias is not None]
        readings = [reading for _, pile in part for reading in pile.readings]
        bias_LE = torch.cat(biases) if biases else None
        rest = group.score, bias_LE, first.valid_T, group.ranked, group.sums_squares
        sums = sum_on_host(readings, *rest) or sum_decisions(
            stack(readings, self._workspace), *rest, self._workspace
        )
        for place, (step, pile) in enumerate(part):
            own = slice(place * num_layers, (place + 1) * num_layers)
            mine = RoutingSums._make([*(values[own] for values in sums[:-1]), sums.token_sums_NL[:, own]])
            step.add(pile.index, len(group.layers), pile.first, mine)

    def _spare_the_cores(self) -> None:
        """A thread beside the training's works on one core: its helpers would take the other ones from training."""
        me = threading.get_ident()
        if me not in (self._training_thread, self._one_core):
            self._one_core = me
            with suppress(
                Exception
            ):  # without it, as beside a torch that came alone, summing only costs more
                from threadpoolctl import threadpool_limits

                torch.get_num_threads()  # torch sets the number of a thread when first asked; from here on it is ours
                threadpool_limits(limits=1, user_api="openmp")


class _Room:
    """Bytes that may be held. What was taken is given back when the object that stands for it goes."""

    def __init__(self, size: float) -> None:
        self._free = size
        self._lock = threading.Lock()

    def take(self, size: float) -> _Held | None:
        if not self.change(-size):
            return None
        return _Held(self, size)

    def change(self, size: float) -> bool:
        with self._lock:
            if self._free + size < 0:
                return False
            self._free += size
            return True


class _Held:
    def __init__(self, room: _Room, size: float) -> None:
        self._room, self.size = room, size

    def __del__(self) -> None:
        self._room.change(self.size)


def _versions(readings: Sequence[Reading]) -> tuple[int, ...]:
    return tuple(tensor._version for reading in readings for tensor in reading[:3])


def _kind(pile: Pile) -> tuple[object, ...]:
    """Equal for piles that can be stacked."""
    kinds = [
        None if tensor is None else (tensor.shape, tensor.dtype)
        for tensor in (*pile.readings[0], pile.valid_T)
    ]
    return pile.index, pile.first, len(pile.readings), pile.bias is None, *kinds
