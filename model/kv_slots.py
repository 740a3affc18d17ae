"""Where cached numbers lie: in memory as they are, as bytes with a scale, or in a file.

A cache decides which positions it keeps; slots only hold them. All have the shape [B, G, C, D].
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

Storage = Literal["dense", "int8", "mapped"]
Where = slice | Tensor
"""Slots: a slice, or int64 indices."""


class Slots(Protocol):
    """C slots for vectors of width D, for each of B sequences and G heads."""

    @property
    def capacity(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def write(self, where: Where, x_BGSD: Tensor) -> None: ...

    def read(self, where: Where) -> Tensor: ...


class DenseSlots:
    """Numbers as they are; a read of a slice copies nothing."""

    def __init__(self, buffer_BGCD: Tensor) -> None:
        self._buffer_BGCD = buffer_BGCD

    @property
    def capacity(self) -> int:
        return self._buffer_BGCD.shape[2]

    @property
    def num_bytes(self) -> int:
        return self._buffer_BGCD.untyped_storage().nbytes()

    def write(self, where: Where, x_BGSD: Tensor) -> None:
        self._buffer_BGCD[:, :, where] = x_BGSD

    def read(self, where: Where) -> Tensor:
        return self._buffer_BGCD[:, :, where]


class Int8Slots:
    """One byte a number and one float32 scale a vector: off by at most 1/254 of the vector's largest number."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self._codes_BGCD = torch.zeros(shape, dtype=torch.int8, device=device)
        self._scales_BGC1 = torch.zeros((*shape[:3], 1), dtype=torch.float32, device=device)
        self._dtype = dtype

    @property
    def capacity(self) -> int:
        return self._codes_BGCD.shape[2]

    @property
    def num_bytes(self) -> int:
        return self._codes_BGCD.untyped_storage().nbytes() + self._scales_BGC1.untyped_storage().nbytes()

    def write(self, where: Where, x_BGSD: Tensor) -> None:
        x_BGSD = x_BGSD.float()
        scales = x_BGSD.abs().amax(dim=-1, keepdim=True) / 127
        codes = (x_BGSD / scales.clamp_min(torch.finfo(torch.float32).tiny)).round()
        self._codes_BGCD[:, :, where] = codes.to(torch.int8)
        self._scales_BGC1[:, :, where] = scales

    def read(self, where: Where) -> Tensor:
        return (self._codes_BGCD[:, :, where] * self._scales_BGC1[:, :, where]).to(self._dtype)


def mapped_slots(shape: tuple[int, int, int, int], dtype: torch.dtype, path: Path) -> DenseSlots:
    """Slots in a file that the system pages in and out: a context longer than memory. CPU only."""
    size = torch.Size(shape).numel()
    buffer = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    return DenseSlots(buffer.view(shape))


def make_slots(
    storage: Storage,
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    path: Path | None,
) -> Slots:
    """Empty slots. `path` is the file of mapped ones."""
    if storage == "int8":
        return Int8Slots(shape, device, dtype)
    if storage == "mapped":
        assert path is not None
        return mapped_slots(shape, dtype, path)
    return DenseSlots(torch.zeros(shape, device=device, dtype=dtype))
