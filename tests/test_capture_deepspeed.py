"""DeepSpeed: engines of every stage are watched inside, and its own expert-parallel gate is read, drops included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_models import Kept
from torch import Tensor, nn

from model.config import ModelConfig
from model.lm import MoELanguageModel
from moeviz.capture.probe import attach
from moeviz.policy import EVERYTHING
from moeviz.records import LoadRecord, TokenRoutingRecord
from trainer.balance import training_loss
from trainer.config import EngineConfig, InputConfig, TrainConfig
from trainer.engine import build_engine

pytest.importorskip("deepspeed", reason="the engines and the gate are DeepSpeed's")

V, B, S, MICRO = 61, 3, 8, 2
MODEL = ModelConfig(
    vocab_size=V, dim=16, num_layers=2, num_heads=2, max_seq_len=16, num_experts=4, top_k=2, expert_dim=16
)


def train(engine: Any, stage: Any, recompute: bool, sink: Kept | None) -> tuple[list[float], list[Tensor]]:
    """Losses, and what the model counted itself in each step; watched if there is a sink."""
    config = TrainConfig(
        model=MODEL,
        data=InputConfig(seq_len=S, batch_size=B, gradient_accumulation_steps=MICRO),
        engine=EngineConfig(engine=engine, zero_stage=stage, gradient_checkpointing=recompute, device="cpu"),
    )
    torch.manual_seed(0)
    built = build_engine(MoELanguageModel(MODEL), config)
    watched = built.module if engine == "torch" else built._engine  # type: ignore[attr-defined]
    probe = None if sink is None else attach(watched, sink, policy=EVERYTHING)
    generator, losses, counts = torch.Generator().manual_seed(1), [], []
    for _ in range(2):
        counts.append(torch.zeros(2, 4, dtype=torch.long))
        for micro_batch in range(MICRO):
            ids_BS = torch.randint(0, V, (B, S), generator=generator)
            output = built.forward(ids_BS, ids_BS.roll(-1, 1))
            loss = training_loss(output, config.balance)
            built.backward(loss, share=1 / MICRO, last=micro_batch == MICRO - 1)
            losses.append(float(loss.detach()))
            counts[-1] += output.expert_counts_LE
        built.step(1e-3)
        if probe is not None:
            probe.step()
    if probe is not None:
        assert probe.info.num_parameters == MODEL.num_parameters()
        assert probe.failures.count == 0
        probe.close()
    built.destroy()
    return losses, counts


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("engine", "stage"),
    [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)],
)
def test_every_engine_is_counted_like_the_model_counts_itself(
    engine: Any, stage: Any, recompute: bool
) -> None:
    sink = Kept()
    losses, counts = train(engine, stage, recompute, sink)
    assert [load.counts_LE.tolist() for load in sink.of(LoadRecord)] == [one.tolist() for one in counts]
    assert [len(rows.seqs) for rows in sink.of(TokenRoutingRecord)] == [B * MICRO] * 2
    assert losses == train(engine, stage, recompute, None)[0], "watching changes no bit"


class Gated(nn.Module):
    """An embedding and DeepSpeed's gate, called as its MoE layer calls it."""

    def __init__(self, k: int, capacity_factor: float, *, draws: bool = False) -> None:
        super().__init__()
        from deepspeed.moe.sharded_moe import TopKGate

        self.embed = nn.Embedding(V, 16)
        self.gate = TopKGate(
            16,
            5,
            k=k,
            capacity_factor=capacity_factor,
            min_capacity=1,
            use_rts=draws,
            top2_2nd_expert_sampling=draws,
            noisy_gate_policy="RSample" if draws else None,
        )

    def forward(self, input_ids: Tensor) -> Any:
        return self.gate(self.embed(input_ids).flatten(0, 1), None, True)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("capacity_factor", [0.5, 4.0])
def test_gate_is_read_before_and_after_its_drops(k: int, capacity_factor: float) -> None:
    torch.manual_seed(1)
    model, sink = Gated(k, capacity_factor).train(), Kept()
    ids_BS = torch.randint(0, V, (4, 7))
    with attach(model, sink, policy=EVERYTHING) as probe:
        output = model(ids_BS)
        probe.step()
    (load,), (rows,) = sink.of(LoadRecord), sink.of(TokenRoutingRecord)
    indices_KT, weights_KT = output[3], output[5].detach()
    probs_TE = F.softmax(model.gate.wg(model.embed(ids_BS).flatten(0, 1)), -1).detach()
    wanted_TK = probs_TE.topk(k, -1).indices
    wanted_E = torch.bincount(wanted_TK.flatten(), minlength=5)
    kept_E = torch.bincount(indices_KT[indices_KT >= 0].long(), minlength=5)
    assert load.counts_LE[0].tolist() == wanted_E.tolist() == output[6].tolist()
    assert load.dropped_LE is not None
    assert load.dropped_LE[0].tolist() == (wanted_E - kept_E).tolist()
    assert (load.dropped_LE.sum() > 0) == (capacity_factor < 1)
    torch.testing.assert_close(torch.from_numpy(load.prob_sum_LE[0]), probs_TE.sum(0))  # type: ignore[index]
    for token in range(28):
        seen = rows.experts_LNSK[0].reshape(28, k)[token], rows.weights_LNSK[0].reshape(28, k)[token]
        truth = {
            int(e): float(w)
            for e, w in zip(indices_KT[:, token], weights_KT[:, token], strict=True)
            if e >= 0
        }
        given = {int(e): float(w) for e, w in zip(*seen, strict=True) if w > 0}
        assert given == pytest.approx(truth)
        assert sorted(seen[0].tolist()) == sorted(wanted_TK[token].tolist())


@pytest.mark.parametrize("k", [1, 2])
def test_drops_are_exact_where_the_gate_draws_its_experts(k: int) -> None:
    torch.manual_seed(2)
    model, sink = Gated(k, 0.5, draws=True).train(), Kept()
    ids_BS = torch.randint(0, V, (6, 9))
    with attach(model, sink, policy=EVERYTHING) as probe:
        output = model(ids_BS)
        probe.step()
    (load,) = sink.of(LoadRecord)
    indices_KT, wanted_E = output[3], output[6]
    kept_E = torch.bincount(indices_KT[indices_KT >= 0].long(), minlength=5)
    logits_TE = model.gate.wg(model.embed(ids_BS).flatten(0, 1))
    best_E = torch.bincount(logits_TE.topk(k, -1).indices.flatten(), minlength=5)
    assert wanted_E.tolist() != best_E.tolist(), "the gate drew other experts than the best"
    assert load.counts_LE[0].tolist() == wanted_E.tolist()
    assert load.dropped_LE is not None
    assert load.dropped_LE[0].tolist() == (wanted_E - kept_E).tolist()
