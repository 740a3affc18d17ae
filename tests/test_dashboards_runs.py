"""Which run is shown: the named one, else the newest; others of its folder to pick from; paths stay out of links."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from dashboards_run import model_info

from dashboards.runs import asked_run, available
from moeviz.errors import RunNotFoundError
from moeviz.store.run import RunInfo, create_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """./runs with three runs, `old` before `middle` before `new`."""
    monkeypatch.chdir(tmp_path)
    for age, name in ((300, "old"), (200, "middle"), (100, "new")):
        info = RunInfo(name=name, model=model_info(), created=time.time() - age)
        create_run(tmp_path / "runs" / name, info)
    return tmp_path / "runs"


def test_flag_before_environment_before_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEVIZ_RUN", raising=False)
    assert asked_run([]) is None
    monkeypatch.setenv("MOEVIZ_RUN", "a")
    assert asked_run([]) == "a"
    assert asked_run(["--run", "b"]) == "b"
    assert asked_run(["--run=c", "something-else"]) == "c"
    monkeypatch.setenv("MOEVIZ_RUN", "")
    assert asked_run([]) is None


def test_the_newest_run_when_none_is_named(folder: Path) -> None:
    runs = available(None)
    assert runs.first == "new"
    assert list(runs.paths) == ["new", "middle", "old"]
    assert all(path.is_absolute() for path in runs.paths.values())


def test_a_named_run_comes_with_its_neighbours(folder: Path) -> None:
    assert available("old").first == "old"
    assert available(str(folder / "middle")).first == "middle"
    assert set(available("old").paths) == {"new", "middle", "old"}


def test_a_folder_stands_for_its_newest_run(folder: Path) -> None:
    assert available(str(folder)).first == "new"


def test_no_run_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("runs")
    with pytest.raises(RunNotFoundError, match="moeviz demo"):
        available(None)
