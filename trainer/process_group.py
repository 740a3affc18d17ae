"""Several processes, one run: how ranks find each other, add up what they computed, and notice that one is gone.

Every launcher (`moeviz train --num-ranks`, torchrun, deepspeed) sets the same five variables; nothing else of it is
used. Gradients are averaged by a sum in fp32 over fixed buckets: DistributedDataParallel orders its buckets by
the first backward pass of a process, so a resumed run of three or more ranks would add in another order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from moeviz.errors import MoevizError
from trainer.launch_status import free_port

_BUCKET_ELEMENTS = 8 * 2**20
_PLACE = re.compile(r"^\[[^]]*\]\s*")
"""Where in torch's source something happened, which gloo says first."""
_SIGNS = re.compile(
    r"closed by peer|reset by peer|[Cc]onnection refused|Broken pipe|[Tt]imed out|[Tt]imeout|NCCL|ProcessGroup|gloo"
)


class LostRankError(MoevizError):
    """Another rank is gone or does not answer; this one cannot go on alone."""


def launched_ranks() -> int:
    """Processes that a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join_ranks(timeout_minutes: float = 10.0) -> None:
    """Join the process group of the launcher, or make one of a single rank. Idempotent.

    Without a launcher the five variables that every launcher sets are given here, as long as it takes: DeepSpeed
    would ask for MPI.

    Raises:
        LostRankError: a rank did not come in time.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        alone = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        os.environ.update({name: str(value) for name, value in alone.items()})
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with lost_ranks_told():
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def leave_ranks() -> None:
    """Leave the process group, where there is one of several ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def agree_on(path: Path) -> Path:
    """The first rank's path, on every rank."""
    told = [str(path)]
    dist.broadcast_object_list(told, src=0)
    return Path(told[0])


def rank_seed(seed: int, rank: int, step: int = 0) -> int:
    """Seed of a rank's own draws; that of the run on the first rank at its beginning."""
    return (seed + 1_000_003 * rank + 7_919 * step) % (1 << 63)


@contextmanager
def lost_ranks_told() -> Iterator[None]:
    """What torch says when a rank is gone, as one sentence.

    Raises:
        LostRankError: in place of the error of a collective.
    """
    try:
        yield
    except RuntimeError as error:
        if launched_ranks() == 1 or not _is_loss(error):
            raise
        cause = _PLACE.sub("", str(error).strip().splitlines()[0]).partition(". ")[0]
        raise LostRankError(
            f"rank {os.environ.get('RANK', 0)} lost another rank, or waited too long for it ({cause[:200]}); "
            "checkpoints are whole: go on with --resume"
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or _SIGNS.search(str(error)) is not None


@torch.no_grad()
def average_gradients(weights: Sequence[nn.Parameter], group: Any = None) -> None:
    """Replace each gradient by its mean over the ranks. Every rank must call it with the same weights.

    A weight without a gradient counts as zero, unless no rank has one. `group`: ranks with these weights; None: all.
    """
    weights = [weight for weight in weights if weight.requires_grad]
    if not weights:
        return
    present = torch.tensor([float(weight.grad is not None) for weight in weights], device=weights[0].device)
    dist.all_reduce(present, group=group)
    used = [weight for weight, ranks in zip(weights, present.tolist(), strict=True) if ranks]
    for weight in used:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    for bucket in _buckets(used):
        _average([weight.grad for weight in bucket if weight.grad is not None], group)


def _buckets(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In the order given, as many at a time as fit: few large sums are faster than many small ones."""
    bucket: list[nn.Parameter] = []
    for weight in weights:
        if bucket and sum(each.numel() for each in bucket) + weight.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def _average(gradients: Sequence[Tensor], group: Any) -> None:
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
