"""The boundaries of the house as tests: what a bare import loads, and what the command line costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moeviz.cli import COMMANDS

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "transformers",
    "deepspeed",
    "duckdb",
    "pandas",
    "pyarrow",
    "plotly",
    "streamlit",
    "textual",
    "numpy",
}


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after `statement` in a fresh interpreter."""
    program = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    return set(json.loads(output.splitlines()[-1]))


def test_bare_import_loads_nothing_heavy() -> None:
    assert loaded_by("import moeviz") & HEAVY == set()


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("from moeviz.cli import main; main(['--help'])") & HEAVY == set()


@pytest.mark.parametrize(
    "module", ["moeviz.store.reader", "moeviz.store.queries", "moeviz.plots", "moeviz.live"]
)
def test_reading_needs_no_torch(module: str) -> None:
    assert loaded_by(f"import {module}") & {"torch", "transformers", "deepspeed"} == set()


@pytest.mark.parametrize("module", ["moeviz.store.writer", "moeviz.derive"])
def test_writer_does_not_load_the_query_engine(module: str) -> None:
    assert loaded_by(f"import {module}") & {"duckdb", "pandas", "plotly", "streamlit", "textual"} == set()


def test_configuration_is_readable_without_torch() -> None:
    assert "torch" not in loaded_by("import trainer.config, trainer.presets, model.config")


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_explains_itself(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "moeviz.cli", command, "--help"], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 200


def test_unknown_command_names_the_nearest() -> None:
    result = subprocess.run([sys.executable, "-m", "moeviz.cli", "trian"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "moeviz train" in result.stderr


def test_import_contracts_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_no_file_has_a_name_that_says_nothing() -> None:
    banned = re.compile(r"(utils?|common|helpers?|manager|misc)\.py$")
    sources = [
        path
        for package in ("moeviz", "model", "trainer", "dashboards", "tui")
        for path in (ROOT / package).rglob("*.py")
    ]
    assert sources
    assert [str(path) for path in sources if banned.search(path.name)] == []
