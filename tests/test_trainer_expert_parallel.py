"""Experts that ranks share compute what they would on ranks that each hold all of them: losses, loads, gradients."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from capture_models import Kept
from torch import distributed as dist
from trainer_runs import corpus_cache, no_packing

from model.config import ModelConfig, RouterConfig
from model.expert_config import ExpertConfig
from model.lm import MoELanguageModel
from moeviz.capture.probe import attach
from moeviz.capture.sites import find_sites
from moeviz.commands.train import parse
from moeviz.errors import MoevizError
from moeviz.policy import EVERYTHING
from moeviz.records import LoadRecord
from moeviz.store.queries_series import scalars
from moeviz.store.reader import open_run
from trainer.balance import training_loss
from trainer.checkpoint import load_checkpoint, read_checkpoint
from trainer.config import (
    BalanceConfig,
    EngineConfig,
    InputConfig,
    OptimConfig,
    PruneConfig,
    ResponseConfig,
    TrainConfig,
)
from trainer.engine import Engine, build_engine
from trainer.gradients import expert_grad_norms
from trainer.launch_status import free_port
from trainer.resume import on_ranks
from trainer.train import train as run_training

__all__ = ["corpus_cache", "no_packing"]

pytest.importorskip("deepspeed", reason="sharing experts is DeepSpeed's")

Kind = Literal["torch", "deepspeed"]
KINDS: tuple[Kind, ...] = ("torch", "deepspeed")
RANKS, V, B, S, MICRO, STEPS = 4, 61, 3, 8, 2, 3
MODEL = ModelConfig(
    vocab_size=V, dim=16, num_layers=2, num_heads=2, max_seq_len=16, num_experts=8, top_k=2, expert_dim=8
)


class Case(NamedTuple):
    """A model, and how DeepSpeed trains it."""

    model: ModelConfig
    engine: Mapping[str, Any]
    tolerance: float = 1e-5


def routed(**router: Any) -> ModelConfig:
    return replace(MODEL, router=RouterConfig(**router))


CASES = {
    "softmax": Case(MODEL, {"zero_stage": 0, "expert_parallel": 2}),
    "sigmoid in groups, by bias": Case(
        routed(score="sigmoid", selection_bias=True, num_groups=4, top_groups=2, router_noise="gumbel"),
        {"zero_stage": 1, "expert_parallel": 4},
    ),
    "capacity, blocks recomputed": Case(
        routed(capacity_factor=0.6),
        {"zero_stage": 2, "expert_parallel": 2, "gradient_checkpointing": True},
    ),
    "experts choose": Case(routed(chooser="expert"), {"zero_stage": 1, "expert_parallel": 2}),
    "DeepSpeed's gate, biases, a shared expert": Case(
        replace(MODEL, experts=ExpertConfig(expert_bias=True), num_shared_experts=1),
        {"zero_stage": 1, "expert_parallel": 4, "expert_gate": "deepspeed"},
    ),
    "DeepSpeed's gate, one expert each": Case(
        replace(MODEL, top_k=1, router=RouterConfig(norm_topk=False)),
        {"zero_stage": 0, "expert_parallel": 2, "expert_gate": "deepspeed"},
    ),
    "one expert gets everything": Case(replace(MODEL, top_k=1), {"zero_stage": 2, "expert_parallel": 4}),
    "bf16": Case(MODEL, {"zero_stage": 2, "expert_parallel": 2, "dtype": "bf16"}, 2e-2),
}


class Told(NamedTuple):
    """What a rank saw."""

    losses: list[float]
    counts: list[list[list[int]]]
    norms: list[float]
    expert_norms: dict[str, float]
    parameters: int
    weights: dict[str, np.ndarray]
    resumed: bool
    """Whether a second engine went on from the first one's files to the same weights, to the bit."""


def config_of(case: Case, engine: Kind) -> TrainConfig:
    changes = dict(case.engine)
    if engine == "torch":
        changes = {
            name: value for name, value in changes.items() if name in ("gradient_checkpointing", "dtype")
        }
    return TrainConfig(
        model=case.model,
        data=InputConfig(seq_len=S, batch_size=B, gradient_accumulation_steps=MICRO),
        optim=OptimConfig(grad_clip=0.05),
        balance=BalanceConfig(balance="aux"),
        engine=EngineConfig(engine=engine, device="cpu", **changes),
    )


