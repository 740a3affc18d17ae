"""The token-level side of a step: which sequences are recorded, their tokens, losses and maps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moeviz.capture.latent_batch import LatentPiece
from moeviz.capture.micro_batch import MicroBatch
from moeviz.capture.sample_batch import MapPiece, SampleBatch, SequencePiece
from moeviz.capture.sampling import choose_rows
from moeviz.capture.stages import Share
from moeviz.capture.step_sums import RoutingPiece
from moeviz.capture.transfer import HostCopy, index_tensor
from moeviz.errors import MoevizError
from moeviz.policy import SamplingPolicy
from moeviz.records import ModelInfo


@dataclass(eq=False)
class StepSamples:
    """What was kept of the micro-batches of one step."""

    sequences: list[SequencePiece] = field(default_factory=list)
    maps: list[MapPiece] = field(default_factory=list)
    latents: list[LatentPiece] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """On the device, by the names of `SampleBatch.copy`."""

    def batch(
        self,
        step: int,
        rank: int,
        info: ModelInfo,
        routing: Sequence[RoutingPiece],
        map_size: int,
        share: Share,
    ) -> SampleBatch:
        """These samples with the decisions of their sequences, on their way to the host."""
        tensors = dict(self.tensors)
        for position, piece in enumerate(routing):
            tensors[f"experts/{position}"] = piece.experts_LNSK
            tensors[f"weights/{position}"] = piece.weights_LNSK
        alike: dict[tuple[int, int], list[int]] = {}
        for layer in (each for each in info.layers if each.layer in share.layers):
            alike.setdefault((layer.num_experts, layer.top_k), []).append(layer.layer)
        return SampleBatch(
            step=step,
            rank=share.rank_of_samples(rank),
            copy=HostCopy(tensors),
            tells_texts=share.tells_texts,
            sequences=self.sequences,
            routing=[(piece.layers, piece.micro_batch) for piece in routing],
            groups=list(alike.values()),
            maps=self.maps,
            map_size=map_size,
            latents=self.latents,
        )


class Sampler:
    """Chooses sequences by the policy and keeps what belongs to them."""

    def __init__(self, policy: SamplingPolicy, attention_sequences: int) -> None:
        """`attention_sequences`: how many sequences of a step have maps at most; they are among those recorded."""
        self.policy, self.attention_sequences = policy, attention_sequences
        self.step = StepSamples()
        self.rows_N: Tensor | None = None
        """Rows of the micro-batch in progress that are recorded, on its device; None: none."""
        self.attention_rows_N: Tensor | None = None
        """Those of them whose attention is recorded."""
        self.latent_rows_N: Tensor | None = None
        """Those of them whose latents are recorded."""
        self._seen = 0
        self.sequences = 0
        """Of the last step, recorded or not; as many are expected of the next one."""
        self._labels: deque[str | None] = deque()
        self._label_of_all: str | None = None
        self._rows: list[int] = []

    def label(self, domains: Sequence[str | None] | str | None) -> None:
        """Labels of the next sequences, in order; a string labels every sequence until the step ends."""
        if domains is None or isinstance(domains, str):
            self._label_of_all = domains
        else:
            self._labels.extend(domains)

    def begin(self, micro_batch: MicroBatch, step: int) -> None:
        """Choose the rows of a micro-batch that is about to run."""
        self._rows, self.rows_N, self.attention_rows_N, self.latent_rows_N = [], None, None, None
        policy, first, size = self.policy, self._seen, micro_batch.batch_size
        self._seen += size
        routes, attends, shows = (
            policy.routes_at(step),
            policy.attends_at(step),
            policy.shows_latents_at(step),
        )
        if not (routes or attends or shows):
            for _ in range(min(size, len(self._labels))):
                self._labels.popleft()
            return
        labels = [self._labels.popleft() if self._labels else self._label_of_all for _ in range(size)]
        taken = sum(len(piece.seqs) for piece in self.step.sequences)
        latents = max(1, policy.latent_tokens // micro_batch.length) if shows else 0
        wanted = (
            policy.route_sequences if routes else max(self.attention_sequences if attends else 0, latents)
        )
        rows = choose_rows(first, size, self.sequences, wanted, step, taken)
        if not rows:
            return
        source = micro_batch.ids_BS if micro_batch.ids_BS is not None else micro_batch.valid_BS
        device = source.device if source is not None else None
        self._rows = rows
        chosen = index_tensor(rows, device)
        self.rows_N = chosen if routes else None
        room = max(0, self.attention_sequences - taken)
        self.attention_rows_N = chosen[:room] if attends and room else None
        self.latent_rows_N = chosen[: latents - taken] if latents > taken else None
        piece = SequencePiece(
            micro_batch.index,
            tuple(first + row for row in rows),
            micro_batch.length,
            tuple(labels[row] for row in rows),
        )
        self.step.sequences.append(piece)
        for name, values in (("ids", micro_batch.ids_BS), ("valid", micro_batch.valid_BS)):
            if values is not None:
                self.step.tensors[f"{name}/{micro_batch.index}"] = values.index_select(0, chosen)

    def add_maps(
        self, micro_batch: int, layer: int, heads: Sequence[int], maps: Tensor, num_keys: int | None
    ) -> None:
        """Keep the maps [N, J, P, P] of one core."""
        self.step.tensors[f"maps/{len(self.step.maps)}"] = maps
        self.step.maps.append(MapPiece(layer, tuple(heads), micro_batch, maps.shape[0], num_keys))

    def add_latents(self, piece: LatentPiece, tensors: Mapping[str, Tensor]) -> None:
        """Keep what one layer's latents gave."""
        position = len(self.step.latents)
        self.step.tensors |= {f"latent/{position}/{name}": values for name, values in tensors.items()}
        self.step.latents.append(piece)

    def latent_room(self, layer: int, kind: str) -> int:
        """Tokens of this step whose latents may still be taken from a layer."""
        taken = sum(
            len(self.step.tensors[f"latent/{position}/tokens"])
            for position, piece in enumerate(self.step.latents)
            if (piece.layer, piece.kind) == (layer, kind)
        )
        return self.policy.latent_tokens - taken

    def add_loss(self, micro_batch: MicroBatch, loss_BS: Tensor) -> None:
        """Keep the losses of the recorded rows of the last micro-batch; [B, S] or [B, S-1]."""
        size, length = micro_batch.batch_size, micro_batch.length
        if loss_BS.shape not in ((size, length), (size, length - 1)):
            raise MoevizError(
                f"token_loss has shape {tuple(loss_BS.shape)}, but the last micro-batch was {(size, length)}; "
                "hand over the loss of every position, [B, S] or [B, S-1], right after its forward"
            )
        if self._rows:
            rows_N = index_tensor(self._rows, loss_BS.device)
            self.step.tensors[f"loss/{micro_batch.index}"] = loss_BS.detach().float().index_select(0, rows_N)

    def take_nothing(self) -> bool:
        """End a step without samples, as most are; False, with nothing changed, where `take` must do it."""
        if self.step.sequences or self._labels or self._label_of_all is not None:
            return False
        self.sequences, self._seen = self._seen, 0
        return True

    def take(self) -> StepSamples:
        """The samples of the step, and a fresh start."""
        self.sequences, self._seen = self._seen, 0
        self._labels.clear()
        self._label_of_all = None
        done = self.step
        if done.sequences:  # else the empty samples serve the next step too
            self.step = StepSamples()
            self._rows, self.rows_N, self.attention_rows_N, self.latent_rows_N = [], None, None, None
        return done
