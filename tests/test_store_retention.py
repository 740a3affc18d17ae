"""What `moeviz gc` plans, what it deletes, and above all what it leaves alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from store_runs import event, new_run, write_steps

from moeviz.cli import main
from moeviz.commands.gc import seconds
from moeviz.errors import MoevizError
from moeviz.store import retention
from moeviz.store.pack import pack_run
from moeviz.store.queries import load_matrix, sequences, token_flow
from moeviz.store.reader import open_run
from moeviz.store.writer import SegmentWriter

DAY = 86_400.0


def aged(
    path: Path, days: float, *, ended: bool = True, pid: int | None = None, host: str = platform.node()
) -> Path:
    """A run of two steps whose files are `days` old."""
    then = time.time() - days * DAY
    new_run(path, created=then)
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(2))
    if pid is not None:
        writer.write(event(0, "started", then, host=host, pid=pid))
    if ended:
        writer.write(event(2, "ended", then + 1))
    writer.close()
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "weights").write_bytes(bytes(1000))
    age_files(path, then)
    return path


def age_files(path: Path, then: float) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            os.utime(file, (then, then))


def verdicts(folder: Path, **rules: object) -> dict[str, str]:
    return {one.path.name: one.verdict for one in retention.plan(folder, **rules)}  # type: ignore[arg-type]


def test_a_run_goes_only_if_it_meets_every_rule(tmp_path: Path) -> None:
    for days in (1, 5, 40, 50):
        aged(tmp_path / f"d{days}", days)
    assert verdicts(tmp_path, keep_last=1) == {"d1": "keep", "d5": "delete", "d40": "delete", "d50": "delete"}
    assert verdicts(tmp_path, older_than_seconds=30 * DAY) == {
        "d1": "keep",
        "d5": "keep",
        "d40": "delete",
        "d50": "delete",
    }
    both = verdicts(tmp_path, keep_last=3, older_than_seconds=30 * DAY)
    assert both == {"d1": "keep", "d5": "keep", "d40": "keep", "d50": "delete"}
    with pytest.raises(MoevizError, match="no rule says"):
        retention.plan(tmp_path)


def test_nothing_goes_without_a_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aged(tmp_path / "old", 40)
    aged(tmp_path / "new", 1)
    assert main(["gc", str(tmp_path), "--older-than", "30d"]) == 0
    text = capsys.readouterr().out
    assert "nothing was deleted" in text
    assert "MB" in text
    assert (tmp_path / "old" / "run.json").exists()
    assert main(["gc", str(tmp_path), "--older-than", "30d", "--yes"]) == 0
    assert "MB freed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert main(["gc", str(tmp_path), "--older-than", "30d", "--yes"]) == 0
    assert "nothing to delete" in capsys.readouterr().out


def test_living_and_unreadable_runs_are_never_touched(tmp_path: Path) -> None:
    aged(tmp_path / "dead", 40, ended=False, pid=finished_pid())
    aged(tmp_path / "asleep", 40, ended=False, pid=os.getpid())
    aged(tmp_path / "fresh", 40, ended=False)
    os.utime(tmp_path / "fresh" / "run.json")
    aged(tmp_path / "remote", 0.5, ended=False, pid=1, host="elsewhere")
    aged(tmp_path / "gone", 2, ended=False, pid=1, host="elsewhere")
    (aged(tmp_path / "broken", 40) / "run.json").write_text("{")
    (tmp_path / "link").symlink_to(aged(tmp_path / "elsewhere" / "real", 40))
    found = {one.path.name: one for one in retention.plan(tmp_path, keep_last=0)}
    assert {name: one.verdict for name, one in found.items()} == {
        "dead": "delete",
        "gone": "delete",
        "remote": "keep",
        "asleep": "keep",
        "fresh": "keep",
        "link": "keep",
    }
    assert found["asleep"].reason == "its process still runs"
    assert retention.carry_out(list(found.values())) == found["dead"].bytes + found["gone"].bytes
    assert not (tmp_path / "dead").exists()
    assert {"asleep", "fresh", "broken", "link"} <= {path.name for path in tmp_path.iterdir()}


def test_a_run_that_came_alive_after_the_plan_is_spared(tmp_path: Path) -> None:
    path = aged(tmp_path / "one", 40, ended=False)
    planned = retention.plan(tmp_path, keep_last=0)
    assert planned[0].verdict == "delete"
    os.utime(path / "run.json")
    with pytest.raises(MoevizError, match="left alone: written a moment ago"):
        retention.carry_out(planned)
    assert (path / "run.json").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_dropping_samples_keeps_loads(tmp_path: Path, packed: bool) -> None:
    path = aged(tmp_path / "one", 40)
    if packed:
        pack_run(path)
    with open_run(path) as store:
        before = load_matrix(store)
        metrics = store.sql("SELECT * FROM metrics ORDER BY ALL")
        assert not token_flow(store, 1, 0).empty
    planned = retention.plan(tmp_path, drop_samples=True)
    assert [one.verdict for one in planned] == ["drop samples"]
    size = planned[0].bytes
    freed = retention.carry_out(planned)
    left = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert freed == size - left
    if not packed:
        assert freed > 0
    with open_run(path) as store:
        pd.testing.assert_frame_equal(load_matrix(store), before)
        pd.testing.assert_frame_equal(store.sql("SELECT * FROM metrics ORDER BY ALL"), metrics)
        assert token_flow(store, 1, 0).empty
        assert sequences(store).empty
        assert store.notes == []
    assert (path / "checkpoints" / "weights").exists()
    if packed:
        assert retention.plan(tmp_path, drop_samples=True)[0].reason == "has no samples"


def test_spans_of_time() -> None:
    assert [seconds(text) for text in ("90m", "12h", "30d", "2w", "1.5h")] == [
        5400,
        43200,
        30 * DAY,
        14 * DAY,
        5400,
    ]
    for text in ("30", "d", "3y", "-3d"):
        with pytest.raises(MoevizError, match="no span of time"):
            seconds(text)


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    path = aged(tmp_path / "one", 3)
    holding = retention.plan(tmp_path, keep_last=0)[0]
    assert holding.bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert holding.checkpoint_bytes == 1000
    routing = np.sum([file.stat().st_size for file in (path / "routing").iterdir()])
    assert routing < holding.sample_bytes < holding.bytes


def finished_pid() -> int:
    done = subprocess.Popen([sys.executable, "-S", "-c", ""])
    done.wait()
    return done.pid
