"""Dumps of SGLang's expert distribution recorder, in all three forms that it writes (torch files, read weights-only).

`--expert-distribution-recorder-mode` decides which (python/sglang/srt/eplb/expert_distribution.py). Shapes: N passes, L
layers of the whole model, P physical and E logical experts, T tokens of a pass, K = 8 slots, -1 where unused.

    stat, stat_approx  {"rank", "logical_count": int [N, L, E], ...}: sums over ranks, of one file a dump
    per_pass           {"records": [{"forward_pass_id", "rank", "gatherer_key", "global_physical_count": int [L, P]}],
                        "last_physical_to_logical_map": int [L, P]}: a file a rank and dump
    per_token          the same, and in each record "input_ids" [T], "positions", "extend_seq_lens", "forward_mode" and
                       "topk_ids_of_layer": int [L, T, K], physical experts

A forward pass becomes a step. Dense layers have no counts and are left out. Only per_token says how many experts a
token has; no form has gate weights. A stat dump is a ring buffer: once full, it begins with a pass in the middle.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moeviz.errors import MoevizError, require
from moeviz.imports.recording import FaultyLine, RouterKey
from moeviz.records import (
    EventRecord,
    LayerInfo,
    LoadRecord,
    ModelInfo,
    Record,
    SequenceRecord,
    TokenRoutingRecord,
)

_FILES = "expert_distribution_recorder_*.pt"
_TIME = re.compile(r"expert_distribution_recorder_(\d+(?:\.\d+)?)")
_DECODE = 2
"""ForwardMode.DECODE: one token of each request."""


class FaultyRecord(FaultyLine):
    """A record that was left out; `line` is its number in the file."""

    def __str__(self) -> str:
        return f"{self.file}, record {self.line}: {self.problem}"


class _Tokens(NamedTuple):
    """What one rank decided in one pass, token by token."""

    rank: int
    ids_LTK: np.ndarray
    """Logical experts, -1 where a layer has no router or fewer slots."""
    input_ids_T: np.ndarray
    lengths_N: np.ndarray
    """Tokens of each sequence; those after the last one are padding."""


class Dumps:
    """The passes of one or several files."""

    def __init__(self, top_k: int | None) -> None:
        self.counts_LE: dict[int, np.ndarray] = {}
        """By pass, over all layers of the model."""
        self.tokens: dict[int, list[_Tokens]] = defaultdict(list)
        self.ranks: set[int] = set()
        self.faults: list[FaultyLine] = []
        self.notes: list[str] = []
        self.modes: list[str] = []
        self._top_k = top_k
        self._seen: set[tuple[int, int, str]] = set()

    def add_stat(self, content: Mapping[str, Any], file: Path) -> None:
        """The passes of a `stat` dump go on where the last one ended: it has no numbers for them."""
        self.modes.append("stat")
        counts_NLE = _whole_numbers(content["logical_count"], 3)
        first = max(self.counts_LE, default=-1) + 1
        used = np.asarray(counts_NLE.any(axis=(1, 2)))
        for step, counts_LE in enumerate(counts_NLE[used], first):
            self.counts_LE[step] = counts_LE.astype(np.int64)
        if not used.all():
            self.notes.append(
                f"{file.name}: {int((~used).sum())} of {len(used)} passes are empty, as in a ring buffer that was not "
                "filled, and left out"
            )

    def add_records(self, content: Mapping[str, Any], file: Path) -> None:
        """The passes of a `per_pass` or `per_token` dump, by their own numbers."""
        map_LP = _whole_numbers(content["last_physical_to_logical_map"], 2)
        for number, record in enumerate(content["records"], 1):
            try:
                self._add_record(record, map_LP)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                self.faults.append(FaultyRecord(file.name, number, f"{error}; dump again"))

    def _add_record(self, record: Mapping[str, Any], map_LP: np.ndarray) -> None:
        step, rank = int(record["forward_pass_id"]), int(record["rank"])
        key = (step, rank, str(record.get("gatherer_key", "primary")))
        if key in self._seen:
            raise ValueError(f"pass {step} of rank {rank} was there before")
        counts_LP = _whole_numbers(record["global_physical_count"], 2)
        if counts_LP.shape != map_LP.shape or (counts_LP < 0).any():
            raise ValueError(
                f"global_physical_count of shape {counts_LP.shape} does not fit the map of {map_LP.shape}"
            )
        tokens = _tokens(record, map_LP) if "topk_ids_of_layer" in record else None
        counts_LE = np.zeros((len(map_LP), int(map_LP.max()) + 1), dtype=np.int64)
        np.add.at(counts_LE, (np.arange(len(map_LP))[:, None], map_LP), counts_LP)
        before = self.counts_LE.get(step, np.zeros_like(counts_LE))
        if before.shape != counts_LE.shape:
            raise ValueError(f"{counts_LE.shape} layers and experts, other records have {before.shape}")
        self._seen.add(key)
        self.ranks.add(rank)
        self.modes.append("per_token" if tokens else "per_pass")
        self.counts_LE[step] = before + counts_LE
        if tokens is not None and len(tokens.lengths_N):
            self.tokens[step].append(tokens)

    @property
    def steps(self) -> list[int]:
        """Passes in which some expert got a token."""
        return sorted(step for step, counts_LE in self.counts_LE.items() if counts_LE.any())

    @property
    def blocks(self) -> list[int]:
        """Layers of the model that have routers."""
        any_L = np.any([counts_LE.any(axis=1) for counts_LE in self.counts_LE.values()], axis=0)
        return np.flatnonzero(any_L).tolist()

    def top_k(self) -> int:
        """Experts of a token.

        Raises:
            MoevizError: no file says it and nobody told.
        """
        slots = {
            int(count)
            for passes in self.tokens.values()
            for one in passes
            for count in np.unique((one.ids_LTK >= 0).sum(2)).tolist()
            if count
        }
        if slots and self._top_k not in (None, max(slots)):
            raise MoevizError(f"--top-k {self._top_k}, but tokens have {max(slots)} experts; leave it out")
        if slots:
            return max(slots)
        if self._top_k is None:
            sums = np.concatenate([counts_LE.sum(1) for counts_LE in self.counts_LE.values()])
            divisor = int(np.gcd.reduce(sums)) if len(sums) else 0
            raise MoevizError(
                "these dumps do not say how many experts a token has; give --top-k (the counts of every layer and pass "
                f"are multiples of {divisor}, so it divides that)"
            )
        return self._top_k

    def model(self) -> ModelInfo:
        """Layers with routers, by their number in the model."""
        size = next(iter(self.counts_LE.values())).shape[1]
        top_k = self.top_k()
        return ModelInfo(
            family="sglang",
            layers=tuple(
                LayerInfo(
                    layer=at, name=RouterKey(-1, block).name, block=block, num_experts=size, top_k=top_k
                )
                for at, block in enumerate(self.blocks)
            ),
        )

    def records(self, step: int, ts: float) -> Iterator[Record]:
        """Tokens and sequences of each rank of a pass, and last its load."""
        blocks, top_k = self.blocks, self.top_k()
        for one in self.tokens.get(step, ()):
            ids_LTK = one.ids_LTK[blocks][..., :top_k]
            total = int(one.lengths_N.sum())
            if (ids_LTK[:, :total] < 0).any():
                yield EventRecord(
                    step=step, rank=one.rank, ts=ts, kind="tokens_left_out", detail={"why": "unrouted tokens"}
                )
                continue
            yield from _token_records(one, ids_LTK, step)
        counts_LE = self.counts_LE[step][blocks]
        tokens = -(-int(counts_LE.sum(1).max()) // top_k)
        yield LoadRecord(step=step, rank=0, ts=ts, tokens=tokens, counts_LE=counts_LE)

    def doubts(self) -> list[str]:
        """What a reader of these counts must know."""
        notes = [*self.notes, "gate weights are missing: equal shares of 1/K stand in their place"]
        missing = sorted(set(range(max(self.ranks, default=-1) + 1)) - self.ranks)
        if missing:
            notes.append(f"no file of ranks {missing}: their tokens are missing")
        if len(self.ranks) > 1:
            notes.append(
                "counts are summed over ranks, as SGLang does; ranks that see the same tokens (tensor parallelism "
                "without data-parallel attention) count them again"
            )
        sums_NL = np.array([self.counts_LE[step][self.blocks].sum(1) for step in self.steps])
        uneven = int(((sums_NL != sums_NL[:, :1]) | (sums_NL % self.top_k() != 0)).any(1).sum())
        if uneven:
            notes.append(
                f"in {uneven} of {len(sums_NL)} passes the layers' counts differ or are no multiple of "
                f"top_k={self.top_k()}: counts are approximate, files of ranks are missing, or --top-k is wrong"
            )
        return notes


def dump_files(path: Path) -> list[Path]:
    """The dumps that `path` names, oldest first: itself, or those of a folder; none if it names none."""
    if path.is_file():
        with open(path, "rb") as file:
            return [path] if path.suffix == ".pt" or file.read(4) == b"PK\x03\x04" else []
    return sorted(path.glob(_FILES), key=lambda file: (_written(file), file.name))


def read_dumps(
    files: list[Path],
    top_k: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dumps:
    """Read dumps of one server.

    Args:
        files: as of `dump_files`.
        top_k: experts of a token, where the files do not say it.
        progress: called with the files read and the files in all.

    Raises:
        MoevizError: a file that is no such dump, files of different models, or none with a count in it.
    """
    dumps = Dumps(top_k)
    for done, file in enumerate(files):
        progress(done, len(files))
        content = _load(file)
        try:
            if "logical_count" in content:
                dumps.add_stat(content, file)
            else:
                dumps.add_records(content, file)
        except (KeyError, TypeError, ValueError) as error:
            raise MoevizError(
                f"{file} is no dump of SGLang's expert distribution recorder ({error!r}); give the files that "
                "/dump_expert_distribution_record wrote"
            ) from error
    progress(len(files), len(files))
    if len({counts_LE.shape for counts_LE in dumps.counts_LE.values()}) > 1:
        raise MoevizError("the dumps are of different models (layers, experts); import them one by one")
    if not dumps.steps:
        first = f"; the first fault: {dumps.faults[0]}" if dumps.faults else ""
        raise MoevizError(f"{files[0]} holds no count of any expert{first}; record while requests are served")
    return dumps


def _load(file: Path) -> Mapping[str, Any]:
    torch = require("torch", "train", "importing SGLang's dumps")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MoevizError(
            f"{file} cannot be read as tensors and plain values ({first}); anything else is not loaded, because it "
            "could run code: dump again"
        ) from error
    if not isinstance(content, dict):
        raise MoevizError(f"{file} holds {type(content).__name__} instead of a dump; give another file")
    return content


def _tokens(record: Mapping[str, Any], map_LP: np.ndarray) -> _Tokens:
    ids_LTK = _whole_numbers(record["topk_ids_of_layer"], 3)
    input_ids_T = np.asarray(record["input_ids"], dtype=np.int32)
    if ids_LTK.shape[:2] != (len(map_LP), len(input_ids_T)):
        raise ValueError(
            f"topk_ids_of_layer of shape {ids_LTK.shape} does not fit {len(map_LP)} layers, {len(input_ids_T)} tokens"
        )
    if ids_LTK.size and (ids_LTK.max() >= map_LP.shape[1] or ids_LTK.min() < -1):
        raise ValueError(
            f"expert ids {ids_LTK.min()} to {ids_LTK.max()} are outside 0 to {map_LP.shape[1] - 1}"
        )
    layers_L11 = np.arange(len(map_LP))[:, None, None]
    logical_LTK = np.where(ids_LTK < 0, -1, map_LP[layers_L11, np.maximum(ids_LTK, 0)])
    lengths = record.get("extend_seq_lens")
    if lengths is None or record.get("forward_mode") == _DECODE:
        lengths_N = np.ones(len(input_ids_T), dtype=np.int64)
    else:
        lengths_N = np.asarray(lengths, dtype=np.int64)
    if lengths_N.sum() > len(input_ids_T):
        raise ValueError(f"extend_seq_lens sums to {lengths_N.sum()}, with {len(input_ids_T)} tokens")
    return _Tokens(int(record["rank"]), logical_LTK, input_ids_T, lengths_N[lengths_N > 0])


def _token_records(one: _Tokens, ids_LTK: np.ndarray, step: int) -> Iterator[Record]:
    """One pair of records for all sequences of a length: no padding."""
    starts_N = np.cumsum(one.lengths_N) - one.lengths_N
    for length in np.unique(one.lengths_N):
        seqs = np.flatnonzero(one.lengths_N == length)
        at_NS = starts_N[seqs][:, None] + np.arange(length)
        experts_LNSK = ids_LTK[:, at_NS].astype(np.uint16)
        lengths_N = np.full(len(seqs), length)
        yield TokenRoutingRecord(
            step=step,
            rank=one.rank,
            layers=np.arange(len(ids_LTK)),
            seqs=seqs,
            experts_LNSK=experts_LNSK,
            weights_LNSK=np.full(experts_LNSK.shape, 1 / experts_LNSK.shape[-1], dtype=np.float32),
            lengths_N=lengths_N,
        )
        yield SequenceRecord(
            step=step,
            rank=one.rank,
            seqs=seqs,
            token_ids_NS=one.input_ids_T[at_NS],
            lengths_N=lengths_N,
            domains=(None,) * len(seqs),
        )


def _whole_numbers(value: Any, dimensions: int) -> np.ndarray:
    """A tensor as int64. Raises ValueError for another number of dimensions, or fractions."""
    array = np.asarray(value)
    if array.ndim != dimensions or array.dtype.kind not in "iu":
        raise ValueError(
            f"{array.dtype} of shape {array.shape} instead of whole numbers in {dimensions} dimensions"
        )
    return array.astype(np.int64)


def _written(file: Path) -> float:
    match = _TIME.match(file.name)
    return float(match[1]) if match else 0.0
