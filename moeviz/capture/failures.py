"""Recording never stops training: errors are said once, counted, and end the probe if they go on.

The one exception is the first step. Until a step was recorded nothing has been promised, so a wrong hook, a
dense model or a compiled one is refused loudly with `ProbeError`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from moeviz.errors import MoevizError

PATIENCE = 5
"""Failing steps in a row after which the probe detaches itself."""

_log = logging.getLogger("moeviz.capture")


class ProbeError(MoevizError):
    """The probe cannot measure this model; the message says why and what to do."""


@dataclass
class Failures:
    """What went wrong while recording, and whether it keeps going wrong."""

    count: int = 0
    """All errors so far."""
    failing_steps: int = 0
    """Steps in a row that had one; a clean step sets it to 0."""
    last: Exception | None = None
    """The latest error of the step in progress; None while it is clean."""
    spoiled: bool = False
    """Whether a measurement of the step in progress is missing, so that its sums would be wrong."""
    _said: set[str] = field(default_factory=set)

    def note(self, where: str, error: Exception, *, name: str = "", spoils: bool = False) -> bool:
        """Count an error of `where`; log it the first time that this kind of error happens there.

        Args:
            where: what was being done, for people.
            error: what happened.
            name: of the module it happened at; errors of other modules are not said again.
            spoils: the sums of the step are incomplete.

        Returns:
            Whether it was the first of its kind.
        """
        self.count += 1
        self.last = error
        self.spoiled = self.spoiled or spoils
        key = f"{where}/{type(error).__name__}"
        if key in self._said:
            return False
        self._said.add(key)
        _log.warning(
            "recording failed in %s: %s: %s; training goes on%s",
            f"{where} {name}".strip(),
            type(error).__name__,
            error,
            ", this step has no loads" if spoils else "",
        )
        _log.debug("recording failed", exc_info=error)
        return True

    def say(self, key: str, message: str) -> bool:
        """Warn once per key."""
        if key in self._said:
            return False
        self._said.add(key)
        _log.warning("%s", message)
        return True

    def end_step(self) -> None:
        """Close the account of a step."""
        self.failing_steps = self.failing_steps + 1 if self.last is not None else 0
        self.last, self.spoiled = None, False

    @property
    def exhausted(self) -> bool:
        return self.failing_steps >= PATIENCE
