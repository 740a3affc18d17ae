"""Every parameter is optimized once; matrices decay, vectors do not; balance losses have their weights."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trainer.balance import training_loss
from trainer.config import BalanceConfig, OptimConfig
from trainer.optim import build_optimizer, parameter_groups, set_learning_rate


class Tied(nn.Module):
    """A stack of matrices, a vector, a frozen matrix, and one weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 3, 2))
        self.norm = nn.Parameter(torch.ones(3))
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = Tied()
    groups = parameter_groups(model.named_parameters(), 0.3)
    ids = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(ids) == sorted(id(weight) for weight in (model.experts, model.norm, model.embed.weight))


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Tied()
    decay = {
        id(weight): group["weight_decay"]
        for group in parameter_groups(model.named_parameters(), 0.3)
        for weight in group["params"]
    }
    assert decay[id(model.experts)] == decay[id(model.embed.weight)] == 0.3
    assert decay[id(model.norm)] == 0.0


def test_a_step_without_gradient_signal_shrinks_matrices_by_the_decay_alone() -> None:
    model = Tied()
    before = model.experts.detach().clone()
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(model.experts, before * (1 - 0.1 * 0.5))
    assert torch.equal(model.norm, torch.ones(3))


def test_the_first_adamw_step_is_the_sign_of_the_gradient_times_the_rate() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = build_optimizer([("w", weight)], OptimConfig(adam_eps=1e-12))
    set_learning_rate(optimizer, 0.01)
    weight.grad = torch.tensor([5.0, -0.1, 2.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.99, -1.99, 2.99]))


class Output(NamedTuple):
    ce: Tensor | None
    aux: dict[str, Tensor]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BalanceConfig(balance="none", z_coef=0.0), 2.0),
        (BalanceConfig(balance="none", z_coef=0.1), 2.0 + 0.1 * 7),
        (BalanceConfig(balance="bias", z_coef=0.1), 2.0 + 0.1 * 7),
        (BalanceConfig(balance="aux", aux_coef=0.5, z_coef=0.1), 2.0 + 0.5 * 3 + 0.1 * 7),
        (BalanceConfig(balance="aux", aux_coef=0.0, z_coef=0.0), 2.0),
    ],
)
def test_the_training_loss_adds_what_the_config_asks_for(config: BalanceConfig, expected: float) -> None:
    output = Output(torch.tensor(2.0), {"balance": torch.tensor([1.0, 2.0]), "z": torch.tensor([3.0, 4.0])})
    assert training_loss(output, config).item() == pytest.approx(expected)  # type: ignore[arg-type]


def test_a_model_without_experts_trains_on_cross_entropy_alone() -> None:
    output = Output(torch.tensor(2.0), {"balance": torch.empty(0), "z": torch.empty(0)})
    assert training_loss(output, BalanceConfig(balance="aux")).item() == 2.0  # type: ignore[arg-type]
