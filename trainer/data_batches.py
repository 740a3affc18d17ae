"""Batches as a pure function of where training stands: no iterator, no state, nothing to save.

Rows are numbered from 0 for the whole run. Row number -> domain by a shuffled cycle that holds the domains in
the proportion of their weights; the n-th row of a domain -> epoch and place in that epoch's permutation. So
every epoch of a domain visits each of its windows once, resuming needs the step alone, and the number of
ranks or micro-batches changes which rank reads a row, never which rows a step holds.

    TokenBatches(shards, batch_size=8, seq_len=256, seed=0, split="train", weights="natural", micro_batches=1)
        .batch(step, micro_batch=0, rank=0, world=1) -> Batch
        .rows(first, count) -> Batch                             by row number, for a batch size that changes
        .validation(domain, num_tokens=...) -> Iterator[Batch]   fixed, ordered, without overlap
        .domains, .tokens_per_epoch

Shapes: B rows, S = seq_len.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from moeviz.errors import MoevizError
from trainer.corpus import Split
from trainer.data_shards import Shards

IGNORE = -100
"""Label of a position that has no next token."""
_CYCLE_ROWS = 1024
_CYCLE_TAG, _EPOCH_TAG = 1, 2

Weights = Mapping[str, float] | Literal["natural", "uniform"]


@dataclass(frozen=True, eq=False)
class Batch:
    """B windows of S tokens, each of one domain. `torch.from_numpy` takes the arrays as they are."""

    input_ids_BS: np.ndarray
    """int64, C-contiguous."""
    labels_BS: np.ndarray
    """int64. The token after each position; -100 only where a domain is shorter than a window and the row is
    padded.
    """
    domains: tuple[str, ...]
    positions_B: np.ndarray
    """int64. Offset of each row's first token in its domain's shard."""


class TokenBatches:
    """Deterministic rows over shards."""

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        split: Split = "train",
        weights: Weights = "natural",
        micro_batches: int = 1,
    ) -> None:
        """
        Args:
            batch_size: B, rows of one micro-batch of one rank.
            weights: share of rows by domain. `natural`: by the domain's tokens, so that all epochs end
                together; `uniform`: the same for each; a mapping: in proportion to its values, domains left
                out get none.
            micro_batches: micro-batches of one step on one rank.

        Raises:
            MoevizError: a size below 1, a negative seed, an unknown domain, or nothing to read.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("seq_len", seq_len),
            ("micro_batches", micro_batches),
        ):
            if value < 1:
                raise MoevizError(f"{name}={value} must be at least 1")
        if seed < 0:
            raise MoevizError(f"seed={seed} must not be negative; use 0 or more")
        self.shards, self.split = shards, split
        self.batch_size, self.seq_len, self.seed, self.micro_batches = (
            batch_size,
            seq_len,
            seed,
            micro_batches,
        )
        self.domains = tuple(name for name in shards.domains if shards.num_tokens(split, name) > 0)
        if not self.domains:
            raise MoevizError(f"no {split} tokens; give more documents or change the validation fraction")
        self.weights = self._checked(weights)
        self.rows_per_cycle = _apportion(np.array([self.weights[name] for name in self.domains]))
        self._cycle = lru_cache(maxsize=4)(self._make_cycle)
        self._epoch = lru_cache(maxsize=2 * len(self.domains) + 2)(self._make_epoch)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of the split."""
        return self.shards.num_tokens(self.split)

    def passes(self, rows: int) -> dict[str, float]:
        """How often the first `rows` rows of the run read each domain's tokens."""
        total = int(self.rows_per_cycle.sum())
        shares = dict(zip(self.domains, self.rows_per_cycle / total, strict=True))
        return {
            name: float(rows * share * self.seq_len / self.shards.num_tokens(self.split, name))
            for name, share in shares.items()
        }

    def batch(self, step: int, micro_batch: int = 0, rank: int = 0, world: int = 1) -> Batch:
        """Rows of one micro-batch of one rank in a step (0-based)."""
        assert 0 <= micro_batch < self.micro_batches, (micro_batch, self.micro_batches)
        assert 0 <= rank < world, (rank, world)
        first = ((step * self.micro_batches + micro_batch) * world + rank) * self.batch_size
        return self.rows(first, self.batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """Rows number `first` to `first + count - 1` of the run."""
        names, places = zip(*(self._place(row) for row in range(first, first + count)), strict=True)
        windows = [self._window(name, place) for name, place in zip(names, places, strict=True)]
        return _batch(windows, names, places)

    def validation(self, domain: str, *, num_tokens: int) -> Iterator[Batch]:
        """The first `num_tokens` validation tokens of a domain (at least one row), in order, without overlap.

        The last batch may have fewer rows. Nothing is yielded for a domain without validation documents.
        """
        tokens = self.shards.tokens("validation", domain)
        if not len(tokens):
            return
        windows = max(1, min((len(tokens) - 1) // self.seq_len, num_tokens // self.seq_len))
        for first in range(0, windows, self.batch_size):
            places = [i * self.seq_len for i in range(first, min(first + self.batch_size, windows))]
            rows = [
                self.shards.read("validation", domain, place, place + self.seq_len + 1) for place in places
            ]
            yield _batch([self._padded(row) for row in rows], (domain,) * len(rows), places)

    def _checked(self, weights: Weights) -> dict[str, float]:
        if weights == "natural":
            return {name: float(self.shards.num_tokens(self.split, name)) for name in self.domains}
        if weights == "uniform":
            return dict.fromkeys(self.domains, 1.0)
        assert not isinstance(weights, str), weights
        for name, value in weights.items():
            if name not in self.domains:
                raise MoevizError(
                    f"weight for domain {name!r}, which the data has not; it has {', '.join(self.domains)}"
                )
            if not value >= 0:
                raise MoevizError(f"weight {value} of domain {name!r} must not be negative")
        if not sum(weights.values()) > 0:
            raise MoevizError("all domain weights are 0; give at least one domain a positive weight")
        return {name: float(weights.get(name, 0.0)) for name in self.domains}

    def _place(self, row: int) -> tuple[str, int]:
        """Row number -> domain and offset of its window."""
        cycle, at = divmod(row, int(self.rows_per_cycle.sum()))
        which, earlier = self._cycle(cycle)
        domain = int(which[at])
        name = self.domains[domain]
        nth = cycle * int(self.rows_per_cycle[domain]) + int(earlier[at])
        num_tokens = self.shards.num_tokens(self.split, name)
        windows = max(1, num_tokens // self.seq_len)
        offset, order = self._epoch(name, nth // windows, windows, num_tokens)
        return name, (offset + int(order[nth % windows]) * self.seq_len) % num_tokens

    def _make_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain of each row of a cycle, and how many rows of that domain stand before it in the cycle."""
        rng = np.random.default_rng([self.seed, _CYCLE_TAG, cycle])
        which = rng.permutation(np.repeat(np.arange(len(self.domains)), self.rows_per_cycle))
        earlier = np.empty_like(which)
        for domain in range(len(self.domains)):
            at = np.flatnonzero(which == domain)
            earlier[at] = np.arange(len(at))
        return which, earlier

    def _make_epoch(self, domain: str, epoch: int, windows: int, num_tokens: int) -> tuple[int, np.ndarray]:
        """Where the first window of an epoch starts (the shard is read as a ring), and the order of its
        windows.
        """
        rng = np.random.default_rng([self.seed, _EPOCH_TAG, epoch, zlib.crc32(domain.encode())])
        offset = int(rng.integers(num_tokens)) if num_tokens >= self.seq_len else 0
        return offset, rng.permutation(windows)

    def _window(self, domain: str, place: int) -> np.ndarray:
        """S + 1 tokens from a place on, around the end of the shard to its beginning."""
        window = self.shards.read(self.split, domain, place, place + self.seq_len + 1)
        missing = self.seq_len + 1 - len(window)
        if missing and self.shards.num_tokens(self.split, domain) >= self.seq_len:
            window = np.concatenate([window, self.shards.read(self.split, domain, 0, missing)])
        return self._padded(window)

    def _padded(self, window: np.ndarray) -> np.ndarray:
        """int64 of S + 1; positions past the end are -1."""
        padded = np.full(self.seq_len + 1, -1, dtype=np.int64)
        padded[: len(window)] = window
        return padded


def _batch(windows: list[np.ndarray], domains: tuple[str, ...], places: tuple[int, ...] | list[int]) -> Batch:
    tokens = np.stack(windows)
    inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    inputs[inputs < 0] = 0
    labels[labels < 0] = IGNORE
    return Batch(inputs, labels, domains, np.array(places, dtype=np.int64))


def _apportion(weights: np.ndarray) -> np.ndarray:
    """Rows of each domain in a cycle: largest remainders, and at least one for a positive weight."""
    shares = weights / weights.sum() * max(_CYCLE_ROWS, 8 * len(weights))
    rows = np.floor(shares).astype(np.int64)
    for domain in np.argsort(-(shares - rows), kind="stable")[: round(shares.sum()) - int(rows.sum())]:
        rows[domain] += 1
    return np.maximum(rows, weights > 0)
