"""Latents of a step as they reached the host, made into records in the writer's thread.

Numbers are computed in float64 from what travelled: the spectrum of a few thousand latents costs the writer some
milliseconds and training nothing.

Shapes: T tokens, R numbers of a latent, N sequences, J query heads, G key heads, M slots, S positions, W positions
of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from moeviz.metrics import latent
from moeviz.records import LatentRecord

MOST_ROWS = 128
"""Rows of a stored picture at most; more tokens are put together in blocks."""


class LatentPiece(NamedTuple):
    """What one layer gave in one micro-batch; tensors are in the copy under `latent/POSITION/NAME`."""

    layer: int
    kind: Literal["kv", "q", "slots"]
    micro_batch: int
    heads: tuple[int, ...] = ()
    groups: int = 1
    """Query heads that share a key head."""
    chunk: int = 0


class Stages(NamedTuple):
    """Both stages of one sequence, as its last whole chunk W' of queries met them; padding is cut."""

    read_GSM: np.ndarray
    """Weight of each slot on each token of earlier chunks; columns sum to 1."""
    last_JWM: np.ndarray
    """Weights of the chunk's queries on the slots, beside those on near tokens."""
    write_JSM: np.ndarray
    """The same for every token that has slots to read."""
    first: int
    """Tokens before those: they have none."""


