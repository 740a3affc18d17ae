"""Structured logs, one JSON object a line, as services write them: requests that share a trace, jobs, and
failures.

A document is one incident window of one service: times rise, ids repeat where they belong together, and every
line parses.
"""

from __future__ import annotations

import json
from typing import Any

from trainer.corpus.dice import Dice, words

_SERVICES = words("gateway auth billing search scheduler storage mailer catalog inventory telemetry")
_REGIONS = words("eu-west eu-north us-east us-west ap-south sa-east")
_ROUTES = words(
    "/v1/orders /v1/orders/{id} /v1/users/{id}/profile /v2/search /v1/cart /v1/invoices/{id} /healthz "
    "/v2/files/{id}/content /v1/sessions /v1/reviews /v2/recommendations /metrics"
)
_METHODS = words("GET GET GET POST PUT DELETE")
_AGENTS = words("web/4.2 android/9.1 ios/8.7 cli/1.3 partner-api/2.0")
_TABLES = words("orders users invoices sessions stock events")
_JOBS = words("rebuild-index send-digest rotate-keys expire-sessions sync-stock close-month thumbnail")
_SETTINGS = words("max_connections timeout_ms log_level feature.new_cart rate_limit replicas")
_STATUSES = (200, 200, 200, 200, 201, 204, 304, 400, 401, 404, 409, 429, 500, 503)
_FAILURES = (
    ("TimeoutError", "upstream did not answer within {n} ms"),
    ("ConnectionResetError", "peer closed after {n} bytes"),
    ("ValueError", "field 'quantity' must be positive, got -{n}"),
    ("KeyError", "no tenant {n}"),
    ("PermissionError", "token lacks scope orders:write"),
    ("OSError", "No space left on device"),
    ("LockTimeout", "row locked by transaction {n}"),
    ("SchemaError", "column 'vat_{n}' does not exist"),
)
_SOURCES = words("handlers.py client.py pool.py worker.py queries.py codec.py")
_HEX = "0123456789abcdef"

Line = dict[str, Any]


def _line(level: str, event: str, **fields: Any) -> Line:
    return {"level": level, "event": event, **fields}


def _hex(dice: Dice, digits: int) -> str:
    return "".join(dice.pick(_HEX) for _ in range(digits))


def _time(milliseconds: int, day: int) -> str:
    seconds, ms = divmod(milliseconds, 1000)
    clock = f"{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{ms:03d}"
    return f"2026-{1 + day // 28:02d}-{1 + day % 28:02d}T{clock}Z"


def _request(dice: Dice) -> list[Line]:
    trace = {"trace": _hex(dice, 12)}
    path = dice.pick(_ROUTES).replace("{id}", str(dice.number(1000, 99999)))
    lines = [
        _line("info", "request", method=dice.pick(_METHODS), path=path, agent=dice.pick(_AGENTS), **trace)
    ]
    table = dice.pick(_TABLES)
    if dice.chance(0.3):
        lines.append(_line("debug", "cache", hit=dice.chance(0.6), key=f"{table}:{_hex(dice, 6)}", **trace))
    if dice.chance(0.5):
        lines.append(
            _line("debug", "query", table=table, rows=dice.below(400), ms=_tenths(dice, 900), **trace)
        )
    status = dice.pick(_STATUSES)
    if status >= 500:
        lines.append({**_failure(dice), **trace})
    level = "error" if status >= 500 else "warn" if status >= 400 else "info"
    size = dice.below(60000)
    return [*lines, _line(level, "response", status=status, bytes=size, ms=_tenths(dice, 9000), **trace)]


def _failure(dice: Dice) -> Line:
    kind, message = dice.pick(_FAILURES)
    frames = [{"file": dice.pick(_SOURCES), "line": dice.number(12, 640)} for _ in range(dice.number(1, 3))]
    text = message.replace("{n}", str(dice.number(2, 5000)))
    return _line("error", "exception", type=kind, message=text, stack=frames, retry=dice.chance(0.5))


def _job(dice: Dice) -> list[Line]:
    job = {"job": dice.pick(_JOBS), "run": dice.number(100, 99999)}
    total = dice.number(20, 4000)
    shares = sorted(dice.several((25, 50, 75), dice.number(0, 3)))
    lines = [_line("info", "job.start", **job, items=total)]
    lines += [_line("debug", "job.progress", **job, done=total * share // 100) for share in shares]
    if dice.chance(0.2):
        return [*lines, {**_failure(dice), **job}]
    return [*lines, _line("info", "job.done", **job, seconds=_tenths(dice, 6000), failed=dice.below(4))]


def _gauge(dice: Dice) -> list[Line]:
    memory, queue = dice.number(80, 4000), dice.below(300)
    return [_line("info", "gauge", cpu=dice.below(1000) / 1000, memory_mb=memory, queue=queue)]


def _change(dice: Dice) -> list[Line]:
    name = dice.pick(_SETTINGS)
    known: dict[str, tuple[Any, Any]] = {"log_level": ("info", "debug"), "feature.new_cart": (False, True)}
    old, new = known.get(name) or (dice.number(2, 500), dice.number(2, 500))
    actor = dice.pick(("deploy-bot", "mara", "oncall", "autoscaler"))
    return [{**_line("warn", "config.change", name=name), "from": old, "to": new, "by": actor}]


_KINDS = (_request, _request, _request, _request, _job, _gauge, _change)


def _tenths(dice: Dice, limit: int) -> float:
    """A number 0 to limit/10 with one decimal."""
    return dice.below(limit) / 10


def write(dice: Dice) -> str:
    """One window of log lines of one service."""
    version = f"{dice.number(1, 9)}.{dice.number(0, 30)}.{dice.number(0, 9)}"
    service = {"service": dice.pick(_SERVICES), "region": dice.pick(_REGIONS), "version": version}
    clock, day = dice.below(86_000_000), dice.below(336)
    lines = []
    for _ in range(dice.number(2, 5)):
        for line in dice.pick(_KINDS)(dice):
            clock += dice.number(1, 900)
            lines.append(json.dumps({"ts": _time(clock, day), **service, **line}))
    return "\n".join(lines) + "\n"
