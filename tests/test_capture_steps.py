"""One optimizer step is one record, whatever happens between: accumulation, padding, recomputation, evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from capture_models import BIASED, VOCAB, Batch, Kept, batches, loss_of, mixtral, small_model, train
from torch import Tensor, nn

from model.expert_config import RouterConfig
from model.lm import MoELanguageModel
from moeviz.capture.failures import PATIENCE, ProbeError
from moeviz.capture.probe import attach
from moeviz.capture.reading import Reading
from moeviz.errors import MoevizError
from moeviz.policy import EVERYTHING, SamplingPolicy
from moeviz.records import (
    AttentionRecord,
    EventRecord,
    LayerInfo,
    LoadRecord,
    ModelInfo,
    ScalarRecord,
    SequenceRecord,
    TokenRoutingRecord,
)

NO_SAMPLES = SamplingPolicy(route_every=0, attention_every=0)


class CountsOfModel:
    """What moeviz's own model returns about its routing, summed by hand over the micro-batches of each step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self._now: Tensor | int = 0

    def loss(self, model: MoELanguageModel, batch: Batch) -> Tensor:
        output = model(batch.ids_BS, batch.ids_BS.roll(-1, 1), attention_mask_BS=batch.mask_BS)
        self._now = self._now + output.expert_counts_LE
        return output.ce

    def end(self) -> None:
        assert isinstance(self._now, Tensor)
        self.steps.append(self._now)
        self._now = 0


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_counts_are_those_of_the_model(micro_batches: int, padded: bool, recompute: bool) -> None:
    model, sink, truth = small_model(router=BIASED), Kept(), CountsOfModel()
    if recompute:
        model.gradient_checkpointing_enable()
    probe = attach(model, sink, policy=NO_SAMPLES)

    def after(loss: float) -> None:
        truth.end()
        probe.step(loss=loss)

    train(model, list(batches(3, micro_batches, padded=padded)), after, truth.loss)
    loads = sink.of(LoadRecord)
    assert [load.step for load in loads] == [0, 1, 2]
    for load, counts_LE in zip(loads, truth.steps, strict=True):
        assert load.tokens == micro_batches * (27 - (6 if padded else 0))
        assert load.counts_LE.tolist() == counts_LE.tolist()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("drop_order", ["position", "prob"])
def test_slots_beyond_capacity_are_counted_as_wanted_and_as_dropped(drop_order: Any, padded: bool) -> None:
    router = RouterConfig(capacity_factor=0.5, drop_order=drop_order)
    model, sink = small_model(router=router), Kept()
    kept: list[Tensor] = []
    for block in model.model.layers[1:]:
        block.mlp.gate.register_forward_hook(lambda m, args, out: kept.append(out.kept_TK.view(3, 9, 2)))
    (batch,) = next(batches(1, 1, padded=padded))
    with attach(model, sink, policy=EVERYTHING) as probe:
        output = model(batch.ids_BS, attention_mask_BS=batch.mask_BS)
        probe.step()
    (load,), (rows,) = sink.of(LoadRecord), sink.of(TokenRoutingRecord)
    assert load.counts_LE.tolist() == output.expert_counts_LE.tolist()
    valid_BS = torch.ones(3, 9, dtype=torch.bool) if batch.mask_BS is None else batch.mask_BS.bool()
    assert load.dropped_LE is not None
    for layer, kept_BSK in enumerate(kept):
        assert load.dropped_LE[layer].sum() == (~kept_BSK[valid_BS]).sum() > 0
        for n in range(3):
            weights_SK = rows.weights_LNSK[layer, n, : rows.lengths_N[n]]
            assert ((weights_SK > 0) == kept_BSK[n, valid_BS[n]].numpy()).all()


