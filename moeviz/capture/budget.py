"""A budget for samples: how far the policy is thinned so that token-level rows and maps keep within it.

Loads are no sample and are never touched. Level n stands for 1/2^n of the volume that the policy asks for: first
fewer sequences, then fewer steps. The level follows from the cost of a recorded sequence, which is known from
shapes, and from the seconds a step takes; nothing waits for the device, and training never reads it.

It rises at once when the budget is exceeded, and falls a level only when the larger volume would have kept
well within the budget several times in a row: so it settles instead of swinging.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from moeviz.policy import SamplingPolicy

_FIRST_SECONDS, _SECONDS, _STEPS = 1.0, 10.0, 3
"""The time of a step is a mean over this long (the first time; then) and over so many steps at least."""
_WELL_WITHIN, _CALM_LOOKS = 0.8, 3
"""A level falls when it would use less than this share of the budget, at so many looks one after another."""
_LOWEST = 20
"""Level from which nothing is recorded: a millionth of the volume shows nothing, and a spent run budget is spent."""

_DECISION_BYTES, _TOKEN_BYTES, _CELL_BYTES = 1.6, 4.0, 0.3
"""On disk, as measured: a decision with its gate weight; a token's id and loss; a cell of a map."""


class Volume(NamedTuple):
    """What the samples of one step amount to."""

    sequences: int
    decisions: int
    """(token, layer, slot) triples, padding included."""
    route_bytes: float
    """Of token-level rows and their texts on disk, estimated."""
    picture_bytes: float
    """Of attention maps and latents."""


class Change(NamedTuple):
    """The budget moved the sampling to another level."""

    level: int
    policy: SamplingPolicy
    """What is recorded from the next step on."""
    cause: str
    """Name of the limit: a field of the policy."""

    def detail(self) -> dict[str, Any]:
        """What the event of the change says."""
        fields = ("route_every", "route_sequences", "attention_every", "latent_every")
        return {
            "level": self.level,
            "cause": self.cause,
            **{name: getattr(self.policy, name) for name in fields},
        }

    def message(self) -> str:
        """For people, once."""
        rows = f"{self.policy.route_sequences} sequences every {self.policy.route_every} steps"
        rows = rows if self.policy.route_every else "no token-level rows"
        return (
            f"{rows}, to keep within {self.cause}; loads stay complete, later changes are events of the run"
        )


def volume(sequences: int, experts: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Volume:
    """The volume of a step, from shapes alone.

    Args:
        sequences: how many were recorded.
        experts: token-level decisions [L, N, S, K].
        tensors: the other samples by the names of `SampleBatch.copy`.
    """
    decisions = sum(part.numel() for part in experts)
    tokens = sum(part.numel() for name, part in tensors.items() if name.startswith("ids/"))
    maps = sum(part.numel() for name, part in tensors.items() if name.startswith("maps/"))
    latents = sum(part.nbytes for name, part in tensors.items() if name.startswith("latent/"))
    route_bytes = _DECISION_BYTES * decisions + _TOKEN_BYTES * tokens
    return Volume(sequences, decisions, route_bytes, _CELL_BYTES * maps + latents)


class Budget:
    """Follows the volume of the samples and says when the sampling changes."""

    def __init__(
        self, policy: SamplingPolicy, spent_bytes: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`spent_bytes`: samples of the run that are on disk already; `clock`: seconds."""
        self._asked, self._clock = policy, clock
        self.limited = policy.has_budget
        """Whether there is anything to follow."""
        self.spent_bytes = spent_bytes
        self.level = 0
        self._routed = Volume(0, 0, 0.0, 0.0)
        """Newest step whose token-level rows were recorded."""
        self._picture_bytes = 0.0
        self._sequences = 1
        self._steps, self._since, self._patience = 0, clock(), _FIRST_SECONDS
        self._calm = 0

    def end_step(self, sequences: int, recorded: Volume | None) -> Change | None:
        """Count a step; the change of the sampling that follows, if any.

        Args:
            sequences: of the whole step, recorded or not.
            recorded: volume of its samples; None: it had none.
        """
        self._sequences = max(1, sequences)
        self._steps += 1
        if recorded is not None:
            self.spent_bytes += recorded.route_bytes + recorded.picture_bytes
            self._routed = recorded if recorded.decisions else self._routed
            self._picture_bytes = recorded.picture_bytes or self._picture_bytes
        level, cause = self._by_rate()
        floor = self._by_run()
        if floor > level:
            level, cause = floor, "max_run_megabytes"
        if level == self.level:
            return None
        self.level = level
        return Change(level, self.policy, cause)

    @property
    def policy(self) -> SamplingPolicy:
        """The policy at the present level."""
        if self.level >= _LOWEST:
            return self._asked.silenced()
        return self._asked.thinned(self.level, self._sequences)

    def use(self, level: int, step_seconds: float) -> tuple[float, str]:
        """(share of a rate's budget that `level` would use, 1: all of it; the name of that rate)."""
        policy = self._asked.thinned(level, self._sequences)
        wanted = self._sequences if policy.route_sequences == "all" else policy.route_sequences
        scale = min(wanted, self._sequences) / max(1, self._routed.sequences)
        steps = max(1, policy.route_every)
        pictures = max(1, min(filter(None, (policy.attention_every, policy.latent_every)), default=1))
        decisions = scale * self._routed.decisions / steps
        size = scale * self._routed.route_bytes / steps + self._picture_bytes / pictures
        shares = [
            (amount / step_seconds / limit, name)
            for amount, limit, name in (
                (decisions, self._asked.max_decisions_per_second, "max_decisions_per_second"),
                (size / 1e6, self._asked.max_megabytes_per_second, "max_megabytes_per_second"),
            )
            if limit > 0
        ]
        return max(shares, default=(0.0, ""))

    def _by_rate(self) -> tuple[int, str]:
        """The level that the rates ask for, looked at once in a while."""
        elapsed = self._clock() - self._since
        if elapsed < self._patience or self._steps < _STEPS:
            return self.level, ""
        step_seconds = elapsed / self._steps
        self._steps, self._since, self._patience = 0, self._clock(), _SECONDS
        share, cause = self.use(self.level, step_seconds)
        if share > 1:
            self._calm = 0
            levels = range(self.level + 1, _LOWEST)
            return next((n for n in levels if self.use(n, step_seconds)[0] <= 1), _LOWEST), cause
        below, cause = self.use(max(0, self.level - 1), step_seconds)
        self._calm = self._calm + 1 if self.level > 0 and below <= _WELL_WITHIN else 0
        if self._calm >= _CALM_LOOKS:
            self._calm = 0
            return self.level - 1, cause
        return self.level, ""

    def _by_run(self) -> int:
        """The level that keeps within the budget of the run: half the volume with half of it left, and so on."""
        limit = 1e6 * self._asked.max_run_megabytes
        if limit <= 0:
            return 0
        left = 1 - self.spent_bytes / limit
        return min(_LOWEST, math.floor(-math.log2(left))) if left > 0 else _LOWEST
