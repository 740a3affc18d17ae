"""Whether somebody reads a run while it is written: a reader sets the time of a file, the writer looks at it.

Making rows visible costs the training process a few milliseconds each time, so it happens often only while somebody
looks. The file is empty, hidden, made by the writer and deleted when it closes. A reader that may not touch it, or
that reads without moeviz, sees the rows as seldom as nobody does.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

PRESENCE_FILE = ".readers"
_TELL_SECONDS = 1.0
"""How often a reader says that it is there."""
_STAY_SECONDS = 10.0
"""How long it counts as there: a page that is drawn every few seconds is one that is looked at."""


class Presence:
    """The writer's side; `is_read` is what `BackgroundSink` asks."""

    def __init__(self, run: Path) -> None:
        self._path = run / PRESENCE_FILE
        with suppress(OSError):  # without a change of its time, should another rank have made it
            os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o666))
        self._stamp = self._time()
        self._until = float("-inf")

    def is_read(self) -> bool:
        """Whether a reader said within the last seconds that it is there. By this machine's clock alone."""
        stamp = self._time()
        if stamp is not None and stamp != self._stamp:
            self._stamp, self._until = stamp, time.monotonic() + _STAY_SECONDS
        return time.monotonic() < self._until

    def close(self) -> None:
        """Delete the file."""
        with suppress(OSError):
            self._path.unlink()

    def _time(self) -> int | None:
        try:
            return os.stat(self._path).st_mtime_ns
        except OSError:
            return None


class Attention:
    """The reader's side."""

    def __init__(self, run: Path) -> None:
        self._path = run / PRESENCE_FILE
        self._next = float("-inf")

    def tell(self) -> None:
        """Say that somebody reads, at most once a second; nothing where no process writes or none may say so."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _TELL_SECONDS
            with suppress(OSError):
                os.utime(self._path)
