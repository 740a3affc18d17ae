"""Which sequences of a batch have ended, and by what: a token, or a text that may lie across several."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.sampling import Sampling

Decode = Callable[[list[int]], str]
"""Token ids to text."""


class Endings:
    """Watches what is written, a token of every sequence at a time."""

    def __init__(self, sampling: Sampling, decode: Decode | None, batch: int, device: torch.device) -> None:
        self._sampling, self._decode = sampling, decode
        self.ended_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self._texts: list[list[int]] = [[] for _ in range(batch)]

    @property
    def all_ended(self) -> bool:
        return bool(self.ended_B.all())

    def mark(self, ids_B: Tensor) -> Tensor:
        """What is yielded for the drawn tokens; notes which sequences end with them."""
        eos_id = self._sampling.eos_id
        ids_B = ids_B.masked_fill(self.ended_B, 0 if eos_id is None else eos_id)
        if eos_id is not None:
            self.ended_B = self.ended_B | (ids_B == eos_id)
        if self._sampling.stop and self._decode is not None:
            self.ended_B = self.ended_B | self._stopped(ids_B.tolist(), self._decode)
        return ids_B

    def _stopped(self, ids: list[int], decode: Decode) -> Tensor:
        """Whole texts are decoded: a stop text may begin inside one token and end inside another."""
        found = []
        for text, token in zip(self._texts, ids, strict=True):
            text.append(token)
            found.append(any(stop in decode(text) for stop in self._sampling.stop))
        return torch.tensor(found, device=self.ended_B.device)
