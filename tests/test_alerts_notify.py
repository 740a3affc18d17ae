"""Notifications: what arrives, what is tried again, and that the caller never waits."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from store_runs import alert

from moeviz.alerts import Command, Notifier, Webhook
from moeviz.alerts.notify import Wait
from moeviz.errors import MoevizError
from moeviz.records import AlertRecord


class Server(HTTPServer):
    """Answers with the given status codes, one request each, then with 204; keeps what it is sent."""

    def __init__(self, *codes: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.codes = list(codes)
        self.got: list[tuple[str, dict]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append((self.headers["Content-Type"], body))
        self.send_response(self.server.codes.pop(0) if self.server.codes else 204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def serve() -> Iterator[object]:
    servers: list[Server] = []

    def start(*codes: int) -> Server:
        server = Server(*codes)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_web_hook_that_fails_twice_gets_the_alert_the_third_time(serve) -> None:
    server = serve(500, 503)
    notifier = Notifier(Webhook(server.url, first_pause_seconds=0.02), run="runs/mine")
    notifier(alert("SKEW/1/5", 5, value=float("nan")))
    assert notifier.close(timeout=120) == (1, 0, 0)
    assert len(server.got) == 3
    kind, body = server.got[-1]
    assert kind == "application/json"
    assert (body["run"], body["episode"], body["layer"], body["experts"]) == (
        "runs/mine",
        "SKEW/1/5",
        1,
        [2, 3],
    )
    assert body["value"] is None, "NaN is no JSON"


def test_pauses_double_and_end_after_the_last_try(serve) -> None:
    server = serve(*[500] * 9)
    pauses: list[float] = []
    with pytest.raises(OSError, match="500"):
        Webhook(server.url, tries=4).send(alert("A/1/5", 5), b"{}", lambda pause: bool(pauses.append(pause)))
    assert pauses == [1.0, 2.0, 4.0]
    assert len(server.got) == 4


def test_a_request_that_the_server_refuses_is_not_repeated(serve) -> None:
    server = serve(404, 404)
    with pytest.raises(OSError, match="404"):
        Webhook(server.url).send(alert("A/1/5", 5), b"{}", lambda pause: False)
    assert len(server.got) == 1


def test_failures_are_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def send(self, alert: AlertRecord, body: bytes, wait: Wait) -> None:
            raise RuntimeError("no way out")

    with caplog.at_level(logging.WARNING):
        notifier = Notifier(Broken())
        for step in range(5):
            notifier(alert(f"A/1/{step}", step))
        assert notifier.close() == (0, 5, 0)
    said = [record.getMessage() for record in caplog.records]
    assert sum("no way out" in text for text in said) == 1
    assert "5 failed" in said[-1]


class Stuck:
    """A channel that waits until it is told to go on, or until there is no time left."""

    def __init__(self) -> None:
        self.go, self.busy = threading.Event(), threading.Event()
        self.sent: list[str] = []

    def send(self, alert: AlertRecord, body: bytes, wait: Wait) -> None:
        self.busy.set()
        while not self.go.wait(0.005):
            if wait(0.0):
                raise TimeoutError("no time left")
        self.sent.append(alert.episode)


def test_a_channel_that_hangs_keeps_nobody_and_the_newest_wait() -> None:
    channel = Stuck()
    notifier = Notifier(channel, capacity=3)
    notifier(alert("A/1/0", 0))
    assert channel.busy.wait(120)
    for step in range(1, 1001):
        notifier(alert(f"A/1/{step}", step))
    channel.go.set()  # whoever waited for it would not have come this far
    assert notifier.close(timeout=120) == (4, 0, 997)
    assert channel.sent == ["A/1/0", "A/1/998", "A/1/999", "A/1/1000"]


def test_closing_does_not_wait_for_a_channel_that_hangs() -> None:
    notifier = Notifier(Stuck())
    notifier(alert("A/1/0", 0))
    notifier(alert("A/1/1", 1))
    notifier.close(timeout=0.1)  # the channel never answers: a close that waited would not end
    notifier(alert("A/1/2", 2))
    assert notifier.stats.sent == 0
    assert notifier.stats.dropped >= 1


def test_milder_alerts_are_not_told_and_clearings_are() -> None:
    channel = Stuck()
    channel.go.set()
    notifier = Notifier(channel, min_severity="error")
    for severity in ("info", "warning", "error", "critical"):
        notifier(alert(f"{severity}/1/0", 0, severity=severity))
    notifier(alert("error/1/0", 9, cleared=9, severity="error"))
    notifier.close(timeout=120)
    assert channel.sent == ["error/1/0", "critical/1/0", "error/1/0"]


def test_a_command_gets_its_words_filled_in_and_the_alert_on_its_input(tmp_path: Path) -> None:
    script = tmp_path / "hook.py"
    script.write_text(
        "import json, sys\n"
        "open(sys.argv[1], 'w').write(json.dumps([sys.argv[2:], json.loads(sys.stdin.read())]))\n"
    )
    out = tmp_path / "with a space.json"
    notifier = Notifier(
        Command(f"{sys.executable} {script} '{out}' {{severity}}:{{rule}} '{{message}}' {{other}} {{step}}")
    )
    notifier(alert("SKEW/1/5", 5, message="uneven {step}; $(touch x)"))
    assert notifier.close(timeout=120) == (1, 0, 0)
    words, body = json.loads(out.read_text())
    assert words == ["error:SKEW", "uneven {step}; $(touch x)", "{other}", "5"]
    assert body["episode"] == "SKEW/1/5"


def test_a_command_that_fails_or_hangs_is_counted() -> None:
    for words, options in (
        (["-c", "raise SystemExit(3)"], {}),
        (["-c", "input()"], {"timeout_seconds": 0.0}),
    ):
        command = " ".join(f"'{word}'" for word in [sys.executable, *words])
        notifier = Notifier(Command(command, **options))
        notifier(alert("SKEW/1/5", 5))
        assert notifier.close(timeout=120) == (0, 1, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Command("  "), "empty"),
        (lambda: Command("say 'hello"), "quote"),
        (lambda: Webhook("file:///etc/hosts"), "http://"),
        (lambda: Webhook("localhost:80"), "http://"),
    ],
)
def test_a_wrong_hook_is_refused_before_training(make: object, message: str) -> None:
    with pytest.raises(MoevizError, match=message):
        make()  # type: ignore[operator]
