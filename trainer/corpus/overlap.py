"""Near-copies: which validation documents mostly repeat training text.

Two files that differ in one line have different hashes and can land on both sides of the split, and a model
that recites then looks like one that generalises. Every window of 96 bytes is hashed (a polynomial modulo
2**64), one window in 16 is kept by its hash alone, so that a passage keeps the same windows wherever it
stands (Manber, "Finding similar files in a large file system", 1994; Schleimer et al., "Winnowing", 2003). A
validation document with more than half of its kept windows in the training text is a near-copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

WINDOW_BYTES = 96
"""A sentence or two: shorter windows would count the stock phrases of a domain as copies."""
KEEP_ONE_IN = 16
NEAR_COPY = 0.5
"""Share of a document's fingerprints that may appear in the training text."""

_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xD6E8FEB86659FD93)


def _powers(n: int, base: int) -> np.ndarray:
    powers = np.full(n, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


_CHUNK = 1 << 20
_POWERS = _powers(_CHUNK + WINDOW_BYTES, _BASE)
_INVERSES = _powers(_CHUNK + WINDOW_BYTES, pow(_BASE, -1, 2**64))


def fingerprints(text: str) -> np.ndarray:
    """Kept window hashes of a text, uint64, sorted and unique; at least one.

    A text shorter than a window has its own hash, a slightly longer one of which none is kept the smallest.
    """
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    if len(data) <= WINDOW_BYTES:
        return _window_hashes(np.pad(data, (0, WINDOW_BYTES + 1 - len(data))))[:1]
    step = _CHUNK - WINDOW_BYTES
    hashes = [_window_hashes(data[start : start + _CHUNK]) for start in range(0, len(data), step)]
    kept = np.unique(np.concatenate([_kept(part) for part in hashes]))
    return kept if len(kept) else np.min(hashes[0], keepdims=True)


class Found:
    """Which of the wanted fingerprints have been seen; `add` takes text after text."""

    def __init__(self, wanted: Iterable[np.ndarray]) -> None:
        self.wanted = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *wanted]))
        self.seen = np.zeros(len(self.wanted), dtype=bool)

    def add(self, prints: np.ndarray) -> None:
        """Mark the wanted ones among the fingerprints of one more training text."""
        if len(self.wanted):
            at = np.minimum(np.searchsorted(self.wanted, prints), len(self.wanted) - 1)
            self.seen[at[self.wanted[at] == prints]] = True

    def share(self, prints: np.ndarray) -> float:
        """Share 0 to 1 of a wanted document's fingerprints that have been seen; 0 for a document without
        any.
        """
        return float(self.seen[np.searchsorted(self.wanted, prints)].mean()) if len(prints) else 0.0


def near_copies(validation: Mapping[str, np.ndarray], training: Iterable[np.ndarray]) -> set[str]:
    """Ids of the validation documents with more than `NEAR_COPY` of their fingerprints in the training
    text.
    """
    found = Found(validation.values())
    for prints in training:
        found.add(prints)
    return {name for name, prints in validation.items() if found.share(prints) > NEAR_COPY}


def _window_hashes(data: np.ndarray) -> np.ndarray:
    """Hash of every window: sum of byte x base^i, moved to base^0 by the inverse power, all modulo 2**64."""
    if len(data) <= WINDOW_BYTES:
        return np.empty(0, dtype=np.uint64)
    prefix = np.cumsum((data.astype(np.uint64) + np.uint64(1)) * _POWERS[: len(data)], dtype=np.uint64)
    windows = prefix[WINDOW_BYTES:] - prefix[:-WINDOW_BYTES]
    mixed = windows * _INVERSES[: len(windows)] * _MIX
    return mixed ^ (mixed >> np.uint64(32))


def _kept(hashes: np.ndarray) -> np.ndarray:
    return hashes[(hashes >> np.uint64(20)) % np.uint64(KEEP_ONE_IN) == 0]
