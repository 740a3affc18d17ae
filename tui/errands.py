"""Questions to the archive, answered in a thread: one at a time per topic, the newest replaces one that waits.

A person who holds a key down asks ten times a second; only the last question is worth an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from textual.app import App

_log = logging.getLogger("moeviz.tui")


class Errand(NamedTuple):
    question: Callable[[], Any]
    answer: Callable[[Any], None]
    failed: Callable[[str], None]


class Errands:
    """Runs questions for an app and hands the answers back on its own thread."""

    def __init__(self, app: App[Any], complain: Callable[[str], None]) -> None:
        self._app = app
        self._complain = complain
        self._busy: dict[str, Errand] = {}
        self._waiting: dict[str, Errand] = {}

    @property
    def idle(self) -> bool:
        """Whether every question was answered."""
        return not self._busy and not self._waiting

    def ask(
        self,
        topic: str,
        question: Callable[[], Any],
        answer: Callable[[Any], None],
        failed: Callable[[str], None] | None = None,
    ) -> None:
        """Ask `question` in a thread and call `answer` with what it returns, or `failed` with what went wrong."""
        errand = Errand(question, answer, failed or self._complain)
        if topic in self._busy:
            self._waiting[topic] = errand
        else:
            self._busy[topic] = errand
            self._app.run_worker(
                lambda: self._run(topic, errand), thread=True, group=topic, exit_on_error=False
            )

    def forget(self) -> None:
        """Drop what waits and the answers to what is under way."""
        self._busy, self._waiting = {}, {}

    def _run(self, topic: str, errand: Errand) -> None:
        try:
            result, error = errand.question(), None
        except Exception as problem:  # whatever the store meets must not end the view
            _log.debug("%s failed", topic, exc_info=True)
            result, error = None, str(problem) or type(problem).__name__
        if self._app.is_running:
            self._app.call_from_thread(self._finish, topic, errand, result, error)

    def _finish(self, topic: str, errand: Errand, result: Any, error: str | None) -> None:
        if self._busy.get(topic) is not errand:
            return
        del self._busy[topic]
        if error is not None:
            errand.failed(error)
        else:
            errand.answer(result)
        if topic in self._waiting and topic not in self._busy:
            self.ask(topic, *self._waiting.pop(topic))