class LatentRecords:
    """Makes the records of one step."""

    def __init__(
        self,
        step: int,
        rank: int,
        pieces: Sequence[LatentPiece],
        arrays: Mapping[str, np.ndarray],
        places: Mapping[int, list[np.ndarray]],
        seqs: Mapping[int, tuple[int, ...]],
    ) -> None:
        """`places` are the valid positions of each chosen sequence of a micro-batch, `seqs` its number in the step."""
        self._step, self._rank = step, rank
        self._arrays, self._places, self._seqs = arrays, places, seqs
        self._pieces = list(enumerate(pieces))

    def __iter__(self) -> Iterator[LatentRecord]:
        ordered = sorted(self._pieces, key=lambda pair: (pair[1].layer, pair[1].kind))
        for (_, kind), members in groupby(ordered, key=lambda pair: (pair[1].layer, pair[1].kind)):
            found = list(members)
            yield from self._two_stages(found) if kind == "slots" else self._compressed(found)

    def _array(self, position: int, name: str) -> np.ndarray | None:
        return self._arrays.get(f"latent/{position}/{name}")

    def _compressed(self, pieces: list[tuple[int, LatentPiece]]) -> Iterator[LatentRecord]:
        position, piece = pieces[0]
        latents_TR = np.concatenate([self._tokens(at) for at, _ in pieces])
        if len(latents_TR) < 2 or not np.isfinite(latents_TR).all():
            return
        shown_SR = self._array(position, "shown")
        assert shown_SR is not None
        place = self._places[piece.micro_batch][0]
        shown_SR = shown_SR[place[place < len(shown_SR)]]
        assert piece.kind != "slots"
        yield LatentRecord(
            step=self._step,
            rank=self._rank,
            layer=piece.layer,
            name=piece.kind,
            heads=(),
            tokens=len(latents_TR),
            seq=self._seqs[piece.micro_batch][0],
            length=len(shown_SR),
            grid_XSC=shown_SR[None],
            singular_XR=latent.spectrum(latents_TR)[None].astype(np.float32),
            profile_XC=latents_TR.std(axis=0)[None].astype(np.float32),
            values=self._used(position, piece, latents_TR),
        )

    def _tokens(self, position: int) -> np.ndarray:
        tokens_TR, valid_T = self._array(position, "tokens"), self._array(position, "valid")
        assert tokens_TR is not None
        return (tokens_TR if valid_T is None else tokens_TR[valid_T]).astype(np.float64)

    def _used(self, position: int, piece: LatentPiece, latents_TR: np.ndarray) -> dict[str, float]:
        if piece.kind == "q":
            return {"latent_q_erank": latent.latent_erank(latents_TR)}
        values = {
            "latent_pr": latent.participation_ratio(latents_TR),
            "latent_erank": latent.latent_erank(latents_TR),
            "latent_util": latent.latent_util(latents_TR),
            "latent_dim90": float(latent.dims_for_variance(latents_TR)),
            "latent_dead": float(latent.latent_dead(latents_TR)),
        }
        for name, id_ in (("keys", "latent_erank_k"), ("values", "latent_erank_v")):
            square_RR = self._array(position, name)
            if square_RR is not None:
                values[id_] = latent.erank_through(latents_TR, square_RR)
        return values

    def _two_stages(self, pieces: list[tuple[int, LatentPiece]]) -> Iterator[LatentRecord]:
        read: list[tuple[int, Stages]] = []
        for position, piece in pieces:
            scores, writes = self._array(position, "scores"), self._array(position, "writes")
            assert scores is not None
            assert writes is not None
            for n, (scores_GMS, writes_JSM) in enumerate(zip(scores, writes, strict=True)):
                place = self._places[piece.micro_batch][n]
                stages = read_stages(scores_GMS, writes_JSM, place, piece.chunk)
                if stages is not None:
                    read.append((self._seqs[piece.micro_batch][n], stages))
        if read:
            yield self._first_stage(pieces[0][1], read)
            yield self._second_stage(pieces[0][1], read)

    def _first_stage(self, piece: LatentPiece, read: list[tuple[int, Stages]]) -> LatentRecord:
        seq, shown = read[0]
        entropy_NGM = np.stack([latent.slot_read_entropy(each.read_GSM) for _, each in read])
        overlaps = [latent.slot_overlap(read_SM.T) for _, each in read for read_SM in each.read_GSM]
        values = {"read_entropy": float(entropy_NGM.mean())}
        if shown.read_GSM.shape[2] > 1:
            values["slot_overlap"] = float(np.mean(overlaps))
        return LatentRecord(
            step=self._step,
            rank=self._rank,
            layer=piece.layer,
            name="read",
            heads=tuple(range(len(shown.read_GSM))),
            tokens=sum(each.read_GSM.shape[1] for _, each in read),
            seq=seq,
            length=shown.read_GSM.shape[1],
            grid_XSC=blocks(shown.read_GSM, mean=False).astype(np.float32),
            singular_XR=_singular(shown.read_GSM),
            profile_XC=entropy_NGM.mean(axis=0).astype(np.float32),
            values=values,
        )

    def _second_stage(self, piece: LatentPiece, read: list[tuple[int, Stages]]) -> LatentRecord:
        seq, shown = read[0]
        groups_J = [head // piece.groups for head in piece.heads]
        writes_JTM = np.concatenate([each.write_JSM for _, each in read], axis=1)
        mass_JM = latent.slot_mass(writes_JTM)
        paid_J1 = mass_JM.sum(axis=-1, keepdims=True)
        share_JM = mass_JM / np.maximum(paid_J1, np.finfo(np.float64).tiny)
        chosen_JTM = writes_JTM / np.maximum(
            writes_JTM.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny
        )
        maps = [each.last_JWM @ each.read_GSM[groups_J].transpose(0, 2, 1) for _, each in read]
        ranks = [latent.effective_rank(map_WS) for map_JWS in maps for map_WS in map_JWS]
        values = {
            "slot_share": float(paid_J1.mean()),
            "slot_n_eff": float(latent.slot_n_eff(share_JM[:, None]).mean()),
            "slot_dead": float(latent.slot_dead(share_JM[:, None]).mean()),
            "eff_map_rank": float(np.mean(ranks)),
        }
        if writes_JTM.shape[2] > 1:
            values["write_entropy"] = float(latent.write_entropy(chosen_JTM).mean())
        return LatentRecord(
            step=self._step,
            rank=self._rank,
            layer=piece.layer,
            name="write",
            heads=piece.heads,
            tokens=writes_JTM.shape[1],
            seq=seq,
            first=shown.first,
            length=shown.write_JSM.shape[1],
            grid_XSC=blocks(shown.write_JSM, mean=True).astype(np.float32),
            singular_XR=_singular(maps[0])[:, : writes_JTM.shape[2]],  # no more directions than slots
            profile_XC=share_JM.astype(np.float32),
            values=values,
        )


def read_stages(
    scores_GMS: np.ndarray, writes_JSM: np.ndarray, place: np.ndarray, chunk: int
) -> Stages | None:
    """Both stages of one sequence; None when it is one chunk long, and slots have read nothing.

    Args:
        scores_GMS, writes_JSM: as `stage_weights` made them.
        place: positions of its valid tokens.
        chunk: W; chunks are cut at positions, padding included.
    """
    if len(place) == 0:
        return None
    end = int(place[-1]) + 1
    start = max((end // chunk - 1) * chunk, 0) or (end - 1) // chunk * chunk
    earlier, queries = place[place < start], place[place >= start]
    if len(earlier) < 2:
        return None
    scores_GSM = scores_GMS[:, :, earlier].astype(np.float64).transpose(0, 2, 1)
    weights_GSM = np.exp(scores_GSM - scores_GSM.max(axis=1, keepdims=True))
    first = int(earlier[0]) // chunk * chunk + chunk  # the first position whose slots have read something
    writes = writes_JSM.astype(np.float64)
    return Stages(
        read_GSM=weights_GSM / weights_GSM.sum(axis=1, keepdims=True),
        last_JWM=writes[:, queries[queries < start + chunk]],
        write_JSM=writes[:, place[place >= first]],
        first=int((place < first).sum()),
    )


def blocks(values_XSC: np.ndarray, *, mean: bool, rows: int = MOST_ROWS) -> np.ndarray:
    """Neighbouring rows put together so that at most `rows` are left: their mean, or their sum."""
    length = values_XSC.shape[1]
    size = max(1, -(-length // rows))
    sums = np.add.reduceat(values_XSC, np.arange(0, length, size), axis=1)
    if not mean:
        return sums
    counts = np.diff(np.append(np.arange(0, length, size), length))
    return sums / counts[:, None]


def _singular(values_XSC: np.ndarray) -> np.ndarray:
    return np.linalg.svd(values_XSC, compute_uv=False).astype(np.float32)
