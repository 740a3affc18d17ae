"""The fixed probe says what the model would do in evaluation, and training cannot tell whether it ran."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from capture_models import BIASED, VOCAB, Kept, batches, mixtral, small_model, train
from torch import Tensor, nn

from model.expert_config import RouterConfig
from model.router import routers
from moeviz.capture.failures import ProbeError
from moeviz.capture.fixed_probe import apart_from_training
from moeviz.capture.probe import Probe, attach
from moeviz.capture.probe_decisions import DECISION_VALUES, decision_values
from moeviz.capture.probe_readings import drift, experts_alike, head_entropy, pair_cosines
from moeviz.capture.reading import AttentionCall
from moeviz.capture.reduce import Decisions
from moeviz.errors import MoevizError
from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.metrics import attention, change, decision, similarity
from moeviz.probe_history import layer_decisions
from moeviz.records import LoadRecord, ProbeRecord

DOMAINS = ("a", "a", "b", "b", "c")


def token_ids() -> Tensor:
    return torch.randint(1, VOCAB, (5, 7), generator=torch.Generator().manual_seed(11))


def probed(
    model: nn.Module, steps: int = 4, probe_batch: Any = None, **options: Any
) -> tuple[Any, Kept, list[tuple[Any, ...]]]:
    """A short training with a probe every second step: what it left, the records, and all random states after it."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    sink = Kept()
    states = []
    with attach(
        model, sink, probe_batch=probe_batch, probe_every=2 if probe_batch is not None else 0, **options
    ) as p:

        def after(loss: float) -> None:
            p.step(loss=loss)
            numpy_state: Any = np.random.get_state()
            states.append(
                (torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2])
            )

        p.run_probe()
        trained = train(model, list(batches(steps, 2, padded=True)), after)
    return trained, sink, states


def noisy() -> nn.Module:
    router = RouterConfig(router_noise="gumbel", router_jitter=0.1, expert_dropout=0.2)
    return small_model(router=router)


@pytest.mark.parametrize(
    "build",
    [small_model, noisy, lambda: mixtral(attention_dropout=0.3)],
    ids=["own", "noise, jitter and expert dropout", "mixtral with dropout"],
)
@pytest.mark.parametrize("when", ["training", "always"])
def test_training_cannot_tell_whether_the_probe_ran(build: Callable[[], nn.Module], when: Any) -> None:
    key = "input_ids" if build not in (small_model, noisy) else "input_ids_BS"
    model, other = build(), build()
    plain, without, states = probed(model, when=when)
    watched, seen, states_probed = probed(
        other, probe_batch={key: token_ids(), "domains": DOMAINS}, when=when
    )
    assert watched.same_bits(plain)
    assert states_probed == states, "random states after every step"
    assert [module.training for module in other.modules()] == [module.training for module in model.modules()]
    assert len(seen.of(ProbeRecord)) == 3
    for mine, its in zip(without.of(LoadRecord), seen.of(LoadRecord), strict=True):
        assert mine.tokens == its.tokens
        assert np.array_equal(mine.counts_LE, its.counts_LE), "the probe is no part of a load"
        assert all(np.array_equal(mine.token_sums[name], its.token_sums[name]) for name in mine.token_sums)


def test_decisions_are_those_of_evaluation_and_padding_is_cut() -> None:
    ids_NS, mask_NS = token_ids(), torch.ones(5, 7, dtype=torch.long)
    mask_NS[1, 4:], mask_NS[2, :3] = 0, 0
    model = small_model(router=BIASED)
    sink = Kept()
    with attach(model, sink, probe_batch={"input_ids_BS": ids_NS, "attention_mask_BS": mask_NS}) as probe:
        probe.run_probe(40)
    record = sink.of(ProbeRecord)[0]
    assert record.step == 40
    assert record.sequences.lengths_N.tolist() == [7, 4, 4, 7, 7]
    assert record.sequences.token_ids_NS[2, :4].tolist() == ids_NS[2, 3:].tolist()
    logits: list[Tensor] = []
    hooks = [r.register_forward_hook(lambda m, a, out: logits.append(out.logits_TE)) for r in routers(model)]
    with torch.no_grad():
        model.eval()(ids_NS, attention_mask_BS=mask_NS)
    for hook in hooks:
        hook.remove()
    for layer, ids_TK in layer_decisions(record).items():
        bias_E = routers(model)[layer].e_score_correction_bias
        assert bias_E is not None
        expected_TK = (logits[layer].sigmoid() + bias_E).topk(2, dim=-1).indices[mask_NS.flatten().bool()]
        assert np.array_equal(ids_TK, expected_TK.numpy()), "slots by falling selection score"