def built(case: Case, config: TrainConfig, name: str) -> Engine:
    torch.manual_seed(0)
    model = MoELanguageModel(case.model)
    if name == "one expert gets everything":
        for layer in model.model.layers:
            layer.mlp.gate.forced_ids_TK = torch.full((B * S, 1), 5)  # type: ignore
    return build_engine(model, config)


def take(engine: Engine, config: TrainConfig, steps: range, told: Told | None) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + engine.rank)
        loss_sum, counts = 0.0, torch.zeros(())
        for micro in range(MICRO):
            ids_BS = torch.randint(0, V, (B, S), generator=generator)
            output = engine.forward(ids_BS, ids_BS.roll(-1, 1))
            engine.backward(training_loss(output, config.balance), share=1 / MICRO, last=micro == MICRO - 1)
            assert output.ce is not None
            loss_sum += float(output.ce) / MICRO
            counts = counts + output.expert_counts_LE
        if told is not None and step == 1:
            told.expert_norms.update(expert_grad_norms(engine))
        update = engine.step(1e-2)
        if told is not None:
            told.losses.append(float(engine.sum_ranks(torch.tensor(loss_sum))) / RANKS)
            told.counts.append(engine.sum_ranks(counts).int().tolist())
            told.norms.append(update.grad_norm)


def train(name: str, kind: Kind, folder: Path) -> Told:
    case = CASES[name]
    config = config_of(case, kind)
    engine = built(case, config, name)
    told = Told([], [], [], {}, find_sites(engine.module).info.num_parameters, {}, True)
    take(engine, config, range(2), told)
    if kind == "deepspeed":
        kept = engine.weights()
        engine.save_state(folder)
    take(engine, config, range(2, STEPS), told)
    told.weights.update({key: value.float().numpy() for key, value in engine.weights().items()})
    if kind == "torch":
        return told
    passes = getattr(engine.module.model.draws, "passes", None)
    engine.destroy()
    again = built(case, config, name)
    again.load_state(kept, folder)
    take(again, config, range(2, STEPS), None)
    same = all(np.array_equal(value.float(), told.weights[key]) for key, value in again.weights().items())
    assert getattr(again.module.model.draws, "passes", None) == passes
    again.destroy()
    return told._replace(resumed=same)


GATED = (
    routed(capacity_factor=0.6),
    {"zero_stage": 1, "expert_parallel": 2, "expert_gate": "deepspeed"},
)


def read_gate(case: Case) -> dict[str, Any]:
    """What a probe reads of DeepSpeed's gates on all ranks, and what they should have decided by their inputs."""
    engine = built(case, config_of(case, "deepspeed"), "")
    gates = [gate for name, gate in engine.module.named_modules() if name.endswith("deepspeed_moe.gate")]
    inputs_LTD: list[torch.Tensor] = []
    for gate in gates:
        gate.register_forward_pre_hook(lambda module, args: inputs_LTD.append(args[0].detach()))
    sink = Kept()
    group = dist.new_group(backend="gloo")
    probe = attach(engine.module, sink, policy=EVERYTHING, rank=engine.rank, process_group=group)
    ids_BS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(engine.rank))
    weights = [gate.wg.weight.detach() for gate in gates]  # type: ignore[union-attr]
    engine.backward(engine.forward(ids_BS, ids_BS.roll(-1, 1)).ce)  # type: ignore[arg-type]
    probe.step()
    probe.close()
    decided = [
        recount((x_TD @ weight.T).tolist(), 0.6) for x_TD, weight in zip(inputs_LTD, weights, strict=True)
    ]
    expected_2LE = engine.sum_ranks(torch.tensor(decided).transpose(0, 1).contiguous())
    engine.destroy()
    loads = sink.of(LoadRecord)
    return {
        "records": len(loads),
        "counts": loads[0].counts_LE.tolist() if loads else None,
        "dropped": loads[0].dropped_LE.tolist() if loads and loads[0].dropped_LE is not None else None,
        "expected": expected_2LE.tolist(),
    }


def recount(logits_TE: list[list[float]], factor: float) -> tuple[list[int], list[int]]:
    """(wanted, dropped) of each expert: all first choices in order, then all second ones, until it is full."""
    num_experts = len(logits_TE[0])
    best = [sorted(range(num_experts), key=lambda e: -row[e])[:2] for row in logits_TE]
    capacity = math.ceil(len(best) * 2 * factor / num_experts)
    wanted, dropped = [0] * num_experts, [0] * num_experts
    for slot in range(2):
        for choice in best:
            wanted[choice[slot]] += 1
            dropped[choice[slot]] += wanted[choice[slot]] > capacity
    return wanted, dropped


