"""Where a run stands besides its weights: what guards, interventions and the micro-batch remember between steps.

Plain numbers, written into every checkpoint, because a resumed run must go on with them to the bit.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from trainer.config import BalanceConfig

STANDING_FILE = "standing.json"


@dataclass(kw_only=True)
class Standing:
    """Changes as the run goes on."""

    data_offset: int = 0
    """Steps' worth of data that were passed over: step s reads what step s + data_offset would have."""
    micro_batch: int | None = None
    """Sequences of one micro-batch on each rank, where the trainer chose it. None: batch_size."""
    bad_steps: int = 0
    """Steps skipped in a row, up to now."""
    rewinds: int = 0
    """How often the run went back before a spike of the loss."""
    recent_losses: list[float] = field(default_factory=list)
    """What a spike is judged by, oldest first."""
    best_loss: float | None = None
    """Least validation loss so far, nats."""
    best_step: int | None = None
    """Whose weights have it."""
    rate_factor: float = 1.0
    """What interventions made of the learning rate."""
    bias_factor: float = 1.0
    """... of bias_step."""
    aux_factor: float = 1.0
    """... of aux_coef."""
    usage: list[list[int]] = field(default_factory=list)
    """Assignments of each layer's experts that the next pruning goes by."""
    responded: dict[str, int] = field(default_factory=dict)
    """Step of the last response to each open alert."""

    def balance(self, config: BalanceConfig) -> BalanceConfig:
        """The config as interventions left it."""
        if self.bias_factor == self.aux_factor == 1.0:
            return config
        return replace(
            config,
            bias_step=config.bias_step * self.bias_factor,
            aux_coef=config.aux_coef * self.aux_factor,
        )

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint folder. Numbers come back to the bit."""
        (folder / STANDING_FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Standing:
        """The inverse; a checkpoint that has none is one of a run that remembers nothing."""
        path = folder / STANDING_FILE
        known = {each.name for each in fields(cls)}
        data = json.loads(path.read_text()) if path.exists() else {}
        return cls(**{name: value for name, value in data.items() if name in known})
