"""Router losses against their closed forms and against transformers' functions."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from model.config import RouterConfig
from model.losses import balance_losses, expert_counts, routing_probabilities, z_losses
from model.router import Routing

SOFTMAX = RouterConfig()


def _routing(tokens: int, experts: int, top_k: int, seed: int = 0) -> Routing:
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2
    weights_TK, ids_TK = logits_TE.softmax(dim=-1).topk(top_k, dim=-1)
    return Routing(logits_TE.requires_grad_(), weights_TK, ids_TK)


def test_balance_is_one_when_the_load_is_even() -> None:
    logits_LTE = torch.zeros(1, 12, 4)
    torch.testing.assert_close(
        balance_losses(SOFTMAX, logits_LTE, torch.tensor([[6, 6, 6, 6]])), torch.ones(1)
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_is_e_over_k_when_k_experts_get_everything(top_k: int) -> None:
    logits_LTE = torch.full((1, 10, 6), -1e4)
    logits_LTE[..., :top_k] = 0
    counts_LE = torch.tensor([[10] * top_k + [0] * (6 - top_k)])
    torch.testing.assert_close(balance_losses(SOFTMAX, logits_LTE, counts_LE), torch.tensor([6 / top_k]))


def test_balance_of_each_layer_equals_transformers_for_that_layer_alone() -> None:
    routings = [_routing(30, 5, 2, seed) for seed in range(3)]
    logits_LTE = torch.stack([routing.logits_TE for routing in routings])
    balance_L = balance_losses(SOFTMAX, logits_LTE, expert_counts(routings))
    for layer, routing in enumerate(routings):
        theirs = load_balancing_loss_func((routing.logits_TE,), num_experts=5, top_k=2) / 2
        torch.testing.assert_close(balance_L[layer], theirs)
        (ours_grad,) = torch.autograd.grad(balance_L[layer], routing.logits_TE, retain_graph=True)
        (their_grad,) = torch.autograd.grad(theirs, routing.logits_TE)
        torch.testing.assert_close(ours_grad, their_grad)


def test_z_of_each_layer_equals_switch_transformers() -> None:
    logits_LTE = torch.randn(3, 14, 5, generator=torch.Generator().manual_seed(0)) * 3
    for layer, value in enumerate(z_losses(logits_LTE)):
        torch.testing.assert_close(value, router_z_loss_func(logits_LTE[layer].view(2, 7, 5)))


def test_padding_counts_for_nothing() -> None:
    full, valid_T = _routing(20, 5, 2), torch.arange(20) % 3 != 0
    kept = Routing(*(part[valid_T] for part in full[:3]))
    counts_LE, kept_LE = expert_counts([full], valid_T), expert_counts([kept])
    assert torch.equal(counts_LE, kept_LE)
    assert int(counts_LE.sum()) == 2 * int(valid_T.sum())
    torch.testing.assert_close(
        balance_losses(SOFTMAX, full.logits_TE[None], counts_LE, valid_T),
        balance_losses(SOFTMAX, kept.logits_TE[None], kept_LE),
    )
    torch.testing.assert_close(z_losses(full.logits_TE[None], valid_T), z_losses(kept.logits_TE[None]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk"])
def test_probabilities_sum_to_one_and_keep_the_ranking(score: str) -> None:
    logits_TE = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    probs_TE = routing_probabilities(RouterConfig(score=score), logits_TE)  # type: ignore[arg-type]
    torch.testing.assert_close(probs_TE.sum(dim=-1), torch.ones(9))
    assert torch.equal(probs_TE.argsort(dim=-1), logits_TE.argsort(dim=-1))


def test_balance_gradient_pushes_the_overloaded_expert_down() -> None:
    logits_LTE = torch.zeros(1, 8, 4, requires_grad=True)
    balance_losses(SOFTMAX, logits_LTE, torch.tensor([[10, 2, 2, 2]])).sum().backward()
    assert logits_LTE.grad is not None
    assert bool((logits_LTE.grad[..., 0] > 0).all())
    assert bool((logits_LTE.grad[..., 1:] < 0).all())
