"""How a study looks in a terminal: a bar for all runs and a line for each in training, then one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from trainer.studies.outcome import WINDOW, Outcome
from trainer.studies.study import Finding
from trainer.studies.trials import State, Trial

_STYLES = {"finished": "green", "pruned": "yellow", "failed": "bold red", "refused": "red"}


class Bars:
    """Tells a terminal how trials go; elsewhere, a line for each beginning and end."""

    def __init__(self, console: Console, count: int) -> None:
        self._console = console
        self._lines: dict[str, TaskID] = {}
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._bar.add_task("runs", total=count)

    def __enter__(self) -> Bars:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begun(self, trial: Trial) -> None:
        steps = trial.config.max_steps if trial.config else None
        self._lines[trial.name] = self._bar.add_task(trial.name, total=steps)
        if not self._console.is_terminal:
            self._say(f"{trial.name}: training")

    def at(self, trial: Trial, step: int, loss: str) -> None:
        self._bar.update(self._lines[trial.name], completed=step, description=f"{trial.name}  loss {loss}")

    def ended(self, trial: Trial, state: State, why: str) -> None:
        if trial.name in self._lines:
            self._bar.remove_task(self._lines.pop(trial.name))
        self._bar.advance(self._all)
        self._say(f"{trial.name}: {state}{f', {why}' if why else ''}", _STYLES.get(state, ""))

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)


def outcome_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """A row for each run; columns of varied values only where runs differ in them."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    varied = _varied(outcomes)
    for name in varied or ["run"]:
        widest = max(len(outcome.values.get(name, "")) for outcome in outcomes)
        table.add_column(name, overflow="fold", min_width=min(max(widest, len(name)), 14))
    all_done = all(outcome.state == "finished" for outcome in outcomes)
    for name in ("val. loss", "MaxVio", "tokens/s", "params", "active"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("alerts open" if all_done else "state or open alerts", overflow="fold")
    for outcome in outcomes:
        table.add_row(
            *([outcome.values.get(name, "") for name in varied] or [outcome.run]),
            _number(outcome.val_loss, ".4f"),
            _number(outcome.maxvio_global, ".3f"),
            _number(outcome.tokens_per_second, ",.0f"),
            _number(outcome.parameters / 1e6, ".2f", "M"),
            _number(outcome.active_parameters / 1e6, ".2f", "M"),
            _standing(outcome),
        )
    table.caption = (
        f"val. loss: nats per token. MaxVio: loads of the last {WINDOW} steps, or of the last quarter.\n"
        "tokens/s: beside the other runs."
    )
    table.caption_justify = "left"
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """What was asked, whether it holds, and the numbers."""
    table = Table(box=box.SIMPLE_HEAD, expand=True)
    table.add_column("asked", ratio=5)
    table.add_column("", no_wrap=True)
    table.add_column("found", ratio=4)
    for finding in findings:
        verdict = {
            True: Text("holds", style="green"),
            False: Text("does not hold", style="bold red"),
            None: Text(""),
        }[finding.holds]
        table.add_row(Text(finding.text), verdict, Text(finding.found))
    return table


def _varied(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of values in which runs differ; the first name where they do not."""
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.values))
    return [name for name in names if len({outcome.values.get(name) for outcome in outcomes}) > 1] or names[
        :1
    ]


def _standing(outcome: Outcome) -> Text:
    """Alerts open at the end; or how the run stands, where it has not come to its end."""
    if outcome.state != "finished":
        return Text(outcome.state, style=_STYLES.get(outcome.state, ""))
    rules = Counter(alert.split()[0] for alert in outcome.alerts_open)
    return Text(
        ", ".join(rule if count == 1 else f"{rule} x{count}" for rule, count in rules.items()) or "none"
    )


def _number(value: float, form: str, unit: str = "") -> str:
    return format(value, form) + unit if value == value else "–"
