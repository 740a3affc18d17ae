"""Every parameter is optimized once; matrices decay, vectors do not; balance losses have their weights."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.lm import MoELanguageModel
from trainer.balance import training_loss
from trainer.config import BalanceConfig, OptimConfig
from trainer.muon import MOMENTUM, orthogonalised
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


def muon_config(**changes: float) -> OptimConfig:
    return OptimConfig(optimizer="muon", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 4, 7), (6, 6)])
def test_muon_turns_every_expert_of_a_stack_as_torch_turns_a_matrix(shape: tuple[int, ...]) -> None:
    """Five steps of one stack against torch.optim.Muon on each of its slices."""
    generator = torch.Generator().manual_seed(0)
    stack = nn.Parameter(torch.randn(shape, generator=generator))
    slices = [nn.Parameter(each.clone()) for each in stack.detach().reshape(-1, *shape[-2:])]
    ours = build_optimizer([("layers.0.mlp.experts.down_proj", stack)], muon_config(weight_decay=0.3))
    theirs = torch.optim.Muon(slices, weight_decay=0.3, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        stack.grad = torch.randn(shape, generator=generator)
        for each, gradient in zip(slices, stack.grad.reshape(-1, *shape[-2:]), strict=True):
            each.grad = gradient.clone()
        for optimizer in (ours, theirs):
            set_learning_rate(optimizer, 0.1 / (step + 1))
            optimizer.step()
    expected = torch.stack([each.detach() for each in slices]).view(shape)
    # Equal on most machines; a batched product may round bfloat16 otherwise than a single one.
    torch.testing.assert_close(stack.detach(), expected, rtol=0, atol=2e-2)
    assert (stack.detach() - torch.randn(shape, generator=torch.Generator().manual_seed(0))).abs().max() > 0.1


def test_muon_brings_singular_values_together() -> None:
    matrices = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(matrices).float())
    assert values.min() > 0.4
    assert values.max() < 1.6
    assert torch.linalg.svdvals(matrices).amax() > 4


def test_muon_leaves_embeddings_routers_and_vectors_to_adamw() -> None:
    config = ModelConfig(vocab_size=20, dim=8, num_layers=2, num_heads=2, num_experts=4, expert_dim=6)
    model = MoELanguageModel(config)
    groups = parameter_groups(model.named_parameters(), 0.1, muon=True)
    names = {id(weight): name for name, weight in model.named_parameters()}
    (turned,) = [group for group in groups if group.get("muon")]
    assert {names[id(weight)].split(".", 3)[-1] for weight in turned["params"]} == {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_adamw_of_a_muon_optimizer_is_adamw() -> None:
    vector, twin = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    ours = build_optimizer([("norm.weight", vector)], muon_config())
    theirs = build_optimizer([("norm.weight", twin)], OptimConfig())
    for optimizer in (ours, theirs):
        for weight in (vector, twin):
            weight.grad = torch.tensor([5.0, -0.1, 2.0])
        optimizer.step()
    assert torch.equal(vector, twin)


def test_losses_of_the_router_and_of_domains_count_where_the_model_has_them() -> None:
    aux = {
        "balance": torch.zeros(2),
        "z": torch.zeros(2),
        "orthogonality": torch.tensor([1.0, 2.0]),
        "contrastive": torch.tensor(5.0),
        "mtp": torch.tensor(4.0),
    }
    config = BalanceConfig(orthogonality_coef=0.5, contrastive_coef=0.1, mtp_coef=0.25)
    assert training_loss(Output(torch.tensor(2.0), aux), config).item() == pytest.approx(2 + 1.5 + 0.5 + 1)  # type: ignore[arg-type]
