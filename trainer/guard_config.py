"""What happens on a run's way besides its steps, as plain data without torch: bad steps, spikes, experts that leave or
are doubled."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.optim_config import require_rule


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What keeps a bad step from spoiling a run."""

    max_bad_steps: int = 3
    """Steps in a row that may be skipped because loss or gradient is not a number, before training stops."""
    spike_rewind: bool = False
    """At a spike of the loss go back to the last checkpoint, and pass over the data between it and the spike."""
    spike_window: int = 128
    """Steps before it that a spike is judged by."""
    spike_sd: float = 6.0
    """Standard deviations above their mean that make a spike."""
    max_rewinds: int = 5
    """How often a run goes back; later spikes are recorded only."""

    def __post_init__(self) -> None:
        bad = self.max_bad_steps
        require_rule(bad >= 0, f"max_bad_steps={bad}", "is negative; 0 stops at the first bad step")
        window, sd = self.spike_window, self.spike_sd
        require_rule(window >= 2, f"spike_window={window}", "is below 2; 128 is usual")
        require_rule(sd > 0, f"spike_sd={sd}", "is not positive; 6 is usual")
        require_rule(
            self.max_rewinds >= 0, f"max_rewinds={self.max_rewinds}", "is negative; 0 never goes back"
        )


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Experts that leave, or are doubled, while a run trains."""

    prune_experts: tuple[str, ...] = ()
    """STEP=EXPERTS ...: before this step keep so many experts of each layer, the most used ones. The run goes on in a
    folder of its own, RUN-EXPERTS-experts."""
    grow_experts: tuple[str, ...] = ()
    """STEP=EXPERTS ...: before this step copy the most used experts of each layer until there are so many, twice as
    many at most. Router rows of the copies get a little noise; the loss rises for a moment. The run goes on in a folder
    of its own, RUN-EXPERTS-experts."""
    prune_window: int = 200
    """Steps before it that their use is measured in."""

    def __post_init__(self) -> None:
        require_rule(self.prune_window >= 1, f"prune_window={self.prune_window}", "is below 1; 200 is usual")
        self.plan  # noqa: B018  # refuses what cannot be read here

    @property
    def plan(self) -> dict[int, int]:
        """Experts that there are then, by step."""
        fewer, more = (self._read(name) for name in ("prune_experts", "grow_experts"))
        both = sorted(fewer.keys() & more.keys())
        require_rule(not both, f"step {both[:1]}", "both prunes and grows; name another step for one of them")
        return {**fewer, **more}

    def grows_at(self, step: int) -> bool:
        """Whether experts are doubled at this step, rather than left out."""
        return step in self._read("grow_experts")

    def _read(self, name: str) -> dict[int, int]:
        plan = {}
        for text in getattr(self, name):
            step, _, experts = text.partition("=")
            readable = step.isdecimal() and experts.isdecimal() and int(step) > 0 and int(experts) > 0
            require_rule(
                readable, f"{name}={text!r}", "is no STEP=EXPERTS; 1000=6 means six experts from step 1000 on"
            )
            plan[int(step)] = int(experts)
        return plan
