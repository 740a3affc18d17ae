"""Mutual information of routing with something else, with the bias of small samples taken off.

Plug-in information of *independent* variables is not zero: 5,000 token types x 64 experts on 200,000 tokens
read 0.84 nats. Every estimate here therefore comes with the same estimate on shuffled labels, and is worth
showing only when it stands three standard deviations above them. Tables are counts, `[rows, columns]`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from moeviz.errors import MoevizError
from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.load import entropy_nats


@defines("mi_layer")
def mutual_information(table: np.ndarray) -> float:
    """Plug-in mutual information of a table of counts (or of a joint distribution), nats."""
    joint = np.asarray(table, dtype=np.float64)
    joint = joint / joint.sum()
    rows, columns = entropy_nats(joint.sum(axis=1)), entropy_nats(joint.sum(axis=0))
    return max(float(rows + columns - entropy_nats(joint.ravel())), 0.0)


def uncertainty_coefficient(table: np.ndarray) -> float:
    """I / H(columns): the share of the column variable's entropy that the row variable explains. 0 to 1."""
    columns = np.asarray(table, dtype=np.float64).sum(axis=0)
    entropy = float(entropy_nats(columns / columns.sum()))
    return mutual_information(table) / entropy if entropy > 0 else 0.0


@defines("cond_entropy_layer")
def conditional_entropy(table: np.ndarray) -> float:
    """H(column | row), nats: 0 when the row decides the column."""
    joint = np.asarray(table, dtype=np.float64) / np.sum(table)
    return max(float(entropy_nats(joint.ravel()) - entropy_nats(joint.sum(axis=1))), 0.0)


def contingency(labels_N: np.ndarray, experts_N: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts of (label, expert) pairs, int64 [labels, E]. Labels are integers from 0."""
    num_labels = int(labels_N.max(initial=-1)) + 1
    cells = np.asarray(labels_N, dtype=np.int64) * num_experts + experts_N
    return np.bincount(cells, minlength=num_labels * num_experts).reshape(num_labels, num_experts)


class Information(NamedTuple):
    """Mutual information with its permutation null, nats."""

    plugin: float
    """The biased estimate."""
    null_mean: float
    """The same estimate on shuffled labels."""
    null_sd: float
    expert_nats: float
    """Entropy of the experts, the most that could be known."""

    @property
    def corrected(self) -> float:
        """Plug-in minus null, at least 0."""
        return max(self.plugin - self.null_mean, 0.0)

    @property
    def significant(self) -> bool:
        """Whether it stands three standard deviations above the null: otherwise do not show it."""
        return self.plugin > self.null_mean + 3 * self.null_sd

    @property
    def coefficient(self) -> float:
        """Corrected information over the experts' entropy, 0 to 1."""
        return self.corrected / self.expert_nats if self.expert_nats > 0 else 0.0


Null = Literal["tokens", "sequences", "rotations"]


@defines("mi_domain", "mi_token", "mi_pos")
def information(
    labels_N: np.ndarray,
    experts_N: np.ndarray,
    num_experts: int,
    *,
    null: Null = "tokens",
    sequences_N: np.ndarray | None = None,
    rounds: int = 20,
    seed: int = 0,
) -> Information:
    """I(label; expert) of tokens, with a permutation null that breaks the link and nothing else.

    Args:
        labels_N: integer label of each token: token id, domain or position.
        experts_N: the token's expert (first choice; repeat labels to use all k assignments).
        num_experts: E.
        null: `tokens` shuffles single labels: right for token ids. `sequences` exchanges the labels of whole
            sequences: right for domains, because tokens of a sequence depend on each other. `rotations` turns
                the
            labels of each sequence by a random offset: right for positions, which every sequence shares.
        sequences_N: sequence of each token, needed by the last two.
        rounds: permutations.
        seed: of the permutations.

    Raises:
        MoevizError: when the null needs sequences and there are none.
    """
    if null != "tokens" and sequences_N is None:
        raise MoevizError(f"null={null!r} moves whole sequences; give sequences_N, or null='tokens'")
    labels_N, experts_N = np.unique(labels_N, return_inverse=True)[1], np.asarray(experts_N)
    shuffles = _Shuffles(labels_N, sequences_N, np.random.default_rng(seed))
    shuffle = {"tokens": shuffles.tokens, "sequences": shuffles.exchanged, "rotations": shuffles.rotated}[
        null
    ]
    nulls = [mutual_information(contingency(shuffle(), experts_N, num_experts)) for _ in range(rounds)]
    table = contingency(labels_N, experts_N, num_experts)
    return Information(
        plugin=mutual_information(table),
        null_mean=float(np.mean(nulls)),
        null_sd=float(np.std(nulls)),
        expert_nats=float(entropy_nats(table.sum(axis=0) / table.sum())),
    )


class _Shuffles:
    """Ways to separate labels from experts."""

    def __init__(
        self, labels_N: np.ndarray, sequences_N: np.ndarray | None, rng: np.random.Generator
    ) -> None:
        self._labels_N, self._rng = labels_N, rng
        keys_N = np.zeros(len(labels_N), dtype=np.int64) if sequences_N is None else np.asarray(sequences_N)
        self._order_N = np.argsort(keys_N, kind="stable")
        bounds = np.flatnonzero(np.diff(keys_N[self._order_N])) + 1
        self._parts = np.split(labels_N[self._order_N], bounds)

    def tokens(self) -> np.ndarray:
        return self._rng.permutation(self._labels_N)

    def exchanged(self) -> np.ndarray:
        """Each sequence gets the labels of another, cut or repeated to its own length."""
        dealt = self._rng.permutation(len(self._parts))
        return self._placed(
            [np.resize(self._parts[at], len(own)) for own, at in zip(self._parts, dealt, strict=True)]
        )

    def rotated(self) -> np.ndarray:
        """Each sequence's labels are turned by an offset of their own."""
        return self._placed([np.roll(part, self._rng.integers(len(part))) for part in self._parts])

    def _placed(self, parts: list[np.ndarray]) -> np.ndarray:
        labels_N = np.empty_like(self._labels_N)
        labels_N[self._order_N] = np.concatenate(parts)
        return labels_N
