"""Many ranks are one run: the same steps on any number of them, one trainer for a folder, and a loss that is told."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from trainer_runs import TOY, corpus_cache, no_packing, toy

from moeviz.errors import MoevizError
from trainer.checkpoint import Checkpoint
from trainer.config import InputConfig, TrainConfig
from trainer.data_batches import TokenBatches
from trainer.launch_status import free_port
from trainer.process_group import LostRankError, average_gradients, lost_ranks_told
from trainer.resume import check_resumable, on_ranks
from trainer.run_lock import RunLock
from trainer.text import open_text
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]


def config_of(batch_size: int, micro_batches: int) -> TrainConfig:
    data = InputConfig(batch_size=batch_size, gradient_accumulation_steps=micro_batches)
    return TrainConfig(data=data)


def found_of(config: TrainConfig, ranks: int) -> Checkpoint:
    return Checkpoint(
        path=Path("step-00000002"), step=2, config=config, model_config=config.model, num_ranks=ranks
    )


@pytest.mark.parametrize(
    ("before", "ranks_before", "ranks_now", "expected"),
    [
        ((4, 3), 2, 1, (4, 6)),
        ((4, 6), 1, 2, (4, 3)),
        ((4, 1), 1, 2, (2, 1)),
        ((6, 2), 1, 3, (4, 1)),
        ((4, 3), 1, 2, (3, 2)),
        ((4, 3), 2, 2, (4, 3)),
    ],
)
def test_another_number_of_ranks_keeps_the_sequences_of_a_step(
    before: tuple[int, int], ranks_before: int, ranks_now: int, expected: tuple[int, int]
) -> None:
    found = found_of(config_of(*before), ranks_before)
    config = on_ranks(found, found.config, ranks_now)
    assert (config.data.batch_size, config.data.gradient_accumulation_steps) == expected
    assert config.data.sequences_per_step * ranks_now == found.config.data.sequences_per_step * ranks_before
    check_resumable(found, config, ranks_now)


def test_a_step_that_cannot_be_shared_is_refused() -> None:
    found = found_of(config_of(4, 3), 1)
    with pytest.raises(MoevizError, match="12 sequences, which 5 ranks cannot share"):
        on_ranks(found, found.config, 5)
    chosen = replace(found.config, data=replace(found.config.data, batch_size=1))
    with pytest.raises(
        MoevizError, match=r"batch_size=1 x gradient_accumulation_steps=3 on 2 ranks makes other"
    ):
        on_ranks(found, chosen, 2)
    fits = replace(found.config, data=replace(found.config.data, batch_size=2))
    assert on_ranks(found, fits, 2) is fits
    with pytest.raises(MoevizError, match=r"data\.batch_size=2 differs from 4"):
        check_resumable(found, fits, 1)


def test_the_rows_of_a_step_do_not_depend_on_the_ranks(corpus_cache: Path) -> None:
    shards = open_text(TOY).batches.shards
    found = found_of(config_of(4, 3), 1)

    def rows_of(ranks: int) -> list[bytes]:
        data = on_ranks(found, found.config, ranks).data
        micro_batches = data.gradient_accumulation_steps
        batches = TokenBatches(shards, batch_size=data.batch_size, seq_len=8, micro_batches=micro_batches)
        cut = [batches.batch(5, m, rank, ranks) for m in range(micro_batches) for rank in range(ranks)]
        return sorted(row.tobytes() for batch in cut for row in batch.input_ids_BS)

    assert rows_of(1) == rows_of(2) == rows_of(3) == rows_of(6)


def _averaged(rank: int, port: int, answer: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (5,), (4,), (1, 7))]
    for place, weight in enumerate(weights[:3]):
        weight.grad = torch.full_like(weight, float(10 * rank + place))
    if rank == 1:
        weights[1].grad = None
    average_gradients([*weights, nn.Parameter(torch.zeros(2), requires_grad=False)])
    answer.send([None if weight.grad is None else weight.grad.tolist() for weight in weights])
    dist.destroy_process_group()


def test_gradients_become_their_mean_and_those_of_nobody_stay_away() -> None:
    context, port = multiprocessing.get_context("spawn"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        context.Process(target=_averaged, args=(rank, port, write)) for rank, (_, write) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    for read, _ in pipes:
        assert read.poll(300)
        assert read.recv() == [[[5.0] * 3] * 2, [0.5] * 5, [7.0] * 4, None]
    for process in ranks:
        process.join(300)


def test_a_second_trainer_on_a_run_folder_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run")
    with pytest.raises(MoevizError, match=rf"is being trained by process {os.getpid()} on .*; wait for it"):
        RunLock(tmp_path / "run")
    first.release()
    RunLock(tmp_path / "run").release()


def test_a_run_that_is_trained_cannot_be_trained_by_another_and_loses_nothing(
    tmp_path: Path, no_packing: None
) -> None:
    config = toy(tmp_path / "run", max_steps=2)
    train(config)
    before = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    lock = RunLock(tmp_path / "run")
    longer = replace(config, resume=str(config.run), max_steps=4)
    with pytest.raises(MoevizError, match="is being trained by process"):
        train(longer)
    assert sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file()) == before
    lock.release()
    assert train(longer).steps_done == 4


def test_one_process_is_not_two_ranks(tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match=r"num_ranks=2, but 1 processes run; `moeviz train --num-ranks 2`"):
        train(toy(tmp_path / "run", engine={"num_ranks": 2}))


def test_only_what_a_lost_rank_causes_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(LostRankError, match=r"rank 1 lost another rank.*closed by peer.*--resume"),
        lost_ranks_told(),
    ):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1\nand more")
    with pytest.raises(RuntimeError, match="shapes") as other, lost_ranks_told():
        raise RuntimeError("shapes cannot be multiplied")
    assert not isinstance(other.value, MoevizError)
