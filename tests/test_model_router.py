"""Laws of routing that no twin can show: what the bias may touch, precision, the update rule."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig, RouterConfig
from model.lm import MoELanguageModel
from model.router import TopKRouter, keep_top_groups, routers, update_selection_bias


def _router(score: str = "sigmoid", **values: object) -> TopKRouter:
    router = RouterConfig(score=score, selection_bias=True, **values)  # type: ignore[arg-type]
    module = TopKRouter(ModelConfig(dim=8, num_heads=2, num_experts=6, top_k=3, router=router))
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    return module


def _tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk"])
def test_slots_fall_by_score_and_experts_differ(score: str) -> None:
    routing = _router(score)(_tokens())
    assert bool((routing.weights_TK.diff(dim=-1) <= 0).all())
    assert all(len(set(row)) == 3 for row in routing.expert_ids_TK.tolist())
    torch.testing.assert_close(routing.weights_TK.sum(dim=-1), torch.ones(40))


def test_bias_changes_who_is_chosen_and_not_what_they_weigh() -> None:
    router = _router(norm_topk=False)
    before = router(_tokens())
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias[4] = 2.0  # above any sigmoid: always chosen, first
    after = router(_tokens())
    assert bool((after.expert_ids_TK[:, 0] == 4).all())
    assert not bool((before.expert_ids_TK[:, 0] == 4).all())
    torch.testing.assert_close(after.logits_TE, before.logits_TE)
    torch.testing.assert_close(after.weights_TK, after.logits_TE.sigmoid().gather(1, after.expert_ids_TK))


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_experts_come_from_the_best_groups(group_score: str) -> None:
    router = RouterConfig(num_groups=3, top_groups=2, group_score=group_score)  # type: ignore[arg-type]
    choice_TE = torch.rand(30, 9, generator=torch.Generator().manual_seed(3))
    for row, kept in zip(choice_TE.tolist(), keep_top_groups(router, choice_TE), strict=True):
        groups = [sorted(row[start : start + 3], reverse=True) for start in (0, 3, 6)]
        ranks = [group[0] if group_score == "max" else group[0] + group[1] for group in groups]
        worst = ranks.index(min(ranks))
        expected = torch.tensor(row)
        expected[3 * worst : 3 * worst + 3] = float("-inf")
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_float32_in_a_bfloat16_model(autocast: bool) -> None:
    router = _router().to(torch.bfloat16)
    x_TD = _tokens().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routing = router(x_TD)
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.logits_TE, x_TD.float() @ router.weight.float().t())


def test_bias_stays_float32_when_the_model_is_cast() -> None:
    router = _router()
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.fill_(1 + 2**-20)  # bfloat16 would round this to 1
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert bool((router.e_score_correction_bias == 1 + 2**-20).all())
    assert "e_score_correction_bias" in router.state_dict()


def _model(*, bias: bool = True) -> MoELanguageModel:
    router = RouterConfig(score="sigmoid", selection_bias=bias)
    shape = {"vocab_size": 11, "dim": 8, "num_layers": 3, "num_heads": 2, "first_dense_layers": 1}
    return MoELanguageModel(ModelConfig(**shape, num_experts=4, expert_dim=4, router=router))


@pytest.mark.parametrize("recenter", [False, True])
def test_update_follows_the_rule(recenter: bool) -> None:
    model = _model()
    counts_LE = torch.tensor([[10, 2, 6, 6], [0, 0, 0, 40]])
    update_selection_bias(model, counts_LE, 0.5, recenter=recenter)
    update_selection_bias(model, counts_LE, 0.25, recenter=recenter)
    expected = torch.tensor([[-0.75, 0.75, 0, 0], [0.75, 0.75, 0.75, -0.75]])
    if recenter:
        expected = expected - expected.mean(dim=-1, keepdim=True)
    actual = torch.stack([router.e_score_correction_bias for router in routers(model)])  # type: ignore[misc]
    torch.testing.assert_close(actual, expected)


def test_update_evens_out_a_lopsided_router() -> None:
    torch.manual_seed(0)
    model = _model()
    with torch.no_grad():
        for router in routers(model):
            router.weight.normal_(std=3)
    ids_BS = torch.randint(11, (8, 16))

    def worst() -> float:
        counts_LE = model(ids_BS).expert_counts_LE
        return float((counts_LE.max(dim=-1).values / counts_LE.float().mean(dim=-1)).max())

    before = worst()
    for _ in range(200):
        update_selection_bias(model, model(ids_BS).expert_counts_LE, 0.01)
    assert worst() < 1 + (before - 1) / 2


def test_update_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="no selection bias; build it with"):
        update_selection_bias(_model(bias=False), torch.zeros(2, 4), 0.1)
    with pytest.raises(ValueError, match="2 MoE layers of 4 experts"):
        update_selection_bias(_model(), torch.zeros(3, 4), 0.1)
