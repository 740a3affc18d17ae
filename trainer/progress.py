"""What a person sees while training: a bar with one line of numbers in a terminal, plain lines elsewhere.

The loop reports; how it looks is decided here, and `Silent` is what a library call gets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from trainer.evaluate import DomainLoss

_log = logging.getLogger("moeviz.trainer")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step, as far as a person wants to know."""

    step: int
    """Index of the step, from 0."""
    max_steps: int
    loss: float
    """Cross-entropy in nats per token."""
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float
    """At the mean pace of this call so far, evaluations and checkpoints included."""
    worst_load: float
    """Largest load of an expert over the even share; NaN without experts."""
    worst_expert: tuple[int, int]
    """MoE layer and expert that have it."""

    def __str__(self) -> str:
        left = timedelta(seconds=round(self.seconds_left))
        line = f"loss {self.loss:.3f}  left {left}  {self.tokens_per_second:,.0f} tok/s"
        if not math.isnan(self.worst_load):
            layer, expert = self.worst_expert
            line += f"  max load {self.worst_load:.2f}x (layer {layer}, expert {expert})"
        return f"{line}  lr {self.learning_rate:.2e}  grad {self.grad_norm:.2f}"


class Progress(Protocol):
    """Where the loop reports to."""

    def step(self, report: StepReport) -> None: ...

    def evaluation(self, step: int, losses: Mapping[str, DomainLoss]) -> None:
        """Held-out losses of the weights with which `step` begins."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""

    def close(self) -> None: ...


class Silent:
    """Only notes are kept, in the log."""

    def step(self, report: StepReport) -> None: ...

    def evaluation(self, step: int, losses: Mapping[str, DomainLoss]) -> None: ...

    def note(self, text: str) -> None:
        _log.info("%s", text)

    def close(self) -> None: ...


class PlainLines:
    """A line every `every` steps, for logs and pipes."""

    def __init__(self, console: Console, every: int) -> None:
        self._console, self._every = console, every

    def step(self, report: StepReport) -> None:
        done = report.step + 1
        if done % self._every == 0 or done in (1, report.max_steps):
            self.note(f"step {done}/{report.max_steps}  {report}")

    def evaluation(self, step: int, losses: Mapping[str, DomainLoss]) -> None:
        self.note(evaluation_line(step, losses))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None: ...


class LiveBar(PlainLines):
    """A bar that is redrawn in place from the first step on; evaluations and notes scroll above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, every=1)
        numbers = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TextColumn("{task.description}", table_column=numbers),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=None)

    def step(self, report: StepReport) -> None:
        self._bar.update(
            self._task, completed=report.step + 1, total=report.max_steps, description=str(report)
        )
        if not self._bar.live.is_started:
            self._bar.start()

    def close(self) -> None:
        self._bar.stop()


def open_progress(console: Console, every: int) -> Progress:
    """The bar in a terminal, lines elsewhere."""
    return LiveBar(console) if console.is_terminal else PlainLines(console, every)


def evaluation_line(step: int, losses: Mapping[str, DomainLoss]) -> str:
    """All domains of one evaluation on a line, the mean over their tokens first."""
    tokens = sum(each.num_tokens for each in losses.values())
    mean = sum(each.loss_nats * each.num_tokens for each in losses.values()) / max(tokens, 1)
    domains = ", ".join(f"{name} {each.loss_nats:.3f}" for name, each in losses.items())
    return f"step {step}  validation loss {mean:.3f} ({domains})"
