"""What ZeRO divided among ranks is whole again on another number of them: the run goes on as if it always had it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from test_trainer_engine import batch_of, config_of, engine_of

from moeviz.errors import MoevizError
from trainer.balance import move_bias, training_loss
from trainer.config import TrainConfig
from trainer.engine import Engine
from trainer.launch_status import free_port

CASES = [
    (0, "fp32", "adamw"),
    (1, "fp32", "adamw"),
    (3, "fp32", "adamw"),
    (2, "bf16", "adamw"),
    (2, "fp32", "muon"),
    (3, "fp32", "muon"),
]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case_of(stage: int, dtype: str, optimizer: str) -> tuple[TrainConfig, str]:
    return config_of("deepspeed", stage, dtype, optimizer=optimizer), f"{stage}-{dtype}-{optimizer}"


def shared_steps(engine: Engine, config: TrainConfig, first: int, last: int) -> list[float]:
    """Losses of steps of two micro-batches, which two ranks share."""
    losses = []
    for step in range(first, last):
        mine = range(engine.rank, 2, engine.world_size)
        loss, counts_LE = torch.zeros(()), torch.zeros(2, 4, dtype=torch.int64)
        for micro_batch in mine:
            output = engine.forward(*batch_of(step, micro_batch))
            engine.backward(
                training_loss(output, config.balance), share=1 / len(mine), last=micro_batch == mine[-1]
            )
            loss += output.ce.detach() / 2  # type: ignore[union-attr]
            counts_LE += output.expert_counts_LE
        assert engine.step(1e-2).taken
        move_bias(engine.module, engine.sum_ranks(counts_LE), config.balance)
        losses.append(float(engine.sum_ranks(loss)))
    return losses


def begun(config: TrainConfig, folder: Path) -> list[float]:
    """Two steps, saved."""
    engine = engine_of(config)
    losses = shared_steps(engine, config, 0, 2)
    if engine.rank == 0:
        folder.mkdir(parents=True)
    engine.sum_ranks(torch.zeros(()))
    weights = engine.weights()
    if engine.rank == 0:
        torch.save(weights, folder / "weights.pt")
    engine.save_state(folder)
    engine.destroy()
    return losses


def gone_on(config: TrainConfig, folder: Path) -> tuple[list[float], list[float]]:
    """Two more steps from other weights and what was saved, and the balance bias as it was loaded."""
    engine = engine_of(config, seed=99)
    engine.load_state(torch.load(folder / "weights.pt", weights_only=True), folder)
    bias_E = engine.weights()[BIAS].tolist()
    losses = shared_steps(engine, config, 2, 4)
    engine.destroy()
    return losses, bias_E


def _two_ranks(rank: int, port: int, folder: Path, answer: Connection) -> None:
    torch.set_num_threads(1)
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in told.items()})
    for case in CASES:
        config, name = case_of(*case)
        went_on = gone_on(config, folder / f"one-{name}")
        answer.send((went_on, begun(config, folder / f"two-{name}")))


@pytest.mark.slow
def test_any_stage_goes_on_with_more_ranks_and_with_fewer(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    whole = {}
    for case in CASES:
        config, name = case_of(*case)
        begun(config, tmp_path / f"one-{name}")
        engine = engine_of(config)
        losses = shared_steps(engine, config, 0, 2)
        bias_E = engine.weights()[BIAS].tolist()
        whole[case] = (losses + shared_steps(engine, config, 2, 4), bias_E)
        engine.destroy()
    context, port = multiprocessing.get_context("spawn"), free_port()
    read, write = context.Pipe(duplex=False)
    _, ignored = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=_two_ranks, args=(rank, port, tmp_path, pipe))
        for rank, pipe in enumerate((write, ignored))
    ]
    for process in ranks:
        process.start()
    for case in CASES:
        losses, bias_E = whole[case]
        config, name = case_of(*case)
        tolerance = 1e-5 if case[1:] == ("fp32", "adamw") else 5e-3  # Muon turns matrices in bf16
        assert read.poll(300), name
        (more, more_bias_E), before = read.recv()
        fewer, fewer_bias_E = gone_on(config, tmp_path / f"two-{name}")
        assert more == pytest.approx(losses[2:], abs=tolerance), (name, "one rank, then two")
        assert before == pytest.approx(losses[:2], abs=tolerance), (name, "two ranks")
        assert fewer == pytest.approx(losses[2:], abs=tolerance), (name, "two ranks, then one")
        assert more_bias_E == fewer_bias_E == bias_E
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0
    assert not list(tmp_path.rglob(".deepspeed-universal")), "nothing is left beside a checkpoint"


def test_a_state_that_cannot_be_converted_is_told_with_a_way_out(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    config = config_of("deepspeed", 1)
    begun(config, tmp_path / "state")
    (share,) = (tmp_path / "state" / "deepspeed").glob("*_optim_states.pt")
    (share.parent / share.name.replace("rank_0", "rank_1")).write_bytes(b"no state")
    engine = engine_of(config)
    with pytest.raises(MoevizError, match=r"could not be turned into .* --num-ranks 2"):
        engine.load_state({}, tmp_path / "state")
    engine.destroy()
