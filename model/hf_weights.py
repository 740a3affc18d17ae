"""Where each number of a checkpoint stands in our model: one table, read in both directions.

Most tensors have the same name and layout on both sides. Experts differ: hubs keep a matrix for each expert,
or stacks in an order of their own, where we have two stacks. A `Piece` pairs a part of a tensor there with a
part of a tensor here that holds the same numbers in the same order, so loading and saving cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Size, Tensor

from model.hf_config import Family

View = Callable[[Tensor], Tensor]


def _whole(tensor: Tensor) -> Tensor:
    return tensor


class Piece(NamedTuple):
    """`of_hub(hub tensor)` equals `of_ours(our tensor)`; both are views."""

    hub: str
    hub_shape: Size
    ours: str
    of_hub: View = _whole
    of_ours: View = _whole


def pieces(
    family: Family, shapes: Mapping[str, Size], *, stacked: bool = False, bare: bool = False
) -> list[Piece]:
    """The whole table for a model.

    Args:
        family: whose names and layouts.
        shapes: of our state dict, a tied output matrix left out.
        stacked: experts in two stacks as transformers keeps them in memory, for checkpoints saved so.
        bare: names without the family's prefix, for checkpoints saved so.
    """
    table: list[Piece] = []
    for name, shape in shapes.items():
        hub = family.hub_name(name)
        if bare:
            hub = hub.removeprefix(family.prefix)
        if family.transposed:
            table.append(_input_first(hub, name, shape))
        elif ".mlp.experts." not in name:
            table.append(Piece(hub, shape, name))
        elif family.interleaved_experts:
            table += _interleaved(hub, name, shape)
        elif stacked:
            table.append(Piece(name, shape, name))
        else:
            table += _numbered(hub, name, shape, family.expert_names)
    return table


def _input_first(hub: str, name: str, shape: Size) -> Piece:
    """GPT-2's matrices of blocks, [in, out]; those of queries, keys and values stand side by side in one."""
    part = next((at for at, each in enumerate(("q_proj", "k_proj", "v_proj")) if each in name), None)
    columns = slice(None) if part is None else slice(part * shape[0], (part + 1) * shape[0])
    width = shape[0] if part is None else 3 * shape[0]
    if len(shape) == 1:
        return Piece(hub, Size((width,)), name, of_hub=lambda row: row[columns])
    if "_proj" not in name:
        return Piece(hub, shape, name)
    return Piece(hub, Size((shape[1], width)), name, of_hub=lambda matrix: matrix[:, columns].t())


def _numbered(hub: str, name: str, shape: Size, names: tuple[str, str, str]) -> Iterator[Piece]:
    """`experts.3.gate_proj.weight` and so on, `names` for gate, up and down."""
    gate, up, down = names
    stem = hub.rpartition(".")[0]
    for expert in range(shape[0]):
        if name.endswith("down_proj"):
            yield Piece(f"{stem}.{expert}.{down}.weight", shape[1:], name, of_ours=_expert(expert))
            continue
        half = shape[1] // 2
        for part, rows in ((gate, slice(0, half)), (up, slice(half, None))):
            hub_shape = Size((half, shape[2]))
            yield Piece(f"{stem}.{expert}.{part}.weight", hub_shape, name, of_ours=_expert(expert, rows))


def _expert(expert: int, rows: slice = slice(None)) -> View:
    return lambda stack_EXY: stack_EXY[expert, rows]


def _interleaved(hub: str, name: str, shape: Size) -> Iterator[Piece]:
    """GPT-OSS: matrices transposed, gate and up in turns along the last axis, biases alike."""
    matrix = len(shape) == 3
    hub_shape = Size((shape[0], shape[2], shape[1])) if matrix else shape
    if ".down_proj" in name:
        yield Piece(hub, hub_shape, name, of_ours=_turned if matrix else _whole)
        return
    half = shape[1] // 2
    for first, rows in ((0, slice(0, half)), (1, slice(half, None))):
        yield Piece(hub, hub_shape, name, _every_second(first), _turned_rows(rows, matrix))


def _turned(stack_EXY: Tensor) -> Tensor:
    return stack_EXY.transpose(1, 2)


def _every_second(first: int) -> View:
    return lambda tensor: tensor[..., first::2]


def _turned_rows(rows: slice, matrix: bool) -> View:
    return lambda stack: _turned(stack[:, rows]) if matrix else stack[:, rows]
