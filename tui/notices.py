"""Log messages as notices: Textual draws on stderr, so a line that is logged there would be painted into the screen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from textual.app import App


class Notices(logging.Handler):
    """While attached, warnings of moeviz appear in the app and nowhere else."""

    def __init__(self, app: App[Any], show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._app, self._show = app, show
        self._logger = logging.getLogger("moeviz")
        self._propagated = True

    def attach(self) -> None:
        self._propagated, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self)

    def detach(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagated

    def emit(self, record: logging.LogRecord) -> None:
        if self._app.is_running:
            self._app.call_later(self._show, record.getMessage())
