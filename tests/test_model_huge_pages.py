"""Weights that move into huge pages keep their values, and the system knows of as many as are told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from model.huge_pages import collapse


def _huge_kb() -> int:
    """What Linux says of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no AnonHugePages in smaps_rollup")


def test_values_stay_and_the_system_counts_the_same() -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system has no /proc/self/smaps_rollup")
    tensors = [torch.randn(3 << 20), torch.randn(100), torch.randn(2 << 20)]
    copies = [tensor.clone() for tensor in tensors]
    moved = collapse(tensors)
    if not moved:
        pytest.skip("this system moves nothing into huge pages")
    assert moved % (2 << 20) == 0
    assert moved <= 20 << 20  # of 12 and 8 MB, where the system has as many large pages free
    assert _huge_kb() >= moved >> 10  # some may have been large before
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
    assert collapse(tensors) >= moved


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(2 << 20)
    assert collapse([tensor.to("meta"), torch.zeros(100)]) == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert collapse([tensor]) == 0
