"""Several processes, one run: who is first, and how the others wait for it, over a gloo group of moeviz's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moeviz.errors import MoevizError

PATIENCE = timedelta(seconds=60)
"""How long a rank waits for another one."""

_log = logging.getLogger("moeviz")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """A gloo group over all ranks, or None when each is on its own."""

    @classmethod
    def of_process(cls, rank: int | None, across: bool) -> Ranks:
        """The ranks of torch.distributed where it is initialised. With `across`, every rank must come here.

        Raises:
            MoevizError: another rank did not come.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(rank or 0)
        size = dist.get_world_size()
        mine = dist.get_rank() if rank is None else rank
        if size == 1 or not across:
            return cls(mine, size)
        try:
            return cls(mine, size, dist.new_group(backend="gloo", timeout=PATIENCE))
        except Exception as error:
            raise MoevizError(
                f"not all {size} ranks called moeviz.watch within {PATIENCE.seconds} s; call it on every rank, "
                "or pass across_ranks=False and a run folder for each"
            ) from error

    def first_then_all(self, work: Callable[[], None]) -> None:
        """Do `work` on rank 0 while the others wait. What it raises there is raised on every rank."""
        if self.group is None:
            work()
            return
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                work()
            except Exception as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[0] is not None:
            raise outcome[0]

    def wait(self) -> bool:
        """Wait until every rank is here. False when one did not come."""
        if self.group is None:
            return True
        try:
            dist.barrier(group=self.group)
        except Exception as error:
            _log.warning("a rank did not finish its records (%s); the run is left unpacked", error)
            return False
        return True
