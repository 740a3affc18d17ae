"""One trainer for a run folder: a second one would write over the records and checkpoints of the first.

The lock belongs to the process and goes with it, however it ends; the file stays and says who had it last.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from moeviz.errors import MoevizError

LOCK_FILE = ".trainer.lock"


class RunLock:
    """Holds a run folder until `release`."""

    def __init__(self, run: Path) -> None:
        """Make the folder if it is not there, and take it.

        Raises:
            MoevizError: another process trains in it.
        """
        run.mkdir(parents=True, exist_ok=True)
        self._file = (run / LOCK_FILE).open("a+")
        if not _locked(self._file.fileno()):
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise MoevizError(
                f"{run} is being trained by {owner}; wait for it or end it, or name another folder with --run"
            )
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others have it. Idempotent."""
        self._file.close()


def _locked(number: int) -> bool:
    """Whether the open file could be locked. Where the system or the file system has no locks, it counts as locked."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True