@pytest.mark.parametrize("padded", [False, True])
def test_where_experts_choose_only_what_they_took_is_counted(padded: bool) -> None:
    model, sink = small_model(router=RouterConfig(chooser="expert")), Kept()
    (batch,) = next(batches(1, 1, padded=padded))
    with attach(model, sink, policy=EVERYTHING) as probe:
        assert [layer.top_k for layer in probe.info.layers] == [2, 2]
        output = model(batch.ids_BS, attention_mask_BS=batch.mask_BS)
        probe.step()
    (load,), (rows,) = sink.of(LoadRecord), sink.of(TokenRoutingRecord)
    assert load.counts_LE.tolist() == output.expert_counts_LE.tolist()
    assert load.dropped_LE is None
    assert "margin" not in load.token_sums
    for layer in range(2):
        taken = [rows.weights_LNSK[layer, n, :length] > 0 for n, length in enumerate(rows.lengths_N)]
        assert sum(one.sum() for one in taken) == load.counts_LE[layer].sum()
        assert all((one[:, :-1] >= one[:, 1:]).all() for one in taken), "slots that count come first"


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_hugging_face_blocks_count_once(reentrant: bool) -> None:
    steps = list(batches(2, 2, padded=True))
    seen = []
    for recompute in (False, True):
        model, sink = mixtral(), Kept()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with attach(model, sink, policy=EVERYTHING) as probe:
            train(model, steps, lambda loss, probe=probe: probe.step())
        seen.append(sink)
    for plain, recomputed in zip(seen[0].of(LoadRecord), seen[1].of(LoadRecord), strict=True):
        assert plain.counts_LE.tolist() == recomputed.counts_LE.tolist()
    for plain, recomputed in zip(*(sink.of(TokenRoutingRecord) for sink in seen), strict=True):
        assert (plain.experts_LNSK == recomputed.experts_LNSK).all()


@pytest.mark.parametrize("build", [small_model, mixtral])
@pytest.mark.parametrize("policy", [NO_SAMPLES, EVERYTHING, SamplingPolicy(attention_every=1)])
def test_probe_changes_no_bit_of_training(build: Callable[[], nn.Module], policy: SamplingPolicy) -> None:
    steps = list(batches(3, 2, padded=True))
    plain = train(build(), steps)
    model = build()
    with attach(model, Kept(), policy=policy) as probe:
        watched = train(model, steps, lambda loss: probe.step(loss=loss))
    assert plain.same_bits(watched)


def test_random_state_of_training_is_left_alone() -> None:
    model = small_model()
    with attach(model, Kept(), policy=SamplingPolicy(route_every=1, attention_every=1)) as probe:
        torch.manual_seed(0)
        loss_of(model, next(batches(1, 1))[0])
        probe.step()
        after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


def test_evaluation_leaves_no_trace() -> None:
    model, sink = small_model(), Kept()
    batch = next(batches(1, 1))[0]
    with attach(model, sink, policy=EVERYTHING) as probe:
        loss_of(model, batch)
        with torch.no_grad():
            model(batch.ids_BS)
        model.eval()
        model(batch.ids_BS)
        model.train()
        probe.step()
    (load,) = sink.of(LoadRecord)
    assert load.tokens == 27
    assert len(sink.of(TokenRoutingRecord)[0].seqs) == 3


def test_evaluation_is_measured_when_asked_for() -> None:
    model, sink = small_model().eval(), Kept()
    with attach(model, sink, when="always") as probe, torch.no_grad():
        model(torch.ones(2, 5, dtype=torch.long))
        probe.step()
    assert sink.of(LoadRecord)[0].tokens == 10


def test_steps_number_themselves_or_take_the_number_given() -> None:
    model, sink = small_model(), Kept()
    with attach(model, sink, first_step=7, policy=NO_SAMPLES) as probe:
        for number in (None, 20, None):
            loss_of(model, next(batches(1, 1))[0])
            probe.step(number)
        assert probe.next_step == 22
    assert [load.step for load in sink.of(LoadRecord)] == [7, 20, 21]


