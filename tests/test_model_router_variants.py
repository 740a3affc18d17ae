"""Noise, capacity, expert choice, forced routing: each against a loop that spells the rule out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.capacity import capacity_of, keep_within_capacity
from model.config import ModelConfig, RouterConfig
from model.experts import GroupedExperts
from model.lm import MoELanguageModel
from model.router import TopKRouter, forced_routing, orthogonality_loss
from moeviz.capture.adapters.named_tuple import find_router

VOCAB = 23


def _model(*, experts: int = 4, top_k: int = 2, **router: Any) -> MoELanguageModel:
    config = ModelConfig(
        vocab_size=VOCAB,
        dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=32,
        num_experts=experts,
        top_k=top_k,
        expert_dim=8,
        router=RouterConfig(**router),
    )
    torch.manual_seed(0)
    model = MoELanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def _ids(batch: int = 3, length: int = 12) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


NOISY: list[dict[str, Any]] = [
    {"router_noise": "shazeer"},
    {"router_noise": "gumbel"},
    {"router_jitter": 0.3},
    {"expert_dropout": 0.5},
]


@pytest.mark.parametrize("router", NOISY, ids=lambda r: next(iter(r)))
def test_chance_is_for_training_only_and_goes_on_after_a_resume(router: dict[str, Any]) -> None:
    model, ids_BS = _model(**router), _ids()
    model.eval()
    assert torch.equal(model(ids_BS).logits_BSV, model(ids_BS).logits_BSV)
    model.train()
    first = model(ids_BS).logits_BSV
    state = model.state_dict()
    second, third = model(ids_BS).logits_BSV, model(ids_BS).logits_BSV
    assert not torch.equal(first, second)
    resumed = _model(**router).train()
    resumed.load_state_dict(state)
    torch.manual_seed(99)
    assert torch.equal(resumed(ids_BS).logits_BSV, second)
    assert torch.equal(resumed(ids_BS).logits_BSV, third)


@pytest.mark.parametrize("router", NOISY, ids=lambda r: next(iter(r)))
def test_recomputed_blocks_meet_the_same_chance(router: dict[str, Any]) -> None:
    grads = []
    for recompute in (False, True):
        model = _model(**router).train()
        if recompute:
            model.gradient_checkpointing_enable()
        output = model(_ids(), _ids())
        (output.ce + output.aux["balance"].sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_shazeer_noise_has_the_size_that_the_router_learns() -> None:
    model = _model(router_noise="shazeer", noise_scale=0.5)
    router = model.model.layers[0].mlp.gate
    assert model.model.draws is not None
    x_TD = torch.ones(4000, 16)
    noisy_TE = router(x_TD, model.model.draws(4000, x_TD.device)[0]).logits_TE
    clean_E = x_TD[0] @ router.weight.t()
    size_E = 0.5 * torch.nn.functional.softplus(x_TD[0] @ router.noise_weight.t())
    torch.testing.assert_close(noisy_TE.mean(0), clean_E, rtol=0, atol=0.1)
    torch.testing.assert_close(noisy_TE.std(0), size_E, rtol=0.05, atol=0)
    noisy_TE.sum().backward()
    assert router.noise_weight.grad is not None


def test_gumbel_noise_samples_from_the_softmax() -> None:
    model = _model(top_k=1, router_noise="gumbel")
    router = model.model.layers[0].mlp.gate
    assert model.model.draws is not None
    x_TD = torch.full((20_000, 16), 0.3)
    ids_TK = router(x_TD, model.model.draws(20_000, x_TD.device)[0]).expert_ids_TK
    expected_E = (x_TD[0] @ router.weight.t()).softmax(0)
    torch.testing.assert_close(
        ids_TK.flatten().bincount(minlength=4) / 20_000, expected_E, rtol=0, atol=0.015
    )


def test_experts_that_are_off_are_never_chosen_and_enough_stay_on() -> None:
    model = _model(experts=6, top_k=3, expert_dropout=0.7)
    assert model.model.draws is not None
    off_counts = []
    for _ in range(60):
        draws = model.model.draws(5, torch.device("cpu"))[0]
        routing = model.model.layers[0].mlp.gate(torch.randn(5, 16), draws)
        assert draws.off_E is not None
        off = set(draws.off_E.nonzero().flatten().tolist())
        assert len(off) <= 3
        assert off.isdisjoint(routing.expert_ids_TK.flatten().tolist())
        off_counts.append(len(off))
    assert max(off_counts) == 3
    assert min(off_counts) < 3


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 6), (1.25, 8), (0.01, 1), (99.0, 12)])
def test_capacity_is_a_share_of_a_sequence(factor: float, expected: int) -> None:
    assert capacity_of(12, 2, 4, factor) == expected


@pytest.mark.parametrize("order", ["position", "prob"])
def test_capacity_keeps_what_a_loop_keeps(order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_BSK = torch.rand(3, 10, 4, generator=generator).argsort(-1)[..., :2]
    weights_BSK = torch.rand(3, 10, 2, generator=generator)
    valid_BS = torch.rand(3, 10, generator=generator) > 0.2
    kept_BSK = keep_within_capacity(ids_BSK, weights_BSK, 4, 3, order, valid_BS)  # type: ignore[arg-type]
    for b in range(3):
        slots = [(s, k) for s in range(10) if valid_BS[b, s] for k in range(2)]
        if order == "prob":
            slots.sort(key=lambda slot: -float(weights_BSK[b, slot[0], slot[1]]))
        room, expected = [3] * 4, torch.zeros(10, 2, dtype=torch.bool)
        for s, k in slots:
            expert = int(ids_BSK[b, s, k])
            if room[expert]:
                room[expert] -= 1
                expected[s, k] = True
        assert torch.equal(kept_BSK[b], expected)


def test_dropped_slots_add_nothing_and_get_no_gradient() -> None:
    config = ModelConfig(dim=8, num_heads=2, num_experts=4, expert_dim=6)
    experts = GroupedExperts(config).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.rand(9, 4, generator=generator).argsort(-1)[:, :2]
    kept_TK = torch.rand(9, 2, generator=generator) > 0.4
    x_TD = torch.randn(9, 8, dtype=torch.float64, generator=generator).requires_grad_()
    weights_TK = torch.rand(9, 2, dtype=torch.float64, generator=generator).requires_grad_()
    leaves = [x_TD, weights_TK, *experts.parameters()]
    masked_TK = weights_TK * kept_TK
    skipped, computed = experts(x_TD, ids_TK, masked_TK, kept_TK), experts(x_TD, ids_TK, masked_TK)
    torch.testing.assert_close(skipped, computed)
    upstream = torch.sin(torch.arange(72.0, dtype=torch.float64)).view(9, 8)
    for one, other in zip(
        torch.autograd.grad(skipped, leaves, upstream, retain_graph=True),
        torch.autograd.grad(computed, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_a_capacity_limits_training_and_not_evaluation() -> None:
    model = _model(capacity_factor=0.5)
    gate = model.model.layers[0].mlp.gate
    x_BSD = torch.randn(2, 12, 16)
    routing = gate.train()(x_BSD)
    assert routing.kept_TK is not None
    assert not bool(routing.weights_TK[~routing.kept_TK].any())
    assert bool((routing.weights_TK[routing.kept_TK] > 0).all())
    for b in range(2):
        rows = slice(12 * b, 12 * b + 12)
        taken_E = routing.expert_ids_TK[rows][routing.kept_TK[rows]].bincount(minlength=4)
        assert int(taken_E.max()) <= 3
    assert gate.eval()(x_BSD).kept_TK is None


def test_experts_choose_their_best_tokens() -> None:
    gate = _model(chooser="expert").model.layers[0].mlp.gate
    x_BSD = torch.randn(2, 12, 16)
    routing = gate(x_BSD)
    scores_TE = (x_BSD.flatten(0, 1) @ gate.weight.t()).softmax(-1)
    expected_TE = torch.zeros_like(scores_TE)
    for b in range(2):
        for expert in range(4):
            column = scores_TE[12 * b : 12 * b + 12, expert]
            for position in sorted(range(12), key=lambda s: -float(column[s]))[:6]:
                expected_TE[12 * b + position, expert] = column[position]
    actual_TE = torch.zeros_like(scores_TE).scatter(1, routing.expert_ids_TK, routing.weights_TK)
    torch.testing.assert_close(actual_TE, expected_TE)


def test_experts_take_even_loads_and_no_padding() -> None:
    model, ids_BS = _model(chooser="expert"), _ids(2, 12)
    assert model(ids_BS).expert_counts_LE.tolist() == [[12] * 4] * 2
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :10] = 0  # two tokens are left, fewer than the six that an expert takes
    assert model(ids_BS, attention_mask_BS=mask_BS).expert_counts_LE.tolist() == [[8] * 4] * 2


def _prefix_moves(model: MoELanguageModel) -> bool:
    """Whether another ending changes what comes before it."""
    ids_BS = _ids(2, 16)
    other_BS = ids_BS.clone()
    other_BS[:, 10:] = (other_BS[:, 10:] + 5) % VOCAB
    with torch.no_grad():
        before, after = model(ids_BS).logits_BSV[:, :10], model(other_BS).logits_BSV[:, :10]
    # Not to the bit: how many rows an expert multiplies at once may change the last digit.
    return not torch.allclose(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("router", "causal"),
    [
        ({}, True),
        ({"capacity_factor": 0.7}, True),
        ({"capacity_factor": 0.7, "drop_order": "prob"}, False),
        ({"chooser": "expert"}, False),
        ({"force_balanced": True}, True),
        ({"score": "sigmoid", "num_groups": 2, "top_groups": 1, "selection_bias": True}, True),
    ],
    ids=str,
)
def test_configs_that_claim_causality_have_it_and_others_do_not(router: dict[str, Any], causal: bool) -> None:
    model = _model(**router).train()
    assert model.config.is_causal() is causal
    assert _prefix_moves(model) is not causal


def test_forced_balance_is_even() -> None:
    counts_LE = _model(force_balanced=True)(_ids(3, 12)).expert_counts_LE
    assert counts_LE.tolist() == [[18] * 4] * 2


def test_a_replayed_routing_gives_the_same_logits_whatever_the_router_would_choose() -> None:
    model, ids_BS = _model(), _ids()
    gates = [layer.mlp.gate for layer in model.model.layers]
    seen: list[Tensor] = []
    handles = [g.register_forward_hook(lambda m, a, out: seen.append(out.expert_ids_TK)) for g in gates]
    expected = model(ids_BS).logits_BSV
    for handle in handles:
        handle.remove()
    with forced_routing(model, seen):
        torch.testing.assert_close(model(ids_BS).logits_BSV, expected)
    shifted = [(ids_TK + 1) % 4 for ids_TK in seen]
    with forced_routing(model, shifted):
        assert not torch.allclose(model(ids_BS).logits_BSV, expected)
    assert torch.equal(model(ids_BS).logits_BSV, expected)
    with (
        pytest.raises(ValueError, match="1 layers of expert ids for 2 MoE layers"),
        forced_routing(model, seen[:1]),
    ):
        pass


def test_orthogonality_is_zero_for_orthonormal_rows_and_counts_what_is_off() -> None:
    rows = torch.linalg.qr(torch.randn(6, 4)).Q.t()
    assert float(orthogonality_loss(rows)) < 1e-5
    torch.testing.assert_close(orthogonality_loss(2 * torch.eye(3, 5)), torch.tensor(9.0))
    model = _model(orthogonality=True)
    loss_L = model(_ids(), _ids()).aux["orthogonality"]
    expected = [orthogonality_loss(layer.mlp.gate.weight) for layer in model.model.layers]
    torch.testing.assert_close(loss_L, torch.stack(expected))
    loss_L.sum().backward()
    assert isinstance(model.model.layers[0].mlp.gate, TopKRouter)
    assert model.model.layers[0].mlp.gate.weight.grad is not None


def test_balance_within_sequences_is_the_mean_over_them() -> None:
    model, ids_BS = _model(balance_scope="sequence").train(), _ids()
    micro = _model().train()
    each = [micro(ids_BS[b : b + 1], ids_BS[b : b + 1]).aux["balance"] for b in range(3)]
    torch.testing.assert_close(model(ids_BS, ids_BS).aux["balance"], torch.stack(each).mean(0))


def test_global_balance_does_not_depend_on_how_a_batch_is_cut() -> None:
    model, ids_BS = _model(balance_scope="global").train(), _ids(4)
    whole = model(ids_BS, ids_BS)
    parts = [ids_BS[:2], ids_BS[2:]]
    counts = [model(part).expert_counts_LE for part in parts]
    cut = [model(part, part, counts_so_far_LE=counts[1 - n]).aux["balance"] for n, part in enumerate(parts)]
    torch.testing.assert_close(torch.stack(cut).mean(0), whole.aux["balance"])
    alone = [model(part, part).aux["balance"] for part in parts]
    assert not torch.allclose(torch.stack(alone).mean(0), whole.aux["balance"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router_jitter": 1.0}, r"must be in \[0, 1\)"),
        ({"capacity_factor": -1.0}, "router.capacity_factor=-1.0 is negative"),
        ({"chooser": "expert", "selection_bias": True}, "router.chooser=expert needs no balancing"),
        ({"chooser": "expert", "score": "softmax_topk"}, "no chosen K to normalise over"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterConfig(**values)


def test_parameter_counts_include_the_size_of_the_noise() -> None:
    model = _model(router_noise="shazeer", router_bias=True)
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())
    assert math.prod(model.model.layers[0].mlp.gate.noise_weight.shape) == 4 * 16


@pytest.mark.parametrize("router", [{"capacity_factor": 0.5}, {"chooser": "expert"}], ids=str)
def test_a_viewer_sees_which_slots_were_left_out(router: dict[str, Any]) -> None:
    gate = _model(**router).train().model.layers[0].mlp.gate
    site = find_router("gate", gate, None)
    assert site is not None
    x_BSD = torch.randn(2, 12, 16)
    routing = gate(x_BSD)
    reading = site.read(gate, (x_BSD,), {}, routing)
    # Where experts choose, a slot that nobody took was never wanted: unused, not dropped.
    left_TK = reading.unused_TK if "chooser" in router else reading.dropped_TK
    assert left_TK is not None
    assert torch.equal(left_TK, ~routing.kept_TK)
    assert bool(left_TK.any())
    assert reading.expert_ids_TK.shape == (24, gate.top_k)
    dropless = gate.eval()(x_BSD)
    if "chooser" not in router:
        assert site.read(gate, (x_BSD,), {}, dropless).dropped_TK is None
