"""Leaving a run's steps to go on from a checkpoint of it, in the same process, as a resumed run would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.standing import Standing


class Restart(Exception):
    """Raised between two steps on every rank, and answered by `trainer.train`."""

    def __init__(
        self,
        checkpoint: Path,
        carry_on: Callable[[Standing], None],
        event: Mapping[str, Any],
        *,
        ends_run: bool = False,
    ) -> None:
        """
        Args:
            checkpoint: where to go on.
            carry_on: changes what its `Standing` says.
            event: recorded as the first thing then; `kind` and details.
            ends_run: the checkpoint is in another run's folder, and this one is complete.
        """
        super().__init__(f"going on from {checkpoint}")
        self.checkpoint, self.carry_on, self.event = checkpoint, carry_on, dict(event)
        self.ends_run = ends_run
