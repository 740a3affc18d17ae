"""`moeviz train --num-ranks N`: N processes of the same command on this machine, and one of them to look at.

The first rank has the terminal, the others write RUN/ranks/rank-N.log. They get the variables that torchrun and
deepspeed set as well, and nothing else, so a rank does not know who started it. When one fails the others cannot go
on: they are ended, and the first that failed by itself is named. No torch here: what waits should cost nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from trainer.checkpoint_folder import list_checkpoints
from trainer.launch_status import LAUNCHED, LOST_STATUS, free_port

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 20.0
"""How long ranks may take to notice that one of them failed, and to finish their records."""
_MESSAGE = "moeviz train: "
"""How a mistake of the user's is told, by every rank alike."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_launched() -> bool:
    """Whether a launcher, ours or another one, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(words: Sequence[str], *, ranks: int, run: Path, tell: Callable[[str], None]) -> int:
    """Run `moeviz train WORDS` in `ranks` processes to its end.

    Args:
        words: the command line of every rank; it must name the run folder or what is resumed.
        run: the folder of the run, where logs go.
        tell: shows a line to the person who waits, where a rank other than the first failed.

    Returns:
        Exit status of the command: the first rank's, or 1 where another one failed.
    """
    logs = {rank: run / "ranks" / f"rank-{rank}.log" for rank in range(1, ranks)}
    port = free_port()
    with ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            log = stack.enter_context(_opened(logs[rank])) if rank in logs else None
            processes.append(_start(words, _variables(rank, ranks, port), log))
        return _Watch(processes, logs, run, tell).to_the_end()


def end_with_launcher() -> None:
    """Stop between two steps, with a checkpoint, when the process that launched this rank is gone."""
    if os.environ.get(LAUNCHED) is None:
        return

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would be held when the interpreter ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def _variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        LAUNCHED: 1,
    }
    return {**os.environ, **{name: str(value) for name, value in told.items()}}


def _opened(log: Path) -> BinaryIO:
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("ab")


def _start(
    words: Sequence[str], variables: Mapping[str, str], log: BinaryIO | None
) -> subprocess.Popen[bytes]:
    """One rank. In a session of its own, so that Ctrl-C reaches it once, from here; its input ends when we do."""
    return subprocess.Popen(
        [sys.executable, "-m", "moeviz.cli", "train", *words],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
        start_new_session=True,
    )


class _Watch:
    """All ranks, until they have ended."""

    def __init__(
        self,
        processes: Sequence[subprocess.Popen[bytes]],
        logs: Mapping[int, Path],
        run: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._processes, self._logs, self._run, self._tell = processes, logs, run, tell
        self._interrupted = False
        self._ended_by_us: list[int] = []

    def to_the_end(self) -> int:
        before = {each: signal.signal(each, self._pass_on) for each in _SIGNALS}
        try:
            self._wait()
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._status()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        for process in self._running().values():
            process.send_signal(number)

    def _running(self) -> dict[int, subprocess.Popen[bytes]]:
        return {rank: each for rank, each in enumerate(self._processes) if each.poll() is None}

    def _wait(self) -> None:
        """Until all have ended, or one failed and the others had time to notice."""
        deadline = None
        while self._running():
            if deadline is None and any(each.returncode for each in self._processes):
                deadline = time.monotonic() + _GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                return
            time.sleep(_POLL_SECONDS)

    def _kill(self) -> None:
        for rank, process in self._running().items():
            self._ended_by_us.append(rank)
            process.kill()
        for process in self._processes:
            process.wait()

    def _status(self) -> int:
        """What the command ends with; says what went wrong unless the first rank has said it."""
        first = self._processes[0].returncode
        causes = self._causes()
        if not causes and first != LOST_STATUS:
            return first
        if self._interrupted:
            return 130
        for rank in causes:
            self._tell(f"rank {rank} {_end(self._processes[rank].returncode)}{self._log_of(rank)}")
        if not causes:
            for rank in self._ended_by_us:
                self._tell(f"rank {rank} did not answer and was ended{self._log_of(rank)}")
        saved = list_checkpoints(self._run / "checkpoints")
        if saved:
            self._tell(f"{saved[-1]} is whole; go on with: moeviz train --resume {self._run}")
        return 1

    def _causes(self) -> list[int]:
        """Ranks that failed by themselves, for a reason that the first one has not told on the terminal."""
        first = self._processes[0].returncode
        first_told = first > 0 and first != LOST_STATUS
        found = []
        for rank, process in enumerate(self._processes):
            failed = process.returncode not in (0, LOST_STATUS) and rank not in self._ended_by_us
            same = first_told and (rank == 0 or self._last_line(rank).startswith(_MESSAGE))
            if failed and not same:
                found.append(rank)
        return found

    def _last_line(self, rank: int) -> str:
        if rank not in self._logs:
            return ""
        lines = self._logs[rank].read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")

    def _log_of(self, rank: int) -> str:
        if rank not in self._logs:
            return ""
        last = self._last_line(rank)
        return f"; its output is in {self._logs[rank]}" + (f" and ends with: {last}" if last else "")


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with status {code}"
