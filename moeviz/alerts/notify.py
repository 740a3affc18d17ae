"""Telling the world about alerts: a command, a web hook, whatever takes a JSON text, without training noticing.

A `Notifier` is a listener for `watch(on_alert=...)`: it queues the transition and returns. One daemon thread of its
own delivers; what fails is logged once and counted, and when the queue is full the oldest waiting one is given up.
"""

from __future__ import annotations

import atexit
import logging
import os
import shlex
import subprocess
import threading
import urllib.error
import urllib.request
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import orjson

from moeviz.alerts.rules import SEVERITIES
from moeviz.errors import MoevizError
from moeviz.records import AlertRecord, Severity

_log = logging.getLogger("moeviz.alerts")

Wait = Callable[[float], bool]
"""Wait so many seconds; True when there is no time left and waiting ended early."""


class Channel(Protocol):
    """A way out. Called from one thread of its own; may take its time."""

    def send(self, alert: AlertRecord, body: bytes, wait: Wait) -> None:
        """Deliver `body`, the alert as a JSON object. Raises when that failed for good."""


class Command:
    """Runs a program for each alert, with the alert as JSON on its standard input. No shell is involved."""

    def __init__(self, command: str, timeout_seconds: float = 30.0) -> None:
        """Take apart a command line.

        Args:
            command: as typed in a shell; {rule}, {severity}, {layer}, {step}, {state} (raised or cleared) and
                {message} in its words are filled in.
            timeout_seconds: the program is killed after these.

        Raises:
            MoevizError: an empty command, or quotes that do not match.
        """
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise MoevizError(f"command {command!r}: {error}; quote its words as in a shell") from error
        if not self._words:
            raise MoevizError("the command for alerts is empty; give a program and its arguments")
        self._timeout_seconds = timeout_seconds

    def send(self, alert: AlertRecord, body: bytes, wait: Wait) -> None:
        subprocess.run(
            [_filled(word, alert) for word in self._words],
            input=body,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=self._timeout_seconds,
            start_new_session=True,  # Ctrl-C in the terminal is for the training, not for this
            check=True,
        )


class Webhook:
    """Posts each alert as a JSON object; tries again, ever later, when the network or the server fails."""

    def __init__(
        self, url: str, tries: int = 5, first_pause_seconds: float = 1.0, timeout_seconds: float = 10.0
    ) -> None:
        """Check the address.

        Args:
            url: http or https.
            tries: requests at most; the pause between two doubles each time.
            first_pause_seconds: the first of these pauses.
            timeout_seconds: of one request.

        Raises:
            MoevizError: not an http address.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise MoevizError(f"{url!r} is no address to post to; give one with http:// or https://")
        self._url, self._tries = url, tries
        self._first_pause_seconds, self._timeout_seconds = first_pause_seconds, timeout_seconds

    def send(self, alert: AlertRecord, body: bytes, wait: Wait) -> None:
        for number in range(self._tries):
            try:
                self._post(body)
                return
            except OSError as error:  # URLError and HTTPError are OSErrors
                last = number + 1 == self._tries
                if last or not _passes(error) or wait(self._first_pause_seconds * 2**number):
                    raise

    def _post(self, body: bytes) -> None:
        request = urllib.request.Request(
            self._url, data=body, headers={"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=self._timeout_seconds) as answer:
            answer.read()


def _passes(error: OSError) -> bool:
    """Whether trying again may help: not when the server says that the request itself is wrong."""
    return not isinstance(error, urllib.error.HTTPError) or error.code >= 500 or error.code in (408, 429)


def _filled(word: str, alert: AlertRecord) -> str:
    values = {
        "rule": alert.rule,
        "severity": alert.severity,
        "layer": "run" if alert.layer is None else str(alert.layer),
        "step": str(alert.updated_step),
        "state": "raised" if alert.cleared_step is None else "cleared",
        "message": alert.message,
    }
    # Piece by piece, so that a message with braces is not filled in again.
    pieces = word.split("{")
    for at, piece in enumerate(pieces[1:], start=1):
        name, brace, rest = piece.partition("}")
        pieces[at] = values[name] + rest if brace and name in values else "{" + piece
    return "".join(pieces)


class NotifierStats(NamedTuple):
    sent: int
    failed: int
    """Transitions that the channel gave up."""
    dropped: int
    """Transitions given up because too many waited, or because there was no time left at the end."""


class Notifier:
    """A listener for alerts that delivers through one channel; calling it never blocks and never raises."""

    def __init__(
        self, channel: Channel, *, run: str = "", min_severity: Severity = "warning", capacity: int = 256
    ) -> None:
        """Start the thread.

        Args:
            channel: where to.
            run: name or path of the run, told as `run` in the JSON.
            min_severity: mildest severity that is told; clearings of such alerts are told too.
            capacity: transitions that wait at most.
        """
        self._channel, self._run = channel, run
        self._least = SEVERITIES.index(min_severity)
        self._queue: deque[AlertRecord] = deque()
        self._capacity = capacity
        self._wake = threading.Condition()
        self._closing = False
        self._out_of_time = threading.Event()
        self._sent = self._failed = self._dropped = 0
        self._thread = threading.Thread(target=self._deliver_all, name="moeviz-notifier", daemon=True)
        self._thread.start()
        atexit.register(_close_at_exit, weakref.ref(self), os.getpid())

    def __call__(self, alert: AlertRecord) -> None:
        """Queue a transition, if it is grave enough."""
        if SEVERITIES.index(alert.severity) < self._least:
            return
        with self._wake:
            if self._closing:
                self._dropped += 1
                return
            if len(self._queue) >= self._capacity:
                self._queue.popleft()
                self._dropped += 1
            self._queue.append(alert)
            self._wake.notify()

    def close(self, timeout: float = 5.0) -> NotifierStats:
        """Deliver what waits, for at most `timeout` seconds; retries do not outlast it. Closing twice is allowed."""
        with self._wake:
            already, self._closing = self._closing, True
            self._wake.notify()
        self._thread.join(timeout)
        self._out_of_time.set()
        with self._wake:
            self._dropped += len(self._queue)
            self._queue.clear()
        if not already and (self._failed or self._dropped):
            _log.warning("alerts not told: %d failed, %d given up", self._failed, self._dropped)
        return self.stats

    @property
    def stats(self) -> NotifierStats:
        return NotifierStats(self._sent, self._failed, self._dropped)

    def _deliver_all(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                alert = self._queue.popleft()
            self._deliver(alert)

    def _deliver(self, alert: AlertRecord) -> None:
        try:
            body = orjson.dumps(
                {"run": self._run, **asdict(alert)}, default=str, option=orjson.OPT_SERIALIZE_NUMPY
            )
            self._channel.send(alert, body, self._out_of_time.wait)
            self._sent += 1
        except Exception as error:
            self._failed += 1
            if self._failed == 1:
                _log.warning(
                    "telling about %s failed: %s; training goes on, further failures are only counted",
                    alert.episode,
                    error,
                )


def _close_at_exit(reference: weakref.ref[Notifier], pid: int) -> None:
    """A script that ends without close() still tells what waits. A forked child has no thread to join."""
    notifier = reference()
    if notifier is not None and os.getpid() == pid:
        notifier.close()
