"""One run, many ranks: loads are summed over ranks off the training thread, and rank 0 writes them.

The sum runs on the host over a process group of its own (gloo), in the writer thread: it shares no stream
and no order of collectives with training. A rank whose step failed takes part with zeros and says so; then
nobody writes that step. When the group breaks, summing ends and each such step is reported as failed work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_GONE = "a rank is gone, and with it its part of the loads that were not summed yet"


class RankSum:
    """Adds arrays over the ranks of a process group."""

    def __init__(self, group: Any) -> None:
        """`group`: a torch.distributed process group that works on CPU tensors, used by nobody else."""
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.ranks: int = dist.get_world_size(group)
        self._broken: Exception | None = None

    def total(
        self, integers: np.ndarray, floats: np.ndarray, *, whole: bool
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Sums over ranks; None when a rank's part is not `whole`. Every rank calls this for every step.

        Raises:
            RuntimeError: a rank is gone, now or at an earlier call.
        """
        if self._broken is not None:
            raise RuntimeError(_GONE) from self._broken
        counts = torch.from_numpy(np.append(integers.astype(np.int64).ravel(), np.int64(whole)))
        sums = torch.from_numpy(floats.astype(np.float32).ravel().copy())
        try:
            self._dist.all_reduce(counts, group=self._group)
            self._dist.all_reduce(sums, group=self._group)
        except Exception as error:
            self._broken = error
            raise RuntimeError(_GONE) from error
        if int(counts[-1]) != self.ranks:
            return None
        return counts[:-1].numpy().reshape(integers.shape), sums.numpy().reshape(floats.shape)