def test_a_probe_in_several_passes_says_the_same_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tokens in (1 << 20, 14):
        monkeypatch.setattr("moeviz.capture.fixed_probe.PASS_TOKENS", tokens)
        sink = Kept()
        with attach(
            small_model(), sink, probe_batch=ProbeBatch(token_ids_NS=token_ids().numpy(), domains=DOMAINS)
        ) as p:
            p.run_probe()
        found.append(sink.of(ProbeRecord)[0])
    once, thrice = found
    assert once.sequences.domains == thrice.sequences.domains == DOMAINS
    for mine, its in zip(once.routings, thrice.routings, strict=True):
        assert np.array_equal(mine.experts_LNSK, its.experts_LNSK)


def test_scores_that_move_drift_and_others_do_not() -> None:
    model, sink = small_model(), Kept()
    with attach(model, sink, probe_batch={"input_ids_BS": token_ids()}) as probe:
        probe.run_probe(0)
        probe.run_probe(1)
        with torch.no_grad():
            routers(model)[1].weight.mul_(-1)
        probe.run_probe(2)
    first, same, moved = (record.layer_values["probe_drift"] for record in sink.of(ProbeRecord))
    assert np.isnan(first).all()
    assert np.array_equal(same, np.zeros(2))
    assert moved[0] == 0
    assert moved[1] > 0.01, "only the layer whose router was turned round"


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_topk"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_decisions_are_measured_as_the_metrics_define(score: Any, padded: bool) -> None:
    """Each layer alone in float64, with a bias in the units that rank; what padding holds counts for nothing."""
    generator = torch.Generator().manual_seed(3)
    logits, bias_LE = torch.randn(2, 11, 6, generator=generator), torch.randn(2, 6, generator=generator) / 9
    scores_LTE = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "softmax_topk": logits}[score]
    ranking_LTE = scores_LTE + bias_LE[:, None]
    ids_LTK = ranking_LTE.topk(3, dim=-1).indices
    weights_LTK = scores_LTE.gather(-1, ids_LTK)
    weights_LTK = weights_LTK.softmax(-1) if score == "softmax_topk" else weights_LTK
    valid_T = torch.arange(11) < 8 if padded else None
    if padded:
        logits[:, 8:], weights_LTK[:, 8:] = torch.inf, torch.nan
    decisions = Decisions(tuple(logits), weights_LTK, ids_LTK, None, None, None)
    probs_LTE = scores_LTE / scores_LTE.sum(-1, keepdim=True) if score == "sigmoid" else logits.softmax(-1)
    found = dict(
        zip(DECISION_VALUES, decision_values(decisions, score, probs_LTE, bias_LE, valid_T), strict=True)
    )
    tokens = 8 if padded else 11
    for layer in range(2):
        z_TE, p_TE, r_TE, w_TK = (
            values[layer, :tokens].double().numpy()
            for values in (logits, probs_LTE, ranking_LTE, weights_LTK)
        )
        expected = {
            "margin12": decision.margin12(p_TE),
            "margin12_logits": decision.margin12(z_TE),
            "probe_margin": decision.margin_sel(r_TE, 3),
            "gate_eff": decision.gate_eff(w_TK),
            "gate_mass": decision.gate_mass(p_TE, 3),
            "logit_rms": decision.logit_rms(z_TE),
            "logit_max": decision.logit_max(z_TE),
            "lse_mean": decision.lse_mean(z_TE),
        }
        assert {name: float(value[layer]) for name, value in found.items()} == pytest.approx(
            expected, rel=2e-5
        )