def test_scalars_may_be_tensors() -> None:
    model, sink = small_model(), Kept()
    with attach(model, sink, policy=NO_SAMPLES) as probe:
        loss = loss_of(model, next(batches(1, 1))[0])
        probe.step(loss=loss, lr=0.5, norms=torch.tensor([1.0, 3.0]))
        probe.scalars(0, {"val_loss/code": 1.5})
        probe.event("checkpoint", path="a")
    step, later = sink.of(ScalarRecord)
    assert step.values == pytest.approx({"loss": float(loss.detach()), "lr": 0.5, "norms": 2.0})
    assert later.values == {"val_loss/code": 1.5}
    (event,) = sink.of(EventRecord)
    assert (event.kind, event.step, event.detail) == ("checkpoint", 1, {"path": "a"})
    assert sink.closed


def test_token_rows_are_the_models_choices_without_padding() -> None:
    model, sink = small_model(), Kept()
    (batch,) = next(batches(1, 1, padded=True))
    assert batch.mask_BS is not None
    choices: list[Tensor] = []
    hooks = [
        block.mlp.gate.register_forward_hook(lambda module, args, routing: choices.append(routing))
        for block in model.model.layers[1:]
    ]
    with attach(model, sink, policy=EVERYTHING) as probe:
        probe.label(["a", "b", None])
        loss_of(model, batch)
        loss_BS = torch.arange(27.0).view(3, 9)
        probe.token_loss(loss_BS[:, :-1])
        probe.step()
    for hook in hooks:
        hook.remove()
    (rows,), (texts,) = sink.of(TokenRoutingRecord), sink.of(SequenceRecord)
    assert rows.layers.tolist() == [0, 1]
    assert rows.seqs.tolist() == texts.seqs.tolist() == [0, 1, 2]
    assert rows.lengths_N.tolist() == texts.lengths_N.tolist() == [5, 7, 9]
    assert texts.domains == ("a", "b", None)
    for n, valid_S in enumerate(batch.mask_BS.bool()):
        length = int(valid_S.sum())
        assert texts.token_ids_NS[n, :length].tolist() == batch.ids_BS[n, valid_S].tolist()
        assert texts.token_loss_NS is not None
        expected = loss_BS[n].masked_fill(torch.arange(9) == 8, float("nan"))[valid_S]
        np.testing.assert_array_equal(texts.token_loss_NS[n, :length], expected.numpy())
        for layer, routing in enumerate(choices):
            ids_SK = routing.expert_ids_TK.view(3, 9, 2)[n, valid_S]
            weights_SK = routing.weights_TK.view(3, 9, 2)[n, valid_S].detach()
            assert rows.experts_LNSK[layer, n, :length].tolist() == ids_SK.tolist()
            np.testing.assert_array_equal(rows.weights_LNSK[layer, n, :length], weights_SK.numpy())


@pytest.mark.parametrize("selection_bias", [False, True])
def test_the_size_of_logits_is_summed_where_a_bias_is_added_to_them(selection_bias: bool) -> None:
    router = RouterConfig(score="softmax_topk", selection_bias=selection_bias)
    model, sink = small_model(router=router), Kept()
    kept: list[Tensor] = []
    for block in model.model.layers[1:]:
        block.mlp.gate.register_forward_hook(lambda module, args, out: kept.append(out.logits_TE.detach()))
    (batch,) = next(batches(1, 1, padded=True))
    assert batch.mask_BS is not None
    with attach(model, sink, policy=EVERYTHING) as probe:
        loss_of(model, batch)
        probe.step()
    (load,), (rows,) = sink.of(LoadRecord), sink.of(TokenRoutingRecord)
    assert ("logit_squared" in load.token_sums) == selection_bias
    for layer, logits_TE in enumerate(kept if selection_bias else ()):
        valid_TE = logits_TE[batch.mask_BS.bool().flatten()].double()
        assert load.token_sums["logit_squared"][layer] == pytest.approx(float((valid_TE**2).mean(-1).sum()))
        bias_E = torch.from_numpy(load.bias_LE[layer, :6])
        ranking_S = (logits_TE.view(3, 9, 6) + bias_E)[0, :5]
        ids_SK = torch.from_numpy(rows.experts_LNSK[layer, 0, :5].astype(np.int64))
        assert (ranking_S.gather(-1, ids_SK).diff(dim=-1) <= 0).all(), "slots fall by the logit with its bias"


