"""Questions to the archive, answered in a thread: one at a time per topic, the newest replaces one that waits.

A person who holds a key down asks ten times a second; only the last question is worth an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from textual.app import App

_log = logging.getLogger("moeviz.tui")

Question = Callable[[], Any]
Answer = Callable[[Any], None]


class Errands:
    """Runs questions for an app and hands the answers back on its own thread."""

    def __init__(self, app: App[Any], complain: Callable[[str], None]) -> None:
        self._app = app
        self._complain = complain
        self._busy: set[str] = set()
        self._waiting: dict[str, tuple[Question, Answer]] = {}

    def ask(self, topic: str, question: Question, answer: Answer) -> None:
        """Ask `question` in a thread and call `answer` with what it returns; an error is shown, not raised."""
        if topic in self._busy:
            self._waiting[topic] = (question, answer)
            return
        self._busy.add(topic)
        self._app.run_worker(
            lambda: self._run(topic, question, answer), thread=True, group=topic, exit_on_error=False
        )

    def _run(self, topic: str, question: Question, answer: Answer) -> None:
        try:
            result, error = question(), None
        except Exception as problem:  # whatever the store meets must not end the view
            _log.warning("%s failed", topic, exc_info=True)
            result, error = None, f"{topic}: {problem}"
        if self._app.is_running:
            self._app.call_from_thread(self._finish, topic, answer, result, error)

    def _finish(self, topic: str, answer: Answer, result: Any, error: str | None) -> None:
        self._busy.discard(topic)
        if error is not None:
            self._complain(error)
        else:
            answer(result)
        if topic in self._waiting:
            self.ask(topic, *self._waiting.pop(topic))
