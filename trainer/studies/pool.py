"""Runs trials as child processes, some at a time, and goes on from what their folders hold.

Every child holds a lock on its run folder for as long as it lives, also when the parent is killed: a sweep that is
started again leaves such a run alone instead of writing into it a second time.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from moeviz.errors import MoevizError
from trainer.studies.median_rule import MedianRule
from trainer.studies.trials import (
    LOG_FILE,
    PRUNED_FILE,
    TRIAL_FILE,
    Parser,
    State,
    Trial,
    begin,
    check_same,
    failure,
    state_of,
    validation_curve,
)

_STEP = re.compile(r"^step (\d+)/\d+  loss (\S+)", re.MULTILINE)
_EVALUATION = re.compile(r"^step (\d+)  validation loss ", re.MULTILINE)
_TAIL_BYTES = 4096
_KILL_SECONDS = 60.0
"""A child that was asked to stop has so long for its checkpoint."""


class Watcher(Protocol):
    """Who is told how the trials go."""

    def begun(self, trial: Trial) -> None:
        """The trial trains now."""

    def at(self, trial: Trial, step: int, loss: str) -> None:
        """A trial in training is at this step."""

    def ended(self, trial: Trial, state: State, why: str) -> None:
        """It trains no more, or was not begun: finished before, refused, failed."""


@dataclass(kw_only=True)
class _Child:
    trial: Trial
    run: Path
    process: subprocess.Popen[bytes]
    judged: int = -1
    """Newest rung that it was judged at."""
    why: str = ""
    """The verdict that ends it."""


@dataclass(kw_only=True)
class Pool:
    """Trains trials in FOLDER/<name>, `jobs` at a time."""

    folder: Path
    parse: Parser
    watcher: Watcher
    jobs: int = 2
    threads: int | None = None
    """OMP_NUM_THREADS of each child. None: the cores of this machine, divided among them."""
    rule: MedianRule | None = None
    """Ends runs early. None: all are trained to their end."""
    poll_seconds: float = 0.5
    _children: list[_Child] = field(default_factory=list)
    _reasons: dict[str, str] = field(default_factory=dict)

    def run(self, trials: Sequence[Trial]) -> tuple[dict[str, State], dict[str, str]]:
        """Train all that are not finished yet. A trial that fails does not end the others.

        Returns: how each ended, and why, where it did not finish; by name.

        Raises:
            MoevizError: a folder of a trial holds a run that was trained with other flags. Told before any is begun.
            KeyboardInterrupt: children that were in training have written a checkpoint.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for trial in trials:
            if trial.config is not None and (self.folder / trial.name / TRIAL_FILE).exists():
                check_same(trial, self.folder / trial.name, self.parse)
        states: dict[str, State] = {}
        waiting = [trial for trial in trials if not self._is_settled(trial, states)]
        curves = {
            trial.name: validation_curve(self.folder / trial.name) for trial in trials if trial.name in states
        }
        try:
            while waiting or self._children:
                while waiting and len(self._children) < self._places():
                    self._begin(waiting.pop(0), states)
                time.sleep(self.poll_seconds)
                self._look(states, curves)
        finally:
            self._stop_all()
        return states, {name: why for name, why in self._reasons.items() if states[name] != "finished"}

    def _places(self) -> int:
        """One until the first child is past its first step: it builds the corpus and tokenizer that all share."""
        if len(self._children) == 1 and _newest(self._children[0].run) is None:
            return 1
        return self.jobs

    def _is_settled(self, trial: Trial, states: dict[str, State]) -> bool:
        run = self.folder / trial.name
        state = state_of(trial, run)
        if state == "pruned" and self.rule is None:  # nothing ends early any more: it goes on
            (run / PRUNED_FILE).unlink()
            state = state_of(trial, run)
        if state not in ("finished", "pruned", "refused"):
            return False
        self._settle(trial, states, state, trial.problem or ("trained before" if state == "finished" else ""))
        return True

    def _settle(self, trial: Trial, states: dict[str, State], state: State, why: str) -> None:
        states[trial.name] = state
        self._reasons[trial.name] = why
        self.watcher.ended(trial, state, why)

    def _begin(self, trial: Trial, states: dict[str, State]) -> None:
        run = self.folder / trial.name
        lock = os.open(self.folder / f".{trial.name}.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            words = begin(trial, run, self.parse)
            with (run / LOG_FILE).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "moeviz.cli", "train", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C comes from here, once: a second one would end it at once
                )
        except BlockingIOError:
            self._settle(trial, states, "failed", f"another process trains in {run}; wait for it to end")
        except (MoevizError, OSError) as error:
            self._settle(trial, states, "failed", str(error))
        else:
            self._children.append(_Child(trial=trial, run=run, process=process))
            self.watcher.begun(trial)
        finally:
            os.close(lock)

    def _environment(self) -> Mapping[str, str]:
        threads = self.threads or max(1, (os.cpu_count() or 1) // self.jobs)
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), _ROOT])),
        }

    def _look(self, states: dict[str, State], curves: dict[str, dict[int, float]]) -> None:
        for child in list(self._children):
            name = child.trial.name
            if child.process.poll() is None:
                if newest := _newest(child.run):
                    self.watcher.at(child.trial, *newest)
                if self.rule and not child.why and _newest_rung(child.run) > child.judged:
                    curves[name] = validation_curve(
                        child.run
                    )  # what was told a moment ago may be there the next time
                    self._judge(child, self.rule, curves)
                continue
            self._children.remove(child)
            curves[name] = validation_curve(child.run)
            state = state_of(child.trial, child.run)
            ended: State = state if state in ("finished", "pruned") else "failed"
            self._settle(child.trial, states, ended, child.why or self._why(child, ended))

    def _judge(self, child: _Child, rule: MedianRule, curves: Mapping[str, Mapping[int, float]]) -> None:
        name = child.trial.name
        assert child.trial.config is not None
        child.judged = max(curves[name], default=-1)
        others = [curve for other, curve in curves.items() if other != name]
        verdict = rule.verdict(curves[name], others, child.trial.config.max_steps)
        if verdict is not None:
            child.why = str(verdict)
            about = {"step": verdict.step, "why": child.why}
            (child.run / PRUNED_FILE).write_text(json.dumps(about, indent=1))
            child.process.terminate()

    def _why(self, child: _Child, state: State) -> str:
        if state != "failed":
            return ""
        return f"{failure(child.run)} (status {child.process.returncode}; {child.run / LOG_FILE})"

    def _stop_all(self) -> None:
        for child in self._children:
            child.process.terminate()
        for child in self._children:
            try:
                child.process.wait(_KILL_SECONDS)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._children.clear()


def _newest(run: Path) -> tuple[int, str] | None:
    """Steps done and loss, by the newest line of a child's log; None before its first step."""
    told = _STEP.findall(_tail(run))
    return (int(told[-1][0]), told[-1][1]) if told else None


def _newest_rung(run: Path) -> int:
    """Step of the newest evaluation that a child's log tells of; -1 before one."""
    return max(map(int, _EVALUATION.findall(_tail(run))), default=-1)


def _tail(run: Path) -> str:
    try:
        with (run / LOG_FILE).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


_ROOT = str(Path(__file__).resolve().parents[2])
"""Where the packages are: children find them from any folder."""