def test_sequences_of_micro_batches_of_different_size_keep_their_own_number() -> None:
    model, sink = small_model(), Kept()
    with attach(model, sink, policy=EVERYTHING) as probe:
        probe.label("prose")
        model(torch.ones(2, 5, dtype=torch.long))
        model(torch.ones(3, 4, dtype=torch.long))
        probe.step()
    (rows,), (texts,) = sink.of(TokenRoutingRecord), sink.of(SequenceRecord)
    assert rows.seqs.tolist() == texts.seqs.tolist() == [0, 1, 2, 3, 4]
    assert rows.lengths_N.tolist() == [5, 5, 4, 4, 4]
    assert set(texts.domains) == {"prose"}


def test_layers_of_different_shape_share_a_load_record() -> None:
    class TwoSizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = small_model(num_experts=9, top_k=3)
            self.first, self.second = small_model(), wide

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.first(input_ids).logits_BSV.sum() + self.second(input_ids).logits_BSV.sum()

    model, sink = TwoSizes().train(), Kept()
    with attach(model, sink, policy=EVERYTHING) as probe:
        model(torch.randint(0, VOCAB, (2, 7)))
        probe.step()
    (load,) = sink.of(LoadRecord)
    assert load.counts_LE.shape == (4, 9)
    assert load.counts_LE.sum(-1).tolist() == [28, 28, 42, 42]
    assert (load.counts_LE[:2, 6:] == 0).all()
    assert [record.experts_LNSK.shape[-1] for record in sink.of(TokenRoutingRecord)] == [2, 3]


def test_reducing_early_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = []
    for held in (2**26, 1):
        monkeypatch.setattr("moeviz.capture.tap._HELD_ELEMENTS", held)
        model, sink = mixtral(), Kept()
        with attach(model, sink, policy=EVERYTHING) as probe:
            loss_of(model, next(batches(1, 1, padded=True))[0])
            probe.step()
        sinks.append(sink)
    late, early = (sink.of(LoadRecord)[0] for sink in sinks)
    assert late.counts_LE.tolist() == early.counts_LE.tolist()
    for name, sums_L in late.token_sums.items():
        np.testing.assert_allclose(early.token_sums[name], sums_L, rtol=1e-6)
    rows = [sink.of(TokenRoutingRecord)[0] for sink in sinks]
    assert (rows[0].experts_LNSK == rows[1].experts_LNSK).all()


