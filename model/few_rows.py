"""A few rows for each of many matrices, as short prompts bring them to experts, by a program that a compiler writes.

MKL and oneDNN rearrange a matrix before they multiply by it, which for eight rows takes as long as the product. What
is compiled here reads each matrix where it lies, once for every four rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

ROWS = 4
"""That go through a matrix together: they share its loads, and their sums fit the registers."""

_MANY = 16
"""Rows of an expert on average from which libraries are faster."""

_PROGRAMS = 4096
"""That torch keeps of a function: of widths, of models and lengths of caches."""

_compile = ContextVar("compile", default=False)


@contextmanager
def compiling_few_rows() -> Iterator[None]:
    """Inside, experts without gradients on a CPU multiply few rows by a compiled program."""
    token = _compile.set(True)
    try:
        with compiling():
            yield
    finally:
        _compile.reset(token)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, torch keeps many programs of one function, and where it cannot compile there is a ValueError."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    settings = {
        "recompile_limit": _PROGRAMS,
        "accumulated_recompile_limit": _PROGRAMS,
        "skip_nnmodule_hook_guards": False,  # a hook that came meanwhile has the program made anew
        "record_runtime_overhead": False,
    }
    try:
        with torch._dynamo.config.patch(settings):
            yield
    except (TorchDynamoException, InductorError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"compile=True failed ({first}); it needs a C++ compiler and a model without hooks that leave "
            "torch; leave it out"
        ) from error


def few_rows(x: Tensor, num_rows: int, num_experts: int) -> bool:
    """Whether `few_rows_mm` is wanted here, and the faster way."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    return _compile.get() and fits and num_rows < _MANY * num_experts


def few_rows_mm(x_NI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`model.grouped.grouped_mm` of float32 where every expert's rows are a multiple of ROWS, compiled."""
    starts_B = torch.arange(0, len(x_NI), ROWS, device=x_NI.device, dtype=ends_E.dtype)
    experts_B = torch.searchsorted(ends_E, starts_B, right=True)
    x_BRI = x_NI.unflatten(0, (len(experts_B), ROWS))
    return _program()(x_BRI, weights_EOI, experts_B).flatten(0, 1)


@functools.cache
def _program() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # Not at import: torch's compiler takes a second to load, which nobody else should wait for.
    return torch.compile(_product, fullgraph=True, dynamic=True)


def _product(x_BRI: Tensor, weights_EOI: Tensor, experts_B: Tensor) -> Tensor:
    weights_BOI = weights_EOI[experts_B]
    # One sum for each row, and not one of all: the compiler then loads a weight once for all of them.
    return torch.stack([(weights_BOI * x_BRI[:, row, None]).sum(-1) for row in range(ROWS)], dim=1)
