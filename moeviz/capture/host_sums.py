"""Sums of layers on a CPU by the compiled kernel, once there is one; `reduce` says what they mean.

To load the kernel takes a fraction of a second. Where it was never compiled, a thread of its own does so first, and
sums are made as on any device meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeviz.capture.reading import Reading
from moeviz.capture.reduce import TOKEN_SUMS, RoutingSums
from moeviz.records import ScoreFunction

_log = logging.getLogger("moeviz.capture")
_NO_TOKENS, _NO_BIAS = np.zeros(0, bool), np.zeros((1, 0), np.float32)


class _Kernel:
    """`host_kernel.sum_layers`, compiled; None until it is there, or for good."""

    def __init__(self) -> None:
        self.sum_layers: Callable[..., bool] | None = None
        try:
            from numba.core import config

            if config.DISABLE_JIT:  # type: ignore[attr-defined]
                return
            from moeviz.capture import host_kernel

            if host_kernel.is_kept():
                self.compile()
            else:
                # Not a daemon: a process that ended under its hands would crash; so it ends some seconds later.
                threading.Thread(target=self.compile, name="moeviz-compile").start()
        except Exception as error:
            self._give_up(error)

    def compile(self) -> None:
        try:
            from moeviz.capture import host_kernel

            host_kernel.sum_layers.compile(host_kernel.SIGNATURE)
            self.sum_layers = host_kernel.sum_layers
        except Exception as error:
            self._give_up(error)

    @staticmethod
    def _give_up(error: Exception) -> None:
        _log.info("sums over router scores on a CPU take twice the time: numba cannot be used (%s)", error)


_kernel = cache(_Kernel)


def load() -> None:
    """Load the kernel, or begin to compile it."""
    _kernel()


def compile_now() -> bool:
    """Wait until the kernel is there. False where it cannot be had."""
    kernel = _kernel()
    if kernel.sum_layers is None:
        kernel.compile()
    return kernel.sum_layers is not None


def sum_on_host(
    readings: Sequence[Reading],
    score: ScoreFunction,
    bias_LE: Tensor | None = None,
    valid_T: Tensor | None = None,
    ranked: bool = True,
    logit_squared: bool = False,
) -> RoutingSums | None:
    """The same as `reduce.sum_decisions` of the stacked readings, of equal shapes; sums are made in float64.

    None where the kernel is not there or not made for it: tensors of an accelerator, ids that are no expert, nothing
    to sum.
    """
    sum_layers = _kernel().sum_layers
    tables = None if sum_layers is None else _tables(readings, bias_LE, valid_T)
    if sum_layers is None or tables is None:
        return None
    first = readings[0]
    (num_tokens, num_experts), top_k = first.logits_TE.shape, first.expert_ids_TK.shape[1]
    num_layers, ranked = len(readings), ranked and top_k < num_experts
    known = valid_T is None and first.counts_E is not None
    counts_LXE = np.zeros((num_layers, 2, num_experts), np.int64)
    sums_LXE = np.zeros((num_layers, 2, num_experts))
    tokens_LN = np.zeros((num_layers, len(TOKEN_SUMS)))
    if not sum_layers(
        np.array(tables.addresses_LA, np.int64),
        num_tokens,
        num_experts,
        top_k,
        _NO_TOKENS if valid_T is None else _numpy(valid_T, torch.bool),
        first.dropped_TK is not None,
        first.unused_TK is not None,
        _NO_BIAS if bias_LE is None else _numpy(bias_LE, torch.float32),
        score == "sigmoid",
        bias_LE is not None,
        ranked,
        logit_squared,
        not known or first.dropped_TK is not None,
        counts_LXE,
        sums_LXE,
        tokens_LN,
    ):
        return None
    if not ranked:
        tokens_LN[:, TOKEN_SUMS.index("margin")] = np.nan
    if not logit_squared:
        tokens_LN[:, TOKEN_SUMS.index("logit_squared")] = np.nan
    counts_LE = torch.from_numpy(counts_LXE[:, 0])
    if known:
        counts_LE = torch.stack([each.counts_E for each in readings if each.counts_E is not None]).long()
    kept_LE = counts_LE if first.dropped_TK is None else torch.from_numpy(counts_LXE[:, 1])
    sums_XLE = torch.from_numpy(sums_LXE.astype(np.float32).swapaxes(0, 1))
    token_sums_NL = torch.from_numpy(tokens_LN.astype(np.float32).T)
    return RoutingSums(counts_LE, counts_LE - kept_LE, sums_XLE[0], sums_XLE[1], token_sums_NL)


class _Tables(NamedTuple):
    """What `sum_layers` reads."""

    addresses_LA: list[list[int]]
    alive: list[Tensor]
    """Copies that were made because a table had another type, or gaps."""


_DTYPES = torch.float32, torch.float32, torch.int64, torch.bool, torch.bool
"""Of logits, weights, ids, dropped and unused slots."""


def _tables(readings: Sequence[Reading], bias_LE: Tensor | None, valid_T: Tensor | None) -> _Tables | None:
    """Where everything lies; None unless that is the host's memory, in its shape: compiled code does not look."""
    first = readings[0]
    table, slots = first.logits_TE.shape, first.expert_ids_TK.shape
    if 0 in table or 0 in slots or slots[0] != table[0]:
        return None
    if bias_LE is not None and not _lies(bias_LE, torch.Size((len(readings), table[1]))):
        return None
    if valid_T is not None and not _lies(valid_T, table[:1]):
        return None
    present, found = [part is not None for part in first], _Tables([], [])
    for reading in readings:
        if [part is not None for part in reading] != present:
            return None
        if reading.counts_E is not None and not _lies(reading.counts_E, table[1:]):
            return None
        addresses = []
        for tensor, shape, dtype in zip(reading, (table, slots, slots, slots, slots), _DTYPES, strict=False):
            if tensor is None:
                addresses.append(0)
                continue
            if not _lies(tensor, shape):
                return None
            if tensor.dtype != dtype or not tensor.is_contiguous():
                tensor = tensor.to(dtype).contiguous()
                found.alive.append(tensor)
            address = tensor.data_ptr()
            if address == 0:  # of a tensor that has no memory of its own
                return None
            addresses.append(address)
        found.addresses_LA.append(addresses)
    return found


def _lies(tensor: Tensor, shape: torch.Size) -> bool:
    return tensor.is_cpu and tensor.shape == shape


def _numpy(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor.contiguous().numpy()
