"""Ranks for tests: processes that train one config after the other together, and what became of each."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.launch_status import free_port
from trainer.process_group import leave_ranks
from trainer.train import TrainResult, train

_SECONDS = 900.0


def trained_by(ranks: int, configs: Sequence[TrainConfig]) -> list[list[TrainResult]]:
    """Train each config on `ranks` processes. Returns, for each config, the results of all ranks."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, list(configs), write), daemon=True)
        for rank, (_, write) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        told = [_answer(rank, read) for rank, (read, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    failed = [f"rank {rank}: {each}" for rank, each in enumerate(told) if isinstance(each, str)]
    assert not failed, "\n".join(failed)
    return [list(each) for each in zip(*told, strict=True)]


def _rank(rank: int, ranks: int, port: int, configs: list[TrainConfig], answer: Connection) -> None:
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    try:
        answer.send([train(config) for config in configs])
    except BaseException:
        answer.send(traceback.format_exc())
        raise
    leave_ranks()


def _answer(rank: int, read: Connection) -> Any:
    """Its results, or the text of its error."""
    assert read.poll(_SECONDS), f"rank {rank} did not answer"
    return read.recv()


def children(parent: int) -> Iterator[int]:
    """Processes that a process started and that still run."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                yield int(status.parent.name)
        except OSError:  # it has ended meanwhile
            continue


def variable(process: int, name: str) -> str | None:
    """A variable of a process's environment."""
    words = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(word.partition("=")[::2] for word in words if word).get(name)
