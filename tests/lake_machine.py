"""Another machine for the tests of `moeviz lake`: a Python whose DuckDB is the one that the extra `lake` pins.

Run as a program it reads a JSON object a line and answers with one: {"moeviz": [ARGUMENTS]} runs a command, {"sql":
[STATEMENTS], "catalog": ADDRESS, "options": "..."} attaches the catalogue as `elsewhere` and gives the rows of each
statement. {"at_once": [[PATH, CATALOG], ...]} registers at the same time, from as many threads.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import duckdb


class LakeMachine:
    """The parent's end."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [*command, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def moeviz(self, *words: object) -> tuple[int, str, str]:
        """Exit status, output and error output of a command."""
        answer = self._ask({"moeviz": [str(word) for word in words]})
        return answer["status"], answer["out"], answer["err"]

    def sql(self, catalog: str, *statements: str, options: str = "READ_ONLY") -> list[list[Any]]:
        """Rows of each statement, over one connection."""
        answer = self._ask({"sql": statements, "catalog": catalog, "options": options})
        assert "rows" in answer, answer
        return answer["rows"]

    def at_once(self, pairs: list[tuple[Path, str]]) -> list[str]:
        """What each of several registrations at the same time said: empty, or its error."""
        return self._ask({"at_once": [[str(path), catalog] for path, catalog in pairs]})["said"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    if "moeviz" in question:
        from moeviz.cli import main

        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            status = main(question["moeviz"])
        return {"status": status, "out": out.getvalue(), "err": err.getvalue()}
    if "at_once" in question:
        from moeviz.store.lake import register_run

        def said(pair: list[str]) -> str:
            try:
                register_run(*pair)
            except Exception as error:
                return repr(error)
            return ""

        with ThreadPoolExecutor() as threads:
            return {"said": list(threads.map(said, question["at_once"]))}
    return {"rows": _rows(question)}


@cache
def _connection() -> duckdb.DuckDBPyConnection:
    from moeviz.store.engine import connect
    from moeviz.store.lake_catalog import load_extension

    connection = connect()
    for extension in ("postgres_scanner", "sqlite_scanner", "ducklake"):
        load_extension(connection, extension)
    return connection


def _rows(question: dict[str, Any]) -> list[Any]:
    from moeviz.store.lake_catalog import parse_catalog

    connection, target = _connection().cursor(), parse_catalog(question["catalog"]).target
    connection.execute(f"ATTACH 'ducklake:{target}' AS elsewhere ({question['options']})")
    try:
        return [
            [[_plain(value) for value in row] for row in connection.execute(statement).fetchall()]
            for statement in question["sql"]
        ]
    finally:
        connection.execute("USE memory")
        connection.execute("DETACH elsewhere")
        connection.close()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, list, type(None))) else str(value)


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            told = _answer(json.loads(line))
        except Exception as error:
            told = {"error": repr(error)}
        sys.__stdout__.write(json.dumps(told) + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]
