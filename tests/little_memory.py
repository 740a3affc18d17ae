"""Stands for a machine whose memory holds four sequences at once, and from the fifth step on no more than two."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import trainer.micro_batches
import trainer.step
from moeviz.cli import main

FIRST, LATER, CHANGES_AT = 4, 2, 4


def install(patch: pytest.MonkeyPatch) -> None:
    """What is too much fails after all of it was computed: gradients, draws and counts are there to be undone."""
    honest = trainer.step._accumulate

    def accumulate(parts: Any, step: int, size: int) -> Any:
        sums = honest(parts, step, size)
        if size > (FIRST if step < CHANGES_AT else LATER):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return sums

    patch.setattr(trainer.step, "_accumulate", accumulate)
    patch.setattr(trainer.micro_batches, "_held_by_cpu", lambda *args: FIRST)


if __name__ == "__main__":
    install(pytest.MonkeyPatch())
    sys.exit(main(sys.argv[1:]))