def test_margins_of_what_is_not_ranked_are_unknown() -> None:
    logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    worst_LTK = (-logits).topk(1, dim=-1).indices
    every_LTK = torch.arange(3).expand(1, 4, 3)
    at = DECISION_VALUES.index("probe_margin")
    for ids_LTK in (worst_LTK, every_LTK):
        decisions = Decisions(tuple(logits), torch.ones(ids_LTK.shape), ids_LTK, None, None, None)
        found_RL = decision_values(decisions, "softmax", logits.softmax(-1))
        assert found_RL[:, 0].isnan().tolist() == [row == at for row in range(len(DECISION_VALUES))]
    one = Decisions(
        (torch.zeros(4, 1),), torch.ones(1, 4, 1), torch.zeros(1, 4, 1, dtype=torch.int64), None, None, None
    )
    unknown = {"margin12", "margin12_logits", "probe_margin"}
    found_RL = decision_values(one, "softmax", torch.ones(1, 4, 1))
    assert {DECISION_VALUES[row] for row in found_RL[:, 0].isnan().nonzero().flatten().tolist()} == unknown


def test_a_pass_tells_how_decided_every_layer_is() -> None:
    sink = Kept()
    with attach(small_model(router=BIASED), sink, probe_batch={"input_ids_BS": token_ids()}) as probe:
        probe.run_probe()
    (record,) = sink.of(ProbeRecord)
    for name in DECISION_VALUES:
        assert np.isfinite(record.layer_values[name]).all(), name
    assert (record.layer_values["probe_margin"] > 0).all()


def test_quantities_of_tensors_are_those_of_arrays() -> None:
    generator = torch.Generator().manual_seed(2)
    before_TE, after_TE = (torch.rand(9, 5, generator=generator).softmax(-1) for _ in range(2))
    assert float(drift(before_TE, after_TE)) == pytest.approx(
        float(change.probe_drift(before_TE.double().numpy(), after_TE.double().numpy())), rel=1e-4
    )
    rows_ED = torch.randn(5, 4, generator=generator)
    pairs = similarity.off_diagonal(similarity.cosines(rows_ED.numpy()))
    assert [float(value) for value in pair_cosines(rows_ED)] == pytest.approx(
        [pairs.mean, pairs.max], rel=1e-5
    )


