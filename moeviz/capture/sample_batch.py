"""Token-level rows, attention maps and latents of a step, made into records in the writer's thread.

Padding is cut here: routers see rows of the padded batch, readers see the tokens of a sequence. A full queue
may drop the whole batch (`droppable`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moeviz.capture.latent_batch import LatentPiece, LatentRecords
from moeviz.capture.transfer import HostCopy
from moeviz.records import AttentionRecord, Record, SequenceRecord, TokenRoutingRecord


class SequencePiece(NamedTuple):
    """The chosen sequences of one micro-batch; tensors are in the copy under `NAME/index`."""

    micro_batch: int
    seqs: tuple[int, ...]
    """Index in the step: sequences before this micro-batch + row."""
    length: int
    domains: tuple[str | None, ...]


class MapPiece(NamedTuple):
    """Maps of one attention core for some sequences; the tensor is in the copy under `maps/position`."""

    layer: int
    heads: tuple[int, ...]
    micro_batch: int
    num_seqs: int
    """How many of the piece's sequences it covers, the first ones."""
    num_keys: int | None
    """Keys of a core that reads something else than the queries' own tokens (a cache, latents); None: the same."""


@dataclass(eq=False, kw_only=True)
class SampleBatch:
    """Token-level rows, maps and latents of one step."""

    step: int
    rank: int
    copy: HostCopy
    """`ids/M`, `valid/M`, `loss/M` of micro-batch M; `experts/P`, `weights/P` of routing piece P; `maps/P`;
    `latent/P/NAME`."""
    sequences: Sequence[SequencePiece]
    routing: Sequence[tuple[tuple[int, ...], int]]
    """(layers, micro-batch) of each routing piece."""
    groups: Sequence[Sequence[int]]
    """Layers that share E and K: one record each."""
    maps: Sequence[MapPiece] = ()
    map_size: int = 128
    latents: Sequence[LatentPiece] = ()
    tells_texts: bool = True
    """Whether the sequences themselves are told here, and not by another stage of the model."""
    droppable: bool = field(default=True, init=False)

    @property
    def nbytes(self) -> int:
        return self.copy.nbytes

    def materialize(self) -> Iterator[Record]:
        """Sequences first, then their routing, then their maps and latents."""
        arrays = self.copy.arrays()
        places = {piece.micro_batch: self._places(piece, arrays) for piece in self.sequences}
        if self.tells_texts:
            yield from self._sequence_records(arrays, places)
        yield from self._routing_records(arrays, places)
        yield from self._map_records(arrays, places)
        seqs = {piece.micro_batch: piece.seqs for piece in self.sequences}
        yield from LatentRecords(self.step, self.rank, self.latents, arrays, places, seqs)

    def _places(self, piece: SequencePiece, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Positions of the valid tokens of each sequence."""
        valid_NS = arrays.get(f"valid/{piece.micro_batch}")
        if valid_NS is None:
            return [np.arange(piece.length)] * len(piece.seqs)
        return [np.flatnonzero(valid_S) for valid_S in valid_NS]

    def _sequence_records(
        self, arrays: Mapping[str, np.ndarray], places: Mapping[int, list[np.ndarray]]
    ) -> Iterator[Record]:
        known = [piece for piece in self.sequences if f"ids/{piece.micro_batch}" in arrays]
        if not known:
            return
        where = [place for piece in known for place in places[piece.micro_batch]]
        lengths_N = np.array([len(place) for place in where], dtype=np.int32)
        width = int(lengths_N.max(initial=0))
        token_ids_NS = np.zeros((len(where), width), dtype=np.int32)
        loss_NS = np.full((len(where), width), np.nan, dtype=np.float32)
        ids = [row for piece in known for row in arrays[f"ids/{piece.micro_batch}"]]
        losses = [row for piece in known for row in _losses(arrays.get(f"loss/{piece.micro_batch}"), piece)]
        for n, place in enumerate(where):
            token_ids_NS[n, : len(place)] = ids[n][place]
            loss_NS[n, : len(place)] = losses[n][place]
        yield SequenceRecord(
            step=self.step,
            rank=self.rank,
            seqs=np.array([seq for piece in known for seq in piece.seqs], dtype=np.int64),
            token_ids_NS=token_ids_NS,
            lengths_N=lengths_N,
            domains=tuple(domain for piece in known for domain in piece.domains),
            token_loss_NS=None if np.isnan(loss_NS).all() else loss_NS,
        )

    def _routing_records(
        self, arrays: Mapping[str, np.ndarray], places: Mapping[int, list[np.ndarray]]
    ) -> Iterator[Record]:
        seqs = {piece.micro_batch: piece.seqs for piece in self.sequences}
        order = sorted({index for _, index in self.routing})
        where = [place for index in order for place in places[index]]
        lengths_N = np.array([len(place) for place in where], dtype=np.int32)
        first = {index: sum(len(seqs[other]) for other in order if other < index) for index in order}
        for layers in self.groups:
            pieces = [
                (p, have, index) for p, (have, index) in enumerate(self.routing) if set(have) <= set(layers)
            ]
            if not pieces:
                continue
            top_k = arrays[f"experts/{pieces[0][0]}"].shape[-1]
            shape = (len(layers), len(where), int(lengths_N.max(initial=0)), top_k)
            experts_LNSK = np.zeros(shape, dtype=np.uint16)
            weights_LNSK = np.zeros(shape, dtype=np.float32)
            row_of = {layer: row for row, layer in enumerate(layers)}
            for p, have, index in pieces:
                rows = [row_of[layer] for layer in have]
                for n, place in enumerate(places[index]):
                    at = (rows, first[index] + n, slice(len(place)))
                    experts_LNSK[at] = arrays[f"experts/{p}"][:, n, place].view(np.uint16)
                    weights_LNSK[at] = arrays[f"weights/{p}"][:, n, place]
            yield TokenRoutingRecord(
                step=self.step,
                rank=self.rank,
                layers=np.array(layers, dtype=np.int64),
                seqs=np.array([seq for index in order for seq in seqs[index]], dtype=np.int64),
                experts_LNSK=experts_LNSK,
                weights_LNSK=weights_LNSK,
                lengths_N=lengths_N,
            )

    def _map_records(
        self, arrays: Mapping[str, np.ndarray], places: Mapping[int, list[np.ndarray]]
    ) -> Iterator[Record]:
        seqs = {piece.micro_batch: piece.seqs for piece in self.sequences}
        for position, piece in enumerate(self.maps):
            for n in range(piece.num_seqs):
                q_len = len(places[piece.micro_batch][n])
                k_len = q_len if piece.num_keys is None else piece.num_keys
                rows, columns = _cells(q_len, self.map_size), _cells(k_len, self.map_size)
                for j, head in enumerate(piece.heads):
                    yield AttentionRecord(
                        step=self.step,
                        rank=self.rank,
                        layer=piece.layer,
                        head=head,
                        seq=seqs[piece.micro_batch][n],
                        map_QC=np.ascontiguousarray(arrays[f"maps/{position}"][n, j, :rows, :columns]),
                        q_len=q_len,
                        k_len=k_len,
                    )


def _cells(length: int, size: int) -> int:
    """Side of the map of `length` positions averaged in blocks to at most `size`."""
    block = max(1, -(-length // size))
    return -(-length // block)


def _losses(loss_NS: np.ndarray | None, piece: SequencePiece) -> np.ndarray:
    """Losses padded with NaN to the length of the sequences: the last position may have no next token."""
    whole = np.full((len(piece.seqs), piece.length), np.nan, dtype=np.float32)
    if loss_NS is not None:
        whole[:, : loss_NS.shape[1]] = loss_NS
    return whole
