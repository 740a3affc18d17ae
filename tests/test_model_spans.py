"""A model that runs a part of its blocks: one part behind the other is the whole model, losses and gradients too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.expert_config import RouterConfig
from model.lm import ModelOutput, MoELanguageModel
from model.router_draws import DrawSource

SHAPE = {
    "vocab_size": 11,
    "dim": 8,
    "num_layers": 5,
    "num_heads": 2,
    "max_seq_len": 7,
    "num_experts": 3,
    "top_k": 2,
    "expert_dim": 6,
    "first_dense_layers": 1,
}


def parts_of(model: MoELanguageModel, cuts: list[int]) -> list[MoELanguageModel]:
    """Copies that run the blocks between two cuts each."""
    parts = []
    for first, stop in zip([0, *cuts], [*cuts, model.config.num_layers], strict=True):
        part = copy.deepcopy(model)
        part.model.span = range(first, stop)
        parts.append(part)
    return parts


def losses_of(output: ModelOutput) -> Tensor:
    return output.aux["z"].sum() + output.aux["balance"].sum()


@pytest.mark.parametrize("cuts", [[2], [1, 4]])
@pytest.mark.parametrize("router", [RouterConfig(), RouterConfig(router_noise="gumbel", router_jitter=0.1)])
def test_parts_behind_each_other_are_the_whole_model(cuts: list[int], router: RouterConfig) -> None:
    torch.manual_seed(0)
    model = MoELanguageModel(ModelConfig(**SHAPE, router=router))  # type: ignore[arg-type]
    ids_BS, labels_BS = torch.randint(11, (3, 7)), torch.randint(11, (3, 7))
    parts = parts_of(model, cuts)
    whole = model(ids_BS, labels_BS)
    torch.stack([whole.ce, losses_of(whole)]).sum().backward()  # type: ignore[list-item]

    passed_on: Tensor | None = None
    outputs: list[ModelOutput] = []
    for part in parts:
        outputs.append(part(ids_BS, labels_BS, passed_on_BSD=passed_on))
        passed_on = outputs[-1].passed_on_BSD
    assert [each.ce is None for each in outputs[:-1]] == [True] * len(cuts)
    last = outputs[-1]
    assert last.ce is not None
    assert whole.ce is not None
    assert last.token_loss_BS is not None
    assert whole.token_loss_BS is not None
    assert torch.equal(last.ce, whole.ce)
    assert torch.equal(last.token_loss_BS, whole.token_loss_BS)
    for name in ("z", "balance"):
        assert torch.equal(torch.cat([each.aux[name] for each in outputs]), whole.aux[name])
    assert torch.equal(torch.cat([each.expert_counts_LE for each in outputs]), whole.expert_counts_LE)
    torch.stack([last.ce, *(losses_of(each) for each in outputs)]).sum().backward()
    for name, weight in model.named_parameters():
        found = [part.get_parameter(name).grad for part in parts]
        mine = next((gradient for gradient in found if gradient is not None), None)
        assert (mine is None) == (weight.grad is None), name
        assert mine is None or torch.equal(mine, weight.grad), name


def test_ranks_of_one_number_draw_alike() -> None:
    router = RouterConfig(router_noise="gumbel")
    config = ModelConfig(**SHAPE, router=router)  # type: ignore[arg-type]
    first, second = DrawSource(config), DrawSource(config)
    first.rank, second.rank = 3, 3
    assert drawn(first).equal(drawn(second))
    first.rank, second.rank = 3, 4
    assert not drawn(first).equal(drawn(second))


def drawn(source: DrawSource) -> Tensor:
    noise_TE = source(5, torch.device("cpu"))[0].noise_TE
    assert noise_TE is not None
    return noise_TE
