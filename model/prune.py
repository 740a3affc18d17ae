"""Fewer or more experts in a trained model, optimizer state included.

Both are one operation: the new model's expert e is a copy of the old model's expert `sources[layer][e]`.
Leave experts out and it is pruning; name some twice and it is growth. Everything with a row for each expert
moves along: matrices, biases, router rows, the selection bias, and the optimizer's running means. An expert
that no token chose can go without a trace where gate weights are normalised over the chosen (norm_topk); and
doubling every expert together with top_k computes the same until training tells the copies apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.lm import MoELanguageModel
from model.moe import SparseMoE

COPY_NOISE = 0.1
"""Usual noise on the router rows of second copies, relative to the rows: enough for tokens to tell them apart."""

Sources = Sequence[Sequence[int]]
"""For each MoE layer the old expert that each new one is a copy of."""


def least_used_removed(counts_LE: Tensor, num_experts: int) -> list[list[int]]:
    """Sources that keep each layer's `num_experts` most used experts, in their old order.

    Raises ValueError if that is not fewer than there are, or none.
    """
    available = counts_LE.shape[1]
    if not 0 < num_experts < available:
        raise ValueError(
            f"num_experts={num_experts} is not between 1 and {available - 1}; there are {available}"
        )
    return counts_LE.topk(num_experts, dim=1).indices.sort(dim=1).values.tolist()


def most_used_doubled(counts_LE: Tensor, num_experts: int) -> list[list[int]]:
    """Sources that append second copies of each layer's most used experts, up to `num_experts` in all.

    Raises ValueError if that is not more than there are, or more than twice as many.
    """
    available = counts_LE.shape[1]
    if not available < num_experts <= 2 * available:
        raise ValueError(
            f"num_experts={num_experts} is not between {available + 1} and {2 * available}; every expert is "
            "doubled at most, grow in steps"
        )
    busiest_LX = counts_LE.topk(num_experts - available, dim=1).indices
    return [[*range(available), *row] for row in busiest_LX.tolist()]


@torch.no_grad()
def with_experts(
    model: MoELanguageModel, sources: Sources, *, top_k: int | None = None, router_noise: float = 0.0
) -> MoELanguageModel:
    """A new model whose experts are copies of `model`'s.

    Args:
        model: left as it is.
        sources: one row for each MoE layer, all of one length: the new number of experts.
        top_k: experts of a token. None: as before.
        router_noise: standard deviation of what is added to the router rows of second copies, relative to
            theirs, so that training can tell them apart.

    Raises:
        ValueError: rows that do not fit, or a number of experts that the config refuses.
    """
    config = model.config
    _check(sources, config.num_moe_layers, config.num_experts)
    chosen_per_token, dense = config.top_k, config.dense_ffn_dim
    if top_k is not None:
        # The default width of dense blocks follows top_k; theirs are trained already.
        chosen_per_token, dense = top_k, config.dense_dim
    new = replace(config, num_experts=len(sources[0]), top_k=chosen_per_token, dense_ffn_dim=dense)
    grown = MoELanguageModel(new).to(device=model.device, dtype=model.dtype)
    rows = _rows_by_name(model, sources)
    old = model.state_dict()
    grown.load_state_dict({name: _select(value, rows.get(name)) for name, value in old.items()})
    if router_noise:
        for layer, chosen in zip(_moe_layers(grown).values(), sources, strict=True):
            copies = [e for e, source in enumerate(chosen) if source in chosen[:e]]
            weight_ED = layer.gate.weight
            # From a seed of its own: every rank draws the same, and nothing else is drawn differently.
            luck_CD = torch.randn(len(copies), weight_ED.shape[1], generator=torch.Generator().manual_seed(0))
            weight_ED[copies] += router_noise * weight_ED.std() * luck_CD.to(weight_ED)
    return grown.train(model.training)


@torch.no_grad()
def carry_optimizer_state(
    old_model: MoELanguageModel,
    sources: Sources,
    old: tuple[Mapping[str, nn.Parameter], torch.optim.Optimizer],
    new: tuple[Mapping[str, nn.Parameter], torch.optim.Optimizer],
) -> None:
    """Fill the new optimizer's state from the old one's.

    Args:
        old_model: what `with_experts` was given.
        sources: what it was given.
        old: the parameters by their names in the model, and the optimizer that holds their state. With
            low-precision weights these are the masters.
        new: the same of the new model, whose optimizer has not taken a step.
    """
    rows = _rows_by_name(old_model, sources)
    (old_named, old_optimizer), (new_named, new_optimizer) = old, new
    for name, parameter in old_named.items():
        state = old_optimizer.state.get(parameter)
        if not state:
            continue
        new_optimizer.state[new_named[name]] = {
            key: _select(value, rows.get(name) if _is_like(value, parameter) else None)
            for key, value in state.items()
        }


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _select(value: Tensor, rows: list[int] | None) -> Tensor:
    """A copy of `value`, or of these of its rows; what is no tensor is passed on."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if rows is None else value.detach()[rows]


def _moe_layers(model: nn.Module) -> dict[str, SparseMoE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseMoE)}


def _rows_by_name(model: MoELanguageModel, sources: Sources) -> dict[str, list[int]]:
    """Name of everything with a row for each expert -> its new rows."""
    rows: dict[str, list[int]] = {}
    for (layer, module), chosen in zip(_moe_layers(model).items(), sources, strict=True):
        for part in ("gate", "experts"):
            names = getattr(module, part).state_dict()
            rows |= {f"{layer}.{part}.{name}": list(chosen) for name in names}
    return rows


def _check(sources: Sources, num_layers: int, num_experts: int) -> None:
    if len(sources) != num_layers or not sources:
        raise ValueError(f"sources has {len(sources)} rows for {num_layers} MoE layers; give one for each")
    lengths = {len(row) for row in sources}
    if len(lengths) > 1:
        raise ValueError(
            f"rows of sources have lengths {sorted(lengths)}; all layers have equally many experts"
        )
    wrong = [source for row in sources for source in row if not 0 <= source < num_experts]
    if wrong:
        raise ValueError(f"sources names expert {wrong[0]}, but there are {num_experts}, counted from 0")
