"""The micro-batch that memory holds: found by trial, made smaller where memory runs out, the step unchanged.

A step is a fixed list of rows. How they are cut into micro-batches changes the order of additions and, where a
loss or noise belongs to a micro-batch (the balance loss, router noise), what those see; nothing else. The size is
kept in checkpoints, so a resumed run cuts as the first one did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeviz.errors import MoevizError
from trainer.allocator import give_back
from trainer.balance import training_loss
from trainer.config import TrainConfig
from trainer.data_batches import Batch
from trainer.engine import Engine
from trainer.text import Text

_SPARE = 0.7
"""Share of the free memory that activations may take on a CPU, whose system kills instead of refusing."""


def cut(batches: Iterable[Batch], size: int) -> list[Batch]:
    """The same rows in the same order, `size` at a time; the last ones may be fewer."""
    whole = _joined(list(batches))
    return [_rows(whole, first, first + size) for first in range(0, len(whole.domains), size)]


def _joined(batches: Sequence[Batch]) -> Batch:
    columns = [[getattr(batch, each.name) for batch in batches] for each in fields(Batch)]
    return Batch(*(_concatenated(column) for column in columns))


def _concatenated(parts: list[Any]) -> Any:
    if parts[0] is None:
        return None
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else sum(parts, ())


def _rows(batch: Batch, first: int, end: int) -> Batch:
    values: Any = (getattr(batch, each.name) for each in fields(Batch))
    columns: Any = (None if value is None else value[first:end] for value in values)
    return Batch(*columns)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what an operation lacked; on a CPU torch says so in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def chance_kept(engine: Engine) -> Iterator[None]:
    """Where the block fails, random numbers go on as if it had not begun."""
    states = _random_states(engine)
    try:
        yield
    except BaseException:
        _set_random_states(engine, states)
        raise


def _random_states(engine: Engine) -> tuple[Tensor, Tensor | None, int]:
    draws = engine.module.model.draws
    cuda = torch.cuda.get_rng_state(engine.device) if engine.device.type == "cuda" else None
    return torch.get_rng_state(), cuda, draws.passes if draws is not None else 0


def _set_random_states(engine: Engine, states: tuple[Tensor, Tensor | None, int]) -> None:
    cpu, cuda, passes = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, engine.device)
    if engine.module.model.draws is not None:
        engine.module.model.draws.passes = passes


def smaller(size: int, config: TrainConfig, engine: Engine, step: int) -> int:
    """The size to try after `size` sequences did not fit.

    Raises:
        MoevizError: it may not be changed, or there is no smaller one.
    """
    said = f"step {step} ran out of memory with micro-batches of {size} sequences"
    if not config.engine.auto_batch:
        raise MoevizError(f"{said}; add --auto-batch, or lower --batch-size and accumulate more of them")
    if engine.world_size > 1:
        raise MoevizError(
            f"{said} on one of {engine.world_size} ranks; resume with --gradient-checkpointing, or start anew with a "
            "smaller --batch-size"
        )
    if size == 1:
        raise MoevizError(f"{said}; shorten --seq-len, add --gradient-checkpointing, or take a smaller model")
    return size // 2


def largest_that_fits(engine: Engine, text: Text, config: TrainConfig) -> int:
    """Sequences of the largest micro-batch whose forward and backward pass memory holds, on every rank.

    Halves of a whole step are tried, largest first; what is tried leaves no trace.

    Raises:
        MoevizError: not even one sequence fits.
    """
    whole = _joined(
        [
            text.batches.batch(0, micro, engine.replica, engine.num_replicas)
            for micro in range(config.data.gradient_accumulation_steps)
        ]
    )
    size = len(whole.domains)
    if engine.device.type == "cpu":
        size = max(min(size, _held_by_cpu(engine, _rows(whole, 0, 1), config)), 1)
    while not _fits(engine, _rows(whole, 0, size), config):
        if size == 1:
            raise MoevizError(
                f"not one sequence of {config.data.seq_len} tokens fits into memory; shorten --seq-len, add "
                "--gradient-checkpointing, or take a smaller model"
            )
        size //= 2
    return _least_of_ranks(engine, size, len(whole.domains))


def _least_of_ranks(engine: Engine, size: int, largest: int) -> int:
    votes = torch.zeros(largest + 1, device=engine.device)
    votes[size] = 1
    return int(engine.sum_ranks(votes).nonzero()[0])


def _fits(engine: Engine, batch: Batch, config: TrainConfig) -> bool:
    """Forward and backward, on copies of nothing: no gradient is kept and no hook of the engine runs."""
    states = _random_states(engine)
    try:
        _gradients(engine, batch, config)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        _set_random_states(engine, states)
    return True


def _gradients(engine: Engine, batch: Batch, config: TrainConfig) -> None:
    output = engine.module(
        torch.from_numpy(batch.input_ids_BS).to(engine.device),
        torch.from_numpy(batch.labels_BS).to(engine.device),
    )
    trained = [weight for weight in engine.module.parameters() if weight.requires_grad]
    torch.autograd.grad(training_loss(output, config.balance), trained, allow_unused=True)


def _held_by_cpu(engine: Engine, one: Batch, config: TrainConfig) -> int:
    """How many sequences fit into free memory, by what one of them keeps for its backward pass."""
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    states = _random_states(engine)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        _gradients(engine, one, config)
    _set_random_states(engine, states)
    give_back()  # what is kept for the next step is free, and the system counts it as taken
    weights = {weight.untyped_storage().data_ptr() for weight in engine.module.parameters()}
    per_sequence = sum(size for place, size in kept.items() if place not in weights)
    return int(_SPARE * free_memory_bytes() / max(per_sequence, 1))


def free_memory_bytes(memory: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may still take on the CPU: of the machine, or less in a container."""
    free = 1 << 62
    if memory.is_file():
        lines = dict(line.split(":", 1) for line in memory.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        free = min(free, max(int(limit.read_text()) - int(used.read_text()), 0))
    return free
