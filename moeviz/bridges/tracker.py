"""The one interface behind which trackers differ."""

from __future__ import annotations

from typing import Protocol

from moeviz.bridges.digest import Digest
from moeviz.records import AlertRecord


class Tracker(Protocol):
    """Somewhere to log to. Called from one thread of its own; may take its time, and may raise."""

    place: str
    """Where people find what was logged: a folder or an address."""

    def log(self, digest: Digest) -> None:
        """Numbers of a step, and its loads where they are due. Steps need not come in order."""

    def alert(self, alert: AlertRecord) -> None:
        """An alert was raised, became graver, or was cleared."""

    def close(self) -> None:
        """Nothing more will come."""