def work(rank: int, port: int, folder: Path, answer: Connection) -> None:
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": 0}
    os.environ.update({key: str(value) for key, value in {**alone, "WORLD_SIZE": RANKS}.items()})
    torch.set_num_threads(1)
    try:
        told = {name: {kind: train(name, kind, folder / name)._asdict() for kind in KINDS} for name in CASES}
        seen = read_gate(Case(*GATED))
        if rank == 0:
            answer.send((told, seen))
    except BaseException:
        answer.send(traceback.format_exc())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every case on four ranks, each rank with all experts (plain torch) and with its share of them; a read gate."""
    context, port, folder = (
        multiprocessing.get_context("forkserver"),
        free_port(),
        tmp_path_factory.mktemp("shares"),
    )
    context.set_forkserver_preload(["deepspeed", "trainer.engine_deepspeed", "trainer.expert_gate", __name__])
    pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
    ranks = [
        context.Process(target=work, args=(rank, port, folder, pipes[rank][1]), daemon=True)
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    readers: list[Any] = [read for read, _ in pipes]
    ready: list[Any] = wait(readers, 900)
    assert ready, "the ranks did not answer"
    told: Any = ready[0].recv()
    assert not isinstance(told, str), told
    for process in ranks:
        process.join(60)
    return told


@pytest.fixture(scope="module")
def trained(worked: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, dict[str, Told]]:
    return {name: {kind: Told(**each) for kind, each in kinds.items()} for name, kinds in worked[0].items()}


def test_the_gate_of_deepspeed_is_read_on_all_ranks(
    worked: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    seen = worked[1]
    assert seen["records"] == 1, "the first rank writes loads, summed over all"
    counts_LE, dropped_LE = seen["expected"]
    assert seen["counts"] == counts_LE
    assert seen["dropped"] == dropped_LE
    assert np.sum(counts_LE) == 2 * RANKS * B * S * 2
    assert np.sum(dropped_LE) > 0


@pytest.mark.parametrize("name", list(CASES))
def test_shared_experts_train_as_whole_ones(trained: dict[str, dict[str, Told]], name: str) -> None:
    whole, shared = trained[name]["torch"], trained[name]["deepspeed"]
    close = CASES[name].tolerance
    assert shared.losses == pytest.approx(whole.losses, abs=close)
    assert whole.norms[0] > 0.05, "the gradient is clipped"
    assert shared.parameters == whole.parameters == CASES[name].model.num_parameters()
    assert shared.weights.keys() == whole.weights.keys()
    if name == "bf16":  # the engines round at other places
        return
    assert shared.counts == whole.counts
    assert shared.norms == pytest.approx(whole.norms, rel=1e-3)
    assert shared.expert_norms == pytest.approx(whole.expert_norms, rel=1e-3, abs=1e-6)
    for key, values in whole.weights.items():
        np.testing.assert_allclose(shared.weights[key], values, atol=1e-3, err_msg=key)


@pytest.mark.parametrize("name", list(CASES))
def test_their_state_comes_back_to_the_bit(trained: dict[str, dict[str, Told]], name: str) -> None:
    assert trained[name]["deepspeed"].resumed


FLAGS = [
    "--preset",
    "smoke",
    "--dim",
    "16",
    "--vocab-size",
    "280",
    "--bytes-per-domain",
    "12000",
    "--dtype",
    "fp32",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--log-routing",
    "--save-every",
    "2",
    "--eval-every",
    "3",
    "--probe-every",
    "2",
    "--max-steps",
    "6",
]


@pytest.mark.slow
def test_a_command_shares_experts_and_keeps_whole_ones(tmp_path: Path, no_packing: None) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run_training(parse([*FLAGS, "--batch-size", "4", "--run", str(one)]))
    sharing = [
        "--batch-size",
        "2",
        "--num-ranks",
        "2",
        "--engine",
        "deepspeed",
        "--zero-stage",
        "2",
        "--expert-parallel",
        "2",
    ]
    command([*FLAGS, *sharing, "--run", str(two)])
    expected, found = recorded(one), recorded(two)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    assert found["pes"] == pytest.approx(expected["pes"], abs=1e-4)
    assert found["loads"] == expected["loads"]
    checkpoint = two / "checkpoints/step-00000006"
    found_there = read_checkpoint(checkpoint)
    with pytest.raises(
        MoevizError, match=r"is of 2 ranks with DeepSpeed's experts.*go on with --num-ranks 2"
    ):
        on_ranks(found_there, found_there.config, 4)
    assert alone.checkpoint is not None
    whole = load_checkpoint(alone.checkpoint).model.state_dict()
    for name, value in load_checkpoint(checkpoint).model.state_dict().items():
        torch.testing.assert_close(value, whole[name], atol=1e-3, rtol=0, msg=name)


def command(words: list[str]) -> None:
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    words = [sys.executable, "-m", "moeviz.cli", "train", *words]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def recorded(run: Path) -> dict[str, Any]:
    """Losses, similarity of experts, and loads of a run."""
    with open_run(run) as store:
        losses = {name: scalars(store, [name])["value"].tolist() for name in ("loss", "val_loss")}
        similar = store.sql("SELECT value FROM metrics WHERE name = 'pes' ORDER BY step, layer")
        loads = store.sql("SELECT step, layer, counts FROM expert_load ORDER BY step, layer")
    rows = [(step, layer, *counts) for step, layer, counts in loads.itertuples(index=False)]
    return {**losses, "pes": similar["value"].tolist(), "loads": rows}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": "torch"},
            r"expert_parallel=2 with engine=torch: only DeepSpeed has it; add --engine deepsp",
        ),
        ({"zero_stage": 3}, r"expert_parallel=2 with zero_stage=3 .* use --zero-stage 2"),
        ({"num_ranks": 3}, r"expert_parallel=2 does not divide num_ranks=3; give --num-ranks a multiple"),
        ({"expert_parallel": 0}, r"expert_parallel=0 is below 1"),
        ({"auto_batch": True}, r"expert_parallel=2 with auto_batch: .* leave --auto-batch out"),
        ({"dtype": "fp16", "zero_stage": 0}, r"expert_parallel=2 with dtype=fp16 .* use --zero-stage 1 or 2"),
    ],
)
def test_what_cannot_share_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoevizError, match=message):
        EngineConfig(**{"engine": "deepspeed", "expert_parallel": 2, **changes})


def test_experts_that_cannot_be_shared_evenly_are_refused() -> None:
    three = EngineConfig(engine="deepspeed", expert_parallel=3)
    with pytest.raises(MoevizError, match="expert_parallel=3 does not divide num_experts=8"):
        TrainConfig(model=MODEL, engine=three)
    with pytest.raises(MoevizError, match="expert_parallel=3, and this model has no experts"):
        TrainConfig(model=replace(MODEL, first_dense_layers=2), engine=three)


def test_one_rank_shares_with_nobody() -> None:
    config = TrainConfig(
        model=MODEL, engine=EngineConfig(engine="deepspeed", expert_parallel=2, device="cpu")
    )
    with pytest.raises(
        MoevizError, match="expert_parallel=2 does not divide 1 ranks; give --num-ranks a multiple"
    ):
        build_engine(MoELanguageModel(MODEL), config)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            routed(score="sigmoid"),
            {},
            "expert_gate=deepspeed with score=sigmoid, which .* know .it has softmax",
        ),
        (
            MODEL,
            {"balance": BalanceConfig(balance="bias")},
            r"selection_bias=True, .* \(choose --balance aux",
        ),
        (replace(MODEL, top_k=1), {}, "expert_gate=deepspeed with norm_topk=True"),
        (replace(MODEL, first_dense_layers=2), {}, "expert_gate=deepspeed, and this model has no experts"),
        (MODEL, {"optim": OptimConfig(optimizer="muon")}, "optimizer=muon would turn the gate as well"),
        (
            MODEL,
            {"response": ResponseConfig(on_alert=("DEAD=reinit_router",))},
            "on_alert reinit_router: the router is DeepSpeed's",
        ),
        (MODEL, {"prune": PruneConfig(prune_experts=("2=4",))}, "with prune_experts: experts leave"),
    ],
)
def test_what_the_gate_of_deepspeed_does_not_know_is_refused(
    model: ModelConfig, changes: dict[str, Any], message: str
) -> None:
    engine = EngineConfig(engine="deepspeed", zero_stage=0, expert_gate="deepspeed")
    with pytest.raises(MoevizError, match=message):
        TrainConfig(model=model, engine=engine, **{"balance": BalanceConfig(balance="aux"), **changes})


def test_the_gate_of_deepspeed_needs_deepspeed() -> None:
    with pytest.raises(MoevizError, match="expert_gate=deepspeed with engine=torch: only DeepSpeed has it"):
        EngineConfig(expert_gate="deepspeed")
