"""What a file of routing decisions holds, whatever its format: layers, loads of every step, tokens where it has them.

Decisions arrive token by token or layer by layer, in any order of layers and ranks, and are kept as compact
arrays (6 bytes a decision, less than their text) until the whole file is read: only then is the number of experts
known. Shapes: L layers, E experts, T tokens, K experts per token, N sequences, S sequence.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moeviz.records import (
    LayerInfo,
    LoadRecord,
    ModelInfo,
    Record,
    SequenceRecord,
    TokenRoutingRecord,
)

_MOST_EXPERTS = 1 << 16


class FaultyLine(NamedTuple):
    """A line that was left out, and why."""

    file: str
    line: int
    """From 1."""
    problem: str
    """What is wrong and what to do."""

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.problem}"


class RouterKey(NamedTuple):
    """Which router decided; sorts decoder layers before those of multi-token prediction."""

    mtp: int
    """Depth of the multi-token prediction module; -1 for the decoder."""
    block: int
    """Number of the layer, as the file counts."""

    @property
    def name(self) -> str:
        return f"layers.{self.block}" if self.mtp < 0 else f"mtp.{self.mtp}.layers.{self.block}"


class _Tokens:
    """One sequence in one layer, growing."""

    def __init__(self) -> None:
        self.experts, self.weights, self.token_ids = array("H"), array("f"), array("i")
        self.last_position = -1


class Decisions:
    """Gathers decisions; `records` gives them as what a probe would have written."""

    def __init__(self, num_experts: int | None = None) -> None:
        """`num_experts`: of every layer; None: one more than the largest id of any layer."""
        self.num_experts = num_experts
        self.top_k: dict[RouterKey, int] = {}
        self.weighted = True
        """Whether every decision came with gate weights."""
        self._largest = -1
        self._sequences: dict[tuple[int, int], dict[tuple[str, int], int]] = defaultdict(dict)
        self._turns: dict[tuple[int, int, RouterKey, str], int] = {}
        self._tokens: dict[tuple[int, int, RouterKey], dict[int, _Tokens]] = defaultdict(dict)

    def add_token(
        self,
        router: RouterKey,
        ids: Sequence[int],
        weights: Sequence[float] | None,
        *,
        position: int,
        request: str = "",
        step: int = 0,
        rank: int = 0,
        token_id: int = -1,
    ) -> None:
        """One token in one layer. A position that does not grow within a request begins its next sequence.

        Raises:
            ValueError: no decision of a top-k router, or one that contradicts earlier ones.
        """
        _check_weights(weights, len(ids))
        self._check([ids], router)
        tokens = self._current(step, rank, router, request, position)
        tokens.last_position = position
        tokens.experts.extend(ids)
        tokens.token_ids.append(token_id)
        if weights is None:
            self.weighted = False
        else:
            tokens.weights.extend(weights)

    def add_batch(self, router: RouterKey, ids_TK: Sequence[Sequence[int]], *, step: int, rank: int) -> None:
        """All tokens of one call of one router: a sequence of its own. Raises ValueError like `add_token`."""
        if not ids_TK:
            return
        self._check(ids_TK, router)
        tokens = self._current(step, rank, router, "", -1)
        tokens.experts.frombytes(np.asarray(ids_TK, dtype=np.uint16).tobytes())
        tokens.token_ids.extend([-1] * len(ids_TK))
        tokens.last_position = len(ids_TK) - 1
        self.weighted = False

    def declare(self, num_experts: int) -> None:
        """Believe the file about its number of experts. Raises ValueError where earlier lines contradict it."""
        if not self._largest < num_experts <= _MOST_EXPERTS:
            raise ValueError(
                f"num_experts={num_experts} is not above the largest id so far, {self._largest}; "
                "correct it, or give --num-experts"
            )
        self.num_experts = num_experts

    @property
    def num_assignments(self) -> int:
        return sum(len(one.experts) for layer in self._tokens.values() for one in layer.values())

    @property
    def steps(self) -> list[int]:
        return sorted({step for step, _, _ in self._tokens})

    def model(self, family: str) -> ModelInfo:
        """The layers that were seen, in order; `block` keeps the number that the file gave."""
        size = self.num_experts or self._largest + 1
        layers = tuple(
            LayerInfo(layer=at, name=key.name, block=key.block, num_experts=size, top_k=self.top_k[key])
            for at, key in enumerate(sorted(self.top_k))
        )
        return ModelInfo(family=family, layers=layers)

    def records(self, step: int, ts: float) -> Iterator[Record]:
        """Records of one step: tokens, their sequences, and last the load, summed over ranks."""
        routers = sorted(self.top_k)
        counts_LE = np.zeros((len(routers), self.num_experts or self._largest + 1), dtype=np.int64)
        weight_sum_LE = np.zeros(counts_LE.shape) if self.weighted else None
        ranks = sorted({rank for at, rank, _ in self._tokens if at == step})
        for rank in ranks:
            for layer, router in enumerate(routers):
                for tokens in self._tokens.get((step, rank, router), {}).values():
                    ids = np.frombuffer(tokens.experts, dtype=np.uint16)
                    counts_LE[layer] += np.bincount(ids, minlength=counts_LE.shape[1])
                    if weight_sum_LE is not None:
                        weight_sum_LE[layer] += np.bincount(
                            ids, np.frombuffer(tokens.weights, dtype=np.float32), counts_LE.shape[1]
                        )
                yield from self._routing(step, rank, layer, router)
            yield from self._texts(step, rank)
        top_k_L = np.array([self.top_k[router] for router in routers])
        yield LoadRecord(
            step=step,
            rank=0,
            ts=ts,
            tokens=int((counts_LE.sum(1) // top_k_L).max()),
            counts_LE=counts_LE,
            weight_sum_LE=None if weight_sum_LE is None else weight_sum_LE.astype(np.float32),
        )

    def uneven_steps(self) -> list[int]:
        """Steps in which layers saw different numbers of tokens: the file ends early, or logs layers in turn."""
        seen: dict[int, dict[RouterKey, int]] = defaultdict(lambda: defaultdict(int))
        for (step, _, router), sequences in self._tokens.items():
            seen[step][router] += sum(len(one.token_ids) for one in sequences.values())
        return [
            step
            for step, by in sorted(seen.items())
            if len(set(by.values())) > 1 or len(by) < len(self.top_k)
        ]

    def _check(self, ids_TK: Sequence[Sequence[int]], router: RouterKey) -> None:
        k = self.top_k.get(router) or len(ids_TK[0])
        limit = self.num_experts or _MOST_EXPERTS
        for ids in ids_TK:
            if not ids or len(ids) != k:
                raise ValueError(
                    f"{len(ids)} expert ids, but other tokens of {router.name} have {k}; every token needs as many"
                )
            if any(type(one) is not int for one in ids):
                raise ValueError(f"expert ids {list(ids)} are no whole numbers; write ids, not scores")
            if min(ids) < 0 or max(ids) >= limit:
                raise ValueError(
                    f"expert id {min(ids) if min(ids) < 0 else max(ids)} is outside 0 to {limit - 1}; "
                    "correct the id, or the number of experts (--num-experts)"
                )
            if len(set(ids)) != k:
                raise ValueError(f"an expert is named twice in {list(ids)}; a router selects different ones")
        self.top_k.setdefault(router, k)
        self._largest = max(self._largest, max(max(ids) for ids in ids_TK))

    def _current(self, step: int, rank: int, router: RouterKey, request: str, position: int) -> _Tokens:
        """The sequence that this position belongs to, a new one where it does not go on (-1: never does)."""
        layer = self._tokens[step, rank, router]
        turn_key = (step, rank, router, request)
        turn = self._turns.get(turn_key, 0)
        known = self._sequences[step, rank]
        seq = known.get((request, turn))
        if seq is not None and seq in layer and position <= layer[seq].last_position:
            turn = self._turns[turn_key] = turn + 1
            seq = known.get((request, turn))
        if seq is None:
            seq = known[request, turn] = len(known)
        return layer.setdefault(seq, _Tokens())

    def _routing(self, step: int, rank: int, layer: int, router: RouterKey) -> Iterator[Record]:
        """One record for all sequences of a length: no padding, and no record a token."""
        k = self.top_k[router]
        by_length: dict[int, list[tuple[int, _Tokens]]] = defaultdict(list)
        for seq, tokens in self._tokens.get((step, rank, router), {}).items():
            by_length[len(tokens.token_ids)].append((seq, tokens))
        for length, group in sorted(by_length.items()):
            shape = (1, len(group), length, k)
            ids = [np.frombuffer(tokens.experts, dtype=np.uint16) for _, tokens in group]
            if self.weighted:
                weights = np.concatenate([np.frombuffer(one.weights, dtype=np.float32) for _, one in group])
            else:
                weights = np.full(len(group) * length * k, 1 / k, dtype=np.float32)
            yield TokenRoutingRecord(
                step=step,
                rank=rank,
                layers=np.array([layer]),
                seqs=np.array([seq for seq, _ in group]),
                experts_LNSK=np.concatenate(ids).reshape(shape),
                weights_LNSK=weights.reshape(shape),
                lengths_N=np.full(len(group), length),
            )

    def _texts(self, step: int, rank: int) -> Iterator[Record]:
        """Token ids of each sequence, -1 where the file has none, from the layer that saw most of it."""
        longest: dict[int, array[int]] = {}
        for (at, of, _), sequences in self._tokens.items():
            if (at, of) == (step, rank):
                for seq, tokens in sequences.items():
                    if len(tokens.token_ids) > len(longest.get(seq, ())):
                        longest[seq] = tokens.token_ids
        for seq, token_ids in sorted(longest.items()):
            yield SequenceRecord(
                step=step,
                rank=rank,
                seqs=np.array([seq]),
                token_ids_NS=np.frombuffer(token_ids, dtype=np.int32)[None],
                lengths_N=np.array([len(token_ids)]),
                domains=(None,),
            )


def _check_weights(weights: Sequence[float] | None, k: int) -> None:
    if weights is None:
        return
    if len(weights) != k:
        raise ValueError(f"{len(weights)} weights for {k} experts; write one weight an expert")
    if any(type(one) not in (int, float) or not 0 <= one < float("inf") for one in weights):
        raise ValueError(f"weights {list(weights)} are not all numbers from 0; write the gate weights")