def test_pes_is_that_of_all_experts_on_the_same_tokens() -> None:
    model = small_model()
    experts: Any = model.get_submodule("model.layers.1.mlp.experts")
    x_TD = torch.randn(10, 32, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        one = torch.ones(10, 1)
        outputs_TED = torch.stack([experts(x_TD, torch.full((10, 1), e), one) for e in range(6)], dim=1)
        value = float(experts_alike(experts, x_TD, 6, torch.float32))
    assert value == pytest.approx(similarity.pes(outputs_TED.double().numpy()), rel=1e-4)


def test_entropy_of_heads_is_that_of_their_maps() -> None:
    generator = torch.Generator().manual_seed(9)
    q, k = torch.randn(3, 4, 8, 5, generator=generator), torch.randn(3, 2, 8, 5, generator=generator)
    found_H = head_entropy(AttentionCall(q, k, scale=0.7), None)
    assert found_H is not None
    scores = np.einsum("nhsd,nhcd->nhsc", q.numpy(), k.repeat_interleave(2, dim=1).numpy()) * 0.7
    scores[..., np.triu(np.ones((8, 8), dtype=bool), 1)] = -np.inf
    maps = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert found_H.numpy() == pytest.approx(attention.attn_entropy(maps).mean(axis=0), rel=1e-5)
    one_key = AttentionCall(q, k * 1e4, scale=1.0)
    sharp_H = head_entropy(one_key, None)
    assert sharp_H is not None
    assert float(sharp_H.max()) < 0.02, "scores this far apart leave one key"


def test_experts_that_are_copies_are_alike() -> None:
    model, sink = small_model(), Kept()
    experts = model.get_submodule("model.layers.2.mlp.experts")
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    with attach(model, sink, probe_batch={"input_ids_BS": token_ids()}) as probe:
        probe.run_probe()
    record = sink.of(ProbeRecord)[0]
    assert record.layer_values["pes"][1] == pytest.approx(1, abs=1e-4)
    assert record.layer_values["pes"][0] < 0.5
    assert sorted(record.head_entropy) == [0, 1, 2], "blocks, the dense one too"
    assert all(entropy_H.shape == (4,) for entropy_H in record.head_entropy.values())


def test_layers_that_a_person_froze_stay_frozen() -> None:
    model = small_model()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with apart_from_training(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="mine"), apart_from_training(model):
        raise RuntimeError("mine")
    assert [module.training for module in model.modules()] == before


class Failing(nn.Module):
    """A model that evaluation breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Any = None, **_: Any
    ) -> Any:
        if not self.training:
            raise RuntimeError("no evaluation here")
        return self.inner(input_ids, labels, attention_mask_BS=attention_mask)


def test_a_probe_that_fails_costs_nothing_but_itself(caplog: pytest.LogCaptureFixture) -> None:
    model, sink = Failing(), Kept()
    with attach(model, sink, probe_batch={"input_ids": token_ids()}, probe_every=1) as probe:
        for step in batches(3, 1):
            model(step[0].ids_BS, step[0].ids_BS).ce.backward()
            probe.step()
    assert len(sink.of(LoadRecord)) == 3
    assert not sink.of(ProbeRecord)
    assert sum("no evaluation here" in line.getMessage() for line in caplog.records) == 1, "said once"
    assert model.training
    assert not probe.attached or probe.failures.count == 3


def test_a_probe_inside_autocast_leaves_no_cast_weight_behind() -> None:
    """autocast keeps cast weights for its region: one that was cast without gradients would never get any."""
    found = []
    for probe_batch in (None, {"input_ids_BS": token_ids()}):
        model = small_model()
        with attach(model, Kept(), probe_batch=probe_batch) as probe, torch.autocast("cpu", torch.bfloat16):
            probe.run_probe()
            step = next(iter(batches(1, 1)))
            loss = model(step[0].ids_BS, step[0].ids_BS).ce
            loss.backward()
            probe.step()
            assert torch.is_autocast_cache_enabled()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]), "every weight still has a gradient"
    assert all(torch.equal(mine, its) for mine, its in zip(*found, strict=True))


def test_compiled_training_gets_no_graph_more() -> None:
    import torch._dynamo

    losses, graphs = [], []

    def train_compiled(probe: Probe, model: nn.Module, backend: Any) -> Any:
        model.compile(backend=backend)
        with probe:
            return train(model, list(batches(3, 1)), lambda loss: probe.step(loss=loss))

    for probe_batch in (None, {"input_ids_BS": token_ids()}):
        torch._dynamo.reset()
        compiled: list[Any] = []

        def count(graph: Any, inputs: Any, compiled: list[Any] = compiled) -> Any:
            compiled.append(graph)
            return graph.forward

        model, sink = small_model(num_layers=1, first_dense_layers=0), Kept()
        probe = attach(model, sink, probe_batch=probe_batch, probe_every=1 if probe_batch else 0)
        losses.append(train_compiled(probe, model, count))
        graphs.append(len(compiled))
        assert len(sink.of(ProbeRecord)) == (3 if probe_batch else 0)
        assert len(sink.of(LoadRecord)) == 3
    assert losses[0].same_bits(losses[1])
    assert graphs[0] == graphs[1]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3, 4), "no token ids"),
        ({"other": 3}, "no token ids"),
        (
            {"input_ids_BS": torch.ones(2, 3, dtype=torch.long), "domains": ["a"]},
            "names 1 domains for 2 sequences",
        ),
    ],
)
def test_a_batch_that_is_none_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(MoevizError, match=message):
        attach(small_model(), Kept(), probe_batch=batch)


def test_experts_that_choose_have_no_probe() -> None:
    model = small_model(router=RouterConfig(chooser="expert"))
    with pytest.raises(ProbeError, match="choose their tokens"):
        attach(model, Kept(), probe_batch=token_ids())
    with pytest.raises(MoevizError, match="probe_every=-1"):
        attach(small_model(), Kept(), probe_batch=token_ids(), probe_every=-1)


def test_the_batch_is_copied() -> None:
    ids_NS, sink = token_ids(), Kept()
    kept = ids_NS.clone()
    with attach(small_model(), sink, probe_batch=ids_NS) as probe:
        assert isinstance(probe, Probe)
        ids_NS.zero_()
        probe.run_probe()
    assert np.array_equal(sink.of(ProbeRecord)[0].sequences.token_ids_NS, kept.numpy())
