"""The state of a whole model from its stages, and back: checkpoints of a pipeline are those of a single process.

So a run may go on with another number of stages, or none. Parameters are numbered as an optimizer of the whole model
would do; the first rank asks one stage after the other, and holds at most the whole and one stage more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from trainer.pipeline_layout import Layout

Names = list[list[str]]
"""Parameters of each group of an optimizer, in order."""


def joined(mine: Any, layout: Layout) -> list[Any]:
    """What the stages of the first replica hand in, in their order, on the first rank; nothing on the others.

    Every rank of that replica must call it. Tensors must be on the CPU.
    """
    if layout.replica > 0:
        return []
    if layout.rank > 0:
        dist.send_object_list([mine], dst=0, device=torch.device("cpu"))
        return []
    told = [mine]
    for rank in layout.chain(0)[1:]:
        box = [None]
        dist.recv_object_list(box, src=rank, device=torch.device("cpu"))
        told += box
    return told


def on_cpu(value: Any) -> Any:
    """The same with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: on_cpu(each) for key, each in value.items()}
    return value


def merged(parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One mapping; what two stages hold is the first one's."""
    return {name: value for part in reversed(parts) for name, value in part.items()}


def optimizer_part(state: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """A stage's `optimizer.state_dict()` by the names of parameters, to be merged with others'.

    Args:
        names: of that optimizer's groups.
    """
    order = [name for group in names for name in group]
    return {
        "state": {order[number]: on_cpu(values) for number, values in state["state"].items()},
        "groups": [
            ({key: value for key, value in group.items() if key != "params"}, members)
            for group, members in zip(state["param_groups"], names, strict=True)
        ],
    }


def whole_optimizer(parts: list[dict[str, Any]], names: Names) -> dict[str, Any]:
    """What the optimizer of the whole model would save.

    Args:
        parts: of all stages.
        names: of the whole optimizer's groups.
    """
    options = {member: group for part in parts for group, members in part["groups"] for member in members}
    states = merged([part["state"] for part in parts])
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    return {
        "state": {numbers[name]: states[name] for name in numbers if name in states},
        "param_groups": [
            {**options[group[0]], "params": [numbers[name] for name in group]} for group in names
        ],
    }


def part_of_optimizer(whole: Mapping[str, Any], names: Names, mine: Names) -> dict[str, Any]:
    """The inverse: what a stage's optimizer loads.

    Args:
        whole: what was saved.
        names: of the whole optimizer's groups.
        mine: of this stage's.
    """
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    groups = {
        name: group for group, members in zip(whole["param_groups"], names, strict=True) for name in members
    }
    order = [name for group in mine for name in group]
    place = {name: number for number, name in enumerate(order)}
    return {
        "state": {
            place[name]: whole["state"][numbers[name]] for name in order if numbers[name] in whole["state"]
        },
        "param_groups": [{**groups[group[0]], "params": [place[name] for name in group]} for group in mine],
    }
