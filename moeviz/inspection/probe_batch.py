"""A fixed set of tokens with domain labels: what checkpoints are compared on, and what experts are asked about.

Every domain gives the same number of windows of the same length, so that no domain weighs more than another. How text
becomes tokens is the caller's business: this module knows neither a corpus nor the trainer.

Shapes: N sequences of S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moeviz.errors import MoevizError

MIN_SEQUENCES = 8
"""Sequences of each domain that a probe aims at."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeBatch:
    """Sequences of one length, each of one domain."""

    token_ids_NS: np.ndarray
    """int64."""
    domains: tuple[str, ...]
    """Domain of each sequence."""

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_NS.size)

    @property
    def names(self) -> tuple[str, ...]:
        """The domains, in the order of their first sequence."""
        return tuple(dict.fromkeys(self.domains))

    @property
    def tells_domains(self) -> bool:
        """Whether a null can be made for domains: two of them or more, with two sequences each or more."""
        counts = [self.domains.count(name) for name in self.names]
        return len(counts) > 1 and min(counts) > 1

    @property
    def domain_ids_N(self) -> np.ndarray:
        """Index into `names` of each sequence."""
        place = {name: at for at, name in enumerate(self.names)}
        return np.array([place[name] for name in self.domains])


def probe_of_windows(windows: Mapping[str, Sequence[np.ndarray]], num_tokens: int) -> ProbeBatch:
    """As many windows of every domain as fit `num_tokens`, at least one, the same number of each, spread evenly.

    Neighbouring windows are of one text and would count one thing twice.

    Args:
        windows: domain -> token ids [S] of its windows; all of one length. Domains without any are left out.
        num_tokens: tokens of the probe; a domain with little text lowers it.

    Raises:
        MoevizError: no domain has a window.
    """
    full = {name: rows for name, rows in windows.items() if len(rows)}
    if not full:
        raise MoevizError("no domain has a whole window of held-out text; give more text with --data")
    length = len(next(iter(full.values()))[0])
    each = max(1, min(num_tokens // (length * len(full)), *(len(rows) for rows in full.values())))
    return ProbeBatch(
        token_ids_NS=np.stack([row for rows in full.values() for row in _spread(rows, each)]).astype(
            np.int64
        ),
        domains=tuple(name for name in full for _ in range(each)),
    )


def window_length(num_tokens: int, num_domains: int, longest: int) -> int:
    """Tokens of a window: short enough for MIN_SEQUENCES of every domain, but at least 16 where the model allows it.

    Whole sequences are what the null of a domain moves around, so it needs several of each.
    """
    return min(longest, max(16, num_tokens // (MIN_SEQUENCES * max(num_domains, 1))))


def _spread(rows: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    return [rows[at * len(rows) // count] for at in range(count)]


def spread_windows(token_ids: np.ndarray, length: int, count: int) -> list[np.ndarray]:
    """At most `count` windows of a stream, spread evenly over it; none of a stream shorter than one."""
    available = len(token_ids) // length
    starts = [at * available // min(count, available) * length for at in range(min(count, available))]
    return [token_ids[start : start + length] for start in starts]


def windows_of(token_ids: np.ndarray, length: int) -> list[np.ndarray]:
    """A stream of tokens cut into windows of `length`; what is left over is dropped."""
    return [token_ids[at : at + length] for at in range(0, len(token_ids) - length + 1, length)]


def streams_of(
    texts: Iterable[tuple[str, str]],
    encode: Callable[[str], Sequence[int]],
    *,
    tokens_per_domain: int,
    domains: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Token streams by domain from (domain, text) pairs, joined in order.

    Args:
        domains: take only these (the others come back empty); empty: all.
        tokens_per_domain: a domain takes no further text once it has these.
    """
    streams: dict[str, list[int]] = {}
    for domain, text in texts:
        stream = streams.setdefault(domain, [])
        if (not domains or domain in domains) and len(stream) < tokens_per_domain:
            stream += encode(text)
    return {domain: np.array(ids, dtype=np.int64) for domain, ids in streams.items()}
