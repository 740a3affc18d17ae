"""Copies of selection biases are what the biases were, wherever these lie; torch's own stack is the oracle."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from moeviz.capture.bias import BiasCopier

E, L = 5, 3


def biases(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(E).to(dtype) for _ in range(L)]


def check(copier: BiasCopier, rows: list[Tensor]) -> None:
    assert torch.equal(copier.copy(rows).tensor(), torch.stack(rows).detach().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_copy_is_what_the_biases_are_now_and_stays_it(dtype: torch.dtype) -> None:
    copier, rows = BiasCopier(E), biases(dtype)
    before = torch.stack(rows).float()
    copies = [copier.copy(rows) for _ in range(3)]
    for row in rows:
        row += 1
    assert all(torch.equal(each.tensor(), before) for each in copies)
    check(copier, rows)


def test_a_bias_that_is_another_tensor_each_time_is_read_where_it_lies_now() -> None:
    copier, rows = BiasCopier(E), biases()
    check(copier, rows)
    for _ in range(400):  # more places than are remembered
        rows[1].data = torch.randn(E)
        rows[2] = torch.randn(E)
        check(copier, rows)
        check(copier, rows)


def test_parameters_and_numbers_with_gaps_can_be_copied() -> None:
    rows = [torch.nn.Parameter(torch.randn(E)), torch.randn(E, 2)[:, 0], torch.randn(E)]
    copier = BiasCopier(E)
    check(copier, rows)
    check(copier, rows)


def test_some_of_the_routers_can_be_copied_alone() -> None:
    copier, rows = BiasCopier(E), biases()
    check(copier, rows)
    check(copier, rows[1:])
    check(copier, rows[:1])


def test_what_a_bias_is_a_small_part_of_is_not_kept() -> None:
    copier, whole = BiasCopier(E), torch.randn(10**6)
    rows, storage = [whole[:E]], weakref.ref(whole.untyped_storage())
    check(copier, rows)
    check(copier, rows)
    del whole, rows
    gc.collect()
    assert storage() is None
