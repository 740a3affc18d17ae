"""The loads and scalars of a step, still on their way from the device; records are made later.

`materialize` runs in the writer's thread: waiting for the device, sorting out and numpy cost training
nothing. What the training thread does at the end of a step is to let go of its sums. A load is never dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moeviz.capture.backlog import Backlog
from moeviz.capture.bias import CopiedBias
from moeviz.capture.rank_sum import RankSum
from moeviz.capture.reduce import TOKEN_SUMS, RoutingSums
from moeviz.capture.stages import Share
from moeviz.capture.step_sums import StepSums
from moeviz.capture.transfer import HostCopy
from moeviz.records import LoadRecord, ModelInfo, Record, ScalarRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadSource:
    """What the loads of all steps have in common."""

    rank: int
    info: ModelInfo
    layers: Sequence[Sequence[int]]
    """MoE layers of each layer group."""
    backlog: Backlog
    share: Share
    """Which of the layers are here."""
    rank_sum: RankSum | None = None

    @cached_property
    def one_group(self) -> bool:
        """Whether one group has all layers, in order."""
        return [tuple(layers) for layers in self.layers] == [tuple(range(self.info.num_layers))]


@dataclass(eq=False, slots=True)
class LoadBatch:
    """The sums and scalars of one step."""

    source: LoadSource
    step: int
    ts: float
    sums: StepSums
    """Not to be added to any more, but for what waits in it."""
    bias: Mapping[int, CopiedBias]
    """Selection biases at the end of the step by layer group."""
    scalars: Mapping[str, float]
    device_scalars: Mapping[str, Tensor]
    whole: bool = True
    """False when recording failed in this step: then no load is written, only scalars."""
    copy: HostCopy | None = None
    droppable: ClassVar[bool] = False

    @property
    def rank(self) -> int:
        return self.source.rank

    @property
    def nbytes(self) -> float:
        """Memory that what waits to be summed holds."""
        return self.sums.waiting_bytes

    def send(self) -> None:
        """Start the copies to the host, in the order of the training's own stream."""
        tensors = self._tensors()
        if any(tensor.is_cuda for tensor in tensors.values()):
            self.copy = HostCopy(tensors)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that is on the device, by what `arrays` call it: FIELD/GROUP, `valid_tokens`, `scalars`."""
        tensors: dict[str, Tensor] = {}
        if self.whole:
            self.source.backlog.settle([self.sums])
            if self.sums.failure is not None:
                raise self.sums.failure
        for group, sums in self.sums.sums.items() if self.whole else ():
            for field, values in zip(RoutingSums._fields, sums, strict=True):
                tensors[f"{field}/{group}"] = values
        for group, copied in self.bias.items() if self.whole else ():
            tensors[f"bias_LE/{group}"] = copied.tensor()
        if self.sums.valid_tokens is not None:
            tensors["valid_tokens"] = self.sums.valid_tokens
        if self.device_scalars:
            tensors["scalars"] = torch.stack([*self.device_scalars.values()])
        return tensors

    def _arrays(self) -> dict[str, np.ndarray]:
        if self.copy is None:
            self.copy = HostCopy(self._tensors())
        return self.copy.arrays()

    def materialize(self) -> Iterator[Record]:
        """The load (of all ranks, on rank 0) and the scalars.

        A load that cannot be made, or not be summed, costs neither the scalars nor the other ranks' sums; its error
        comes last.
        """
        load, failure = None, None
        try:
            load = self.load()
        except Exception as error:
            failure = error
        if self.source.rank_sum is not None:
            try:
                load = self._summed(load, self.source.rank_sum)
            except Exception as error:
                load, failure = None, failure or error
        if load is not None:
            yield load
        values = {**self.scalars, **self._device_scalars()}
        if values:
            yield ScalarRecord(step=self.step, rank=self.rank, ts=self.ts, values=values)
        if failure is not None:
            raise failure

    @staticmethod
    def prepare(batches: Sequence[LoadBatch]) -> None:
        """Do the work of several steps that is cheaper in one go; `materialize` does what is left."""
        whole = [batch for batch in batches if batch.whole]
        if whole:
            whole[0].source.backlog.settle([batch.sums for batch in whole])

    def load(self) -> LoadRecord | None:
        """The load of this rank alone; None when the step is not whole."""
        if not self.whole:
            return None
        arrays = self._arrays()
        counts_LE, token_sums_NL = (
            self._spread(arrays, "counts_LE"),
            self._spread(arrays, "token_sums_NL", axis=1),
        )
        if counts_LE is None or token_sums_NL is None:
            return self._nothing()
        return LoadRecord(
            step=self.step,
            rank=self.rank,
            ts=self.ts,
            tokens=self.sums.tokens + int(arrays.get("valid_tokens", 0)),
            counts_LE=counts_LE,
            prob_sum_LE=self._spread(arrays, "prob_sum_LE"),
            weight_sum_LE=self._spread(arrays, "weight_sum_LE"),
            bias_LE=self._spread(arrays, "bias_LE"),
            dropped_LE=None if self.sums.dropless else self._spread(arrays, "dropped_LE"),
            token_sums=_known(token_sums_NL),
        )

    def _nothing(self) -> LoadRecord:
        """The load of a stage without experts."""
        shape = (self.source.info.num_layers, self.source.info.max_experts)
        return LoadRecord(
            step=self.step,
            rank=self.rank,
            ts=self.ts,
            tokens=self.sums.tokens + int(self._arrays().get("valid_tokens", 0)),
            counts_LE=np.zeros(shape, dtype=np.int64),
            prob_sum_LE=np.zeros(shape, dtype=np.float32),
            weight_sum_LE=np.zeros(shape, dtype=np.float32),
            bias_LE=self._spread(self._arrays(), "bias_LE"),
        )

    def _spread(self, arrays: Mapping[str, np.ndarray], name: str, axis: int = 0) -> np.ndarray | None:
        """Put the rows of each group in their place: [L, E], or [N, L] with axis 1. None if nobody has `name`."""
        if self.source.one_group:
            return arrays.get(f"{name}/0")  # all layers are alike: the rows lie in their place
        parts = {
            group: arrays[f"{name}/{group}"]
            for group in range(len(self.source.layers))
            if f"{name}/{group}" in arrays
        }
        if not parts:
            return None
        first = next(iter(parts.values()))
        if axis == 1:
            whole = np.full((first.shape[0], self.source.info.num_layers), np.nan, dtype=first.dtype)
            for group, part in parts.items():
                whole[:, list(self.source.layers[group])] = part
            return whole
        whole = np.zeros((self.source.info.num_layers, self.source.info.max_experts), dtype=first.dtype)
        for group, part in parts.items():
            whole[list(self.source.layers[group]), : part.shape[1]] = part
        return whole

    def _device_scalars(self) -> dict[str, float]:
        if not self.device_scalars:
            return {}
        return dict(zip(self.device_scalars, map(float, self._arrays()["scalars"]), strict=True))

    def _summed(self, load: LoadRecord | None, rank_sum: RankSum) -> LoadRecord | None:
        shape = (self.source.info.num_layers, self.source.info.max_experts)
        counts = np.zeros((2, *shape), dtype=np.int64)
        sums = np.zeros((2, *shape), dtype=np.float32)
        token_sums_NL = np.full((len(TOKEN_SUMS), shape[0]), np.nan, dtype=np.float32)
        if load is not None:
            assert load.prob_sum_LE is not None
            assert load.weight_sum_LE is not None
            counts[0], counts[1] = load.counts_LE, 0 if load.dropped_LE is None else load.dropped_LE
            sums[0], sums[1] = load.prob_sum_LE, load.weight_sum_LE
            for row, name in enumerate(TOKEN_SUMS):
                token_sums_NL[row] = load.token_sums.get(name, np.nan)
        share = self.source.share
        token_sums_NL[:, [layer for layer in range(shape[0]) if layer not in share.layers]] = 0
        drops = load is not None and load.dropped_LE is not None
        integers = np.append(counts.ravel(), (0 if load is None else load.tokens, drops))
        floats = np.concatenate([sums.ravel(), token_sums_NL.ravel()])
        total = rank_sum.total(integers, floats, whole=load is not None)
        if total is None or load is None or self.rank != 0:
            return None
        counts = total[0][:-2].reshape(counts.shape)
        sums = total[1][: sums.size].reshape(sums.shape)
        token_sums_NL = total[1][sums.size :].reshape(token_sums_NL.shape)
        return LoadRecord(
            step=load.step,
            rank=0,
            ts=load.ts,
            tokens=int(total[0][-2]) // share.stages,
            counts_LE=counts[0],
            prob_sum_LE=sums[0],
            weight_sum_LE=sums[1],
            bias_LE=load.bias_LE,
            dropped_LE=counts[1] if total[0][-1] else None,
            token_sums=_known(token_sums_NL),
        )


def _known(token_sums_NL: np.ndarray) -> dict[str, np.ndarray]:
    """The sums that any layer has, by name."""
    known_N = np.logical_or.reduce(token_sums_NL == token_sums_NL, axis=1).tolist()  # is equal: is a number
    return {
        name: sums_L for name, sums_L, known in zip(TOKEN_SUMS, token_sums_NL, known_N, strict=True) if known
    }


def split_scalars(scalars: Mapping[str, float | Tensor]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(numbers, tensors on an accelerator): asking the latter for their value now would wait for the device."""
    on_host: dict[str, float] = {}
    on_device: dict[str, Tensor] = {}
    for name, value in scalars.items():
        if type(value) is float:
            on_host[name] = value
        elif not isinstance(value, Tensor):
            on_host[name] = float(value)
        elif not value.is_cpu:
            on_device[name] = value.detach().float().mean()
        elif value.numel() == 1:
            on_host[name] = value.item()
        else:
            on_host[name] = value.detach().float().mean().item()
    return on_host, on_device
