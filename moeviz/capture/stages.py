"""One model that several processes hold together, a stage of its layers each: who tells what of the one run.

What a process does not hold is there in name and shape only, on torch's `meta` device; so every process knows every
layer and its number. Loads are added up as those of any ranks are, each with zeros for the layers of others. Samples of
one sequence come from all stages under one rank, the number of the replica.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn

from moeviz.capture.reading import RouterSite

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for another one that is alive."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """What of the model is here."""

    layers: frozenset[int]
    """MoE layers."""
    stages: int = 1
    """Processes that hold one model together."""
    replica: int | None = None
    """Which of the models; None: each process has a whole one."""
    tells_scalars: bool = True
    """Whether numbers of a step come from here: one stage of each replica tells them."""
    tells_texts: bool = True
    """Whether the end of the model is here, where the losses of tokens are known."""
    group: Any = None
    """A process group of its own, for what stages hand to the first process."""

    def rank_of_samples(self, rank: int) -> int:
        return rank if self.replica is None else self.replica


def share_of(root: nn.Module, routers: Sequence[RouterSite], group: Any) -> Share:
    """Look at the model and ask the other processes of `group`. All must call it, or all have whole models.

    Args:
        root: the model.
        routers: in the order of layers.
        group: the process group that a run is recorded by; None: this process is on its own.
    """
    layers = frozenset(
        layer
        for layer, site in enumerate(routers)
        if not any(parameter.is_meta for parameter in site.module.parameters())
    )
    held = [not parameter.is_meta for parameter in root.parameters()]
    if group is None or all(held):
        return Share(layers=layers)
    key = hashlib.sha256(bytes(held)).hexdigest()
    keys: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(keys, key, group=group)
    rank = dist.get_rank(group)
    replicas = [keys[:place].count(each) for place, each in enumerate(keys)]
    return Share(
        layers=layers,
        stages=len(keys) // keys.count(key),
        replica=replicas[rank],
        tells_scalars=rank == replicas.index(replicas[rank]),
        tells_texts=held[-1],
        group=dist.new_group(backend="gloo", timeout=_PATIENCE),
    )


def handed_in(mine: Any, group: Any) -> list[Any]:
    """What every process of `group` hands in, on its first one; nothing on the others."""
    first = dist.get_rank(group) == 0
    told: list[Any] | None = [None] * dist.get_world_size(group) if first else None
    dist.gather_object(mine, told, dst=dist.get_global_rank(group, 0), group=group)
    return told or []
