"""Sums of layers on a CPU by the compiled kernel, once there is one; `reduce` says what they mean.

To load the kernel takes a fraction of a second. Where it was never compiled, a thread of its own does so first, and
sums are made as on any device meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from moeviz.capture.reading import Reading
from moeviz.capture.reduce import TOKEN_SUMS, RoutingSums
from moeviz.records import ScoreFunction

_log = logging.getLogger("moeviz.capture")
_NO_SLOTS, _NO_TOKENS, _NO_BIAS = np.zeros((0, 0), bool), np.zeros(0, bool), np.zeros(0, np.float32)


class _Kernel:
    """`host_kernel.sum_layer`, compiled; None until it is there, or for good."""

    def __init__(self) -> None:
        self.sum_layer: Callable[..., bool] | None = None
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

            host_kernel.sum_layer.compile(host_kernel.SIGNATURE)
            self.sum_layer = host_kernel.sum_layer
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
    if kernel.sum_layer is None:
        kernel.compile()
    return kernel.sum_layer is not None


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
    kernel, first = _kernel().sum_layer, readings[0]
    if kernel is None or not _fit(readings, bias_LE, valid_T):
        return None
    num_experts, top_k = first.logits_TE.shape[1], first.expert_ids_TK.shape[1]
    num_layers, margin = len(readings), ranked and top_k < num_experts
    known = valid_T is None and first.counts_E is not None
    counted = not known or first.dropped_TK is not None
    counts_LXE = np.zeros((num_layers, 2, num_experts), np.int64)
    sums_LXE = np.zeros((num_layers, 2, num_experts))
    tokens_LN = np.zeros((num_layers, len(TOKEN_SUMS)))
    valid = _NO_TOKENS if valid_T is None else _numpy(valid_T, torch.bool)
    biases_LE = None if bias_LE is None else _numpy(bias_LE, torch.float32)
    for layer, each in enumerate(readings):
        if not kernel(
            _numpy(each.logits_TE, torch.float32),
            _numpy(each.expert_ids_TK, torch.int64),
            _numpy(each.weights_TK, torch.float32),
            valid,
            _NO_SLOTS if each.dropped_TK is None else _numpy(each.dropped_TK, torch.bool),
            _NO_SLOTS if each.unused_TK is None else _numpy(each.unused_TK, torch.bool),
            _NO_BIAS if biases_LE is None else biases_LE[layer],
            score == "sigmoid",
            biases_LE is not None,
            margin,
            logit_squared,
            counted,
            counts_LXE,
            sums_LXE,
            tokens_LN,
            layer,
        ):
            return None
    if not margin:
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


def _fit(readings: Sequence[Reading], bias_LE: Tensor | None, valid_T: Tensor | None) -> bool:
    """Whether everything lies in the host's memory and has its shape: compiled code does not look."""
    first = readings[0]
    table, slots = first.logits_TE.shape, first.expert_ids_TK.shape
    if 0 in table or 0 in slots or slots[0] != table[0]:
        return False
    optional = zip(*(reading[3:] for reading in readings), strict=True)
    for shape, parts in zip((slots, slots, table[1:]), optional, strict=True):
        if parts[0] is None:
            if any(part is not None for part in parts):
                return False
        elif not all(part is not None and part.is_cpu and part.shape == shape for part in parts):
            return False
    for logits_TE, weights_TK, ids_TK, *_ in readings:
        if not (logits_TE.is_cpu and weights_TK.is_cpu and ids_TK.is_cpu):
            return False
        if logits_TE.shape != table or weights_TK.shape != slots or ids_TK.shape != slots:
            return False
    if bias_LE is not None and not (bias_LE.is_cpu and bias_LE.shape == (len(readings), table[1])):
        return False
    return valid_T is None or (valid_T.is_cpu and valid_T.shape == table[:1])


def _numpy(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor.contiguous().numpy()