class TestRefusal:
    """What is wrong from the start is said at the start, with a remedy."""

    def test_step_without_forward(self) -> None:
        probe = attach(small_model(), Kept())
        with pytest.raises(ProbeError, match=r"saw 0 of 2 routers.*train mode"):
            probe.step()
        assert not probe.attached

    def test_part_of_the_model_called(self) -> None:
        model = small_model()
        probe = attach(model, Kept())
        model.model(torch.ones(2, 5, dtype=torch.long))
        with pytest.raises(ProbeError, match="call the watched model itself"):
            probe.step()

    def test_router_that_runs_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = small_model()

            def forward(self, input_ids: Tensor) -> Tensor:
                self.inner(input_ids)
                return self.inner(input_ids)

        model = Twice().train()
        probe = attach(model, Kept())
        model(torch.ones(2, 5, dtype=torch.long))
        with pytest.raises(ProbeError, match="assigned 40 slots, not 10 tokens x top_k=2 = 20"):
            probe.step()

    def test_model_called_without_ids(self) -> None:
        class FromNothing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = small_model()

            def forward(self, length: int) -> Tensor:
                return self.inner(torch.ones(2, length, dtype=torch.long))

        model = FromNothing().train()
        probe = attach(model, Kept())
        model(5)
        with pytest.raises(ProbeError, match="no argument of the model looks like token ids"):
            probe.step()

    def test_adapter_that_reads_nonsense(self) -> None:
        class Nonsense:
            """Takes every linear output as a decision of one expert."""

            def find_router(self, name: str, module: nn.Module, parent: nn.Module | None) -> Any:
                from moeviz.capture.reading import RouterSite

                if not name.endswith("gate"):
                    return None
                return RouterSite(
                    name=name,
                    module=module,
                    num_experts=6,
                    top_k=2,
                    score="softmax",
                    read=self.read,
                    bias=lambda: None,
                )

            def find_core(self, name: str, module: nn.Module, parent: nn.Module | None) -> None: ...

            def read(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Reading:
                return Reading(output[0].detach(), output[1].detach()[:, :1], output[2].detach()[:, :1])

        model = small_model()
        probe = attach(model, Kept(), adapters=[Nonsense()])
        loss_of(model, next(batches(1, 1))[0])
        with pytest.raises(ProbeError, match="27 slots, not 27 tokens x top_k=2"):
            probe.step()

    def test_info_of_another_model(self) -> None:
        layer = LayerInfo(layer=0, name="a", block=0, num_experts=3, top_k=1)
        with pytest.raises(ProbeError, match="leave info out"):
            attach(small_model(), Kept(), info=ModelInfo(family="x", layers=(layer,)))

    def test_step_after_close(self) -> None:
        probe = attach(small_model(), Kept())
        probe.close()
        probe.close()
        with pytest.raises(MoevizError, match="closed"):
            probe.step()


def test_later_step_without_routers_warns_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model, sink = small_model(), Kept()
    with attach(model, sink, policy=NO_SAMPLES) as probe, caplog.at_level(logging.WARNING):
        batch = next(batches(1, 1))[0]
        loss_of(model, batch)
        probe.step(loss=1)
        for _ in range(PATIENCE + 2):
            probe.step(loss=2)
        loss_of(model, batch)
        probe.step(loss=3)
    assert [load.step for load in sink.of(LoadRecord)] == [0, PATIENCE + 3]
    assert len(sink.of(ScalarRecord)) == PATIENCE + 4
    assert [event.kind for event in sink.of(EventRecord)] == ["empty_step"]
    assert len(caplog.records) == 1


def test_detached_model_has_no_hook_left() -> None:
    for model in (small_model(), mixtral()):
        probe = attach(model, Kept())
        probe.close()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_wrapped_model_is_watched_inside() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    model, sink = Wrapper(Wrapper(small_model())).train(), Kept()
    with attach(model, sink) as probe:
        assert probe.info.layers[0].name == "model.layers.1.mlp.gate"
        model(torch.ones(2, 5, dtype=torch.long))
        probe.step()
    assert sink.of(LoadRecord)[0].tokens == 10


def test_forward_that_raised_is_not_counted() -> None:
    model, sink = small_model(), Kept()
    with attach(model, sink, policy=NO_SAMPLES) as probe:
        broken = model.lm_head.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.ones(2, 5, dtype=torch.long))
        broken.remove()
        model(torch.ones(3, 5, dtype=torch.long))
        probe.step()
    (load,) = sink.of(LoadRecord)
    assert load.tokens == 15
    assert load.counts_LE.sum(-1).tolist() == [30, 30]


def test_autocast_lowers_no_precision_of_what_is_recorded() -> None:
    model, sink = small_model(), Kept()
    kept: list[Tensor] = []
    hook = model.model.layers[1].mlp.gate.register_forward_hook(
        lambda m, args, out: kept.append(out.logits_TE)
    )
    policy = SamplingPolicy(attention_every=1, attention_heads=4)
    with attach(model, sink, policy=policy) as probe, torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)))
        probe.step()
    hook.remove()
    p_TE = kept[0].detach().double().softmax(-1)
    (load,) = sink.of(LoadRecord)
    assert load.token_sums["entropy_nats"][0] == pytest.approx(float(-(p_TE * p_TE.log()).sum()), rel=1e-5)
    for one in sink.of(AttentionRecord):
        np.testing.assert_allclose(one.map_QC.sum(-1), 1, atol=1e-5)


def test_cost_in_the_training_thread_is_accounted_for() -> None:
    with attach(small_model(), Kept()) as probe:
        assert probe.seconds == 0
        model = probe._tap._root
        model(torch.ones(2, 5, dtype=torch.long))
        after_forward = probe.seconds
        probe.step()
        assert 0 < after_forward < probe.seconds < 10
