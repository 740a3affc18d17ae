"""Which process runs which blocks: stages behind each other, and replicas of the whole chain beside each other.

Rank r is stage r % stages of replica r // stages: neighbours talk most. What a stage does not run it does not hold:
its parameters are there in name and shape, on torch's `meta` device, without memory. So the model's names, layers and
numbers are the same on every rank. Buffers are small and stay whole everywhere, the selection biases among them: each
rank moves all of them, alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from model.config import ModelConfig
from model.lm import MoELanguageModel
from moeviz.errors import MoevizError

_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")
_EMBEDDING = "model.embed_tokens.weight"
_PLACES = "model.embed_positions."


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a process stands."""

    rank: int
    num_stages: int
    num_replicas: int

    @classmethod
    def of(cls, rank: int, num_ranks: int, stages: int) -> Layout:
        """
        Raises:
            MoevizError: the ranks cannot be shared out among the stages.
        """
        if num_ranks % stages:
            raise MoevizError(
                f"pipeline_stages={stages}, but {num_ranks} {'processes run' if num_ranks > 1 else 'process runs'}; "
                f"start a multiple of {stages}, for example with --num-ranks {stages}"
            )
        return cls(rank=rank, num_stages=stages, num_replicas=num_ranks // stages)

    @property
    def stage(self) -> int:
        return self.rank % self.num_stages

    @property
    def replica(self) -> int:
        return self.rank // self.num_stages

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def chain(self, replica: int) -> list[int]:
        """Ranks of a replica, first stage first."""
        return [replica * self.num_stages + stage for stage in range(self.num_stages)]

    def alike(self, stage: int) -> list[int]:
        """Ranks that run this stage, in every replica."""
        return [replica * self.num_stages + stage for replica in range(self.num_replicas)]


def spans(num_layers: int, stages: int) -> list[range]:
    """The blocks of each stage: equally many, or one more in the first ones, for the last has the head.

    Raises:
        MoevizError: more stages than blocks.
    """
    if stages > num_layers:
        raise MoevizError(
            f"pipeline_stages={stages} exceeds num_layers={num_layers}, and every stage needs a block; give at most "
            f"--pipeline-stages {num_layers}"
        )
    size, more = divmod(num_layers, stages)
    ends = [size * (stage + 1) + min(stage + 1, more) for stage in range(stages)]
    return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]


def shares_embedding(config: ModelConfig) -> bool:
    """Whether the last stage needs the embedding too: as output matrix, or to predict further tokens."""
    return config.tie_embeddings or config.heads.mtp_depth > 0


def stages_of(name: str, config: ModelConfig, stages: int) -> tuple[int, ...]:
    """The stages that hold a parameter; of two, the first one's counts."""
    block = _BLOCK.match(name)
    if block:
        layer = int(block[1])
        return tuple(stage for stage, span in enumerate(spans(config.num_layers, stages)) if layer in span)
    if name == _EMBEDDING:
        return (0, stages - 1) if shares_embedding(config) else (0,)
    return (0,) if name.startswith(_PLACES) else (stages - 1,)


def check_stages(model: MoELanguageModel, stages: int) -> None:
    """
    Raises:
        MoevizError: more stages than blocks, or a stage of which nothing is trained.
    """
    spans(model.config.num_layers, stages)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    busy = {stage for name in trained for stage in stages_of(name, model.config, stages)}
    idle = sorted(set(range(stages)) - busy)
    if idle:
        raise MoevizError(
            f"pipeline_stages={stages} leaves stage {idle[0]} nothing to train, for all its weights are frozen; use "
            "fewer stages, or freeze less"
        )


def keep_stage(model: MoELanguageModel, layout: Layout, device: torch.device) -> None:
    """Make `model` one stage of itself, in place: its blocks and what belongs to them on `device`, the rest on `meta`.

    Raises:
        MoevizError: see `spans`.
    """
    model.model.span = spans(model.config.num_layers, layout.num_stages)[layout.stage]
    if model.model.draws is not None:
        model.model.draws.rank = layout.replica
    made: dict[int, nn.Parameter] = {}
    names = {id(weight): name for name, weight in model.named_parameters()}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in made:
                stages = stages_of(names[id(weight)], model.config, layout.num_stages)
                place = device if layout.stage in stages else torch.device("meta")
                made[id(weight)] = nn.Parameter(weight.detach().to(place), weight.requires_grad)
            setattr(module, name, made[id(weight)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def is_here(weight: torch.Tensor) -> bool:
    """Whether a parameter is held by this process."""
    return not weight.is_meta
