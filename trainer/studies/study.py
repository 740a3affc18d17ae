"""A study: runs that are compared on purpose, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.studies.outcome import Outcome
from trainer.studies.trials import Trial


class Finding(NamedTuple):
    """One thing that a study was asked, and what came out."""

    text: str
    found: str
    """The numbers, whatever they are."""
    holds: bool | None = None
    """Whether what was expected holds; None: not expected in advance, or not tested."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A recipe that needs nothing but a folder."""

    name: str
    about: str
    """What is compared, what is equal, and the source: a few lines for people."""
    trials: tuple[Trial, ...]
    findings: Callable[[Sequence[Outcome]], list[Finding]]
    """Outcomes of all trials -> answers. Runs that did not finish are left out of them, and that is told."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Makes what the trials read, in the folder."""


def finished(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.state == "finished"]
