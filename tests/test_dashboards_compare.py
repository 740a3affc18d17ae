"""The compare page draws the runs beside the opened one, keeps the chosen ones in its link, and reads what is new."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import streamlit as st
from dashboards_run import L, SyntheticRun
from test_dashboards_latents import numbers
from test_dashboards_pages import link_of, opened, plots_of

from dashboards import compared
from moeviz import plots
from moeviz.records import MetricRecord, ModelInfo, ScalarRecord
from moeviz.store.run import RunInfo, create_run
from moeviz.store.writer import SegmentWriter

STEPS = 12
LOSSES = {"fox": {0: 6.0, 10: 4.0}, "lr=1e-3,k=2": {0: 6.5, 10: 3.5}}
MAXVIO = {"fox": 0.5, "lr=1e-3,k=2": 0.05}


def evaluated(run: SyntheticRun, name: str) -> None:
    for step, loss in LOSSES[name].items():
        run.writer.write(ScalarRecord(step=step, rank=0, ts=time.time(), values={"val_loss": loss}))
        layers = np.linspace(0, 2 * MAXVIO[name], L, dtype=np.float32)  # their mean is MAXVIO
        run.writer.write(MetricRecord(step=step, values={"maxvio_global": layers}))
    run.writer.flush()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for name in LOSSES:
        run = SyntheticRun(folder / name, planned_steps=STEPS)
        run.write_all(STEPS)
        evaluated(run, name)
    return folder


@pytest.fixture(autouse=True, scope="module")
def closed_runs() -> Iterator[None]:
    yield
    st.cache_resource.clear()
    st.cache_data.clear()


def test_runs_stand_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(folder / "fox", monkeypatch, "compare")
    assert not app.error
    losses, loads = plots_of(app)
    drawn = {line["name"]: line for line in losses["data"]}
    assert set(drawn) == set(LOSSES)
    for name, line in drawn.items():
        assert list(numbers(line["x"])) == list(LOSSES[name])
        assert list(numbers(line["y"])) == list(LOSSES[name].values())
    assert loads["layout"]["yaxis"]["type"] == "log"
    for line in loads["data"]:
        assert numbers(line["y"]) == pytest.approx([MAXVIO[line["name"]]] * 2)
    rows = app.dataframe[0].value.set_index("run")
    assert rows.loc["fox", "val_loss"] == 4.0
    assert rows.loc["lr=1e-3,k=2", "maxvio_global"] == pytest.approx(0.05)
    assert "runs" not in link_of(app), "all of them need no link"


def test_a_dense_run_has_its_losses_here_and_only_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create_run(tmp_path / "gpt", RunInfo(name="gpt", model=ModelInfo(family="moeviz", layers=())))
    writer = SegmentWriter(path)
    writer.write(ScalarRecord(step=0, rank=0, ts=time.time(), values={"val_loss": 5.0, "loss": 5.0}))
    writer.close()
    app = opened(path, monkeypatch, "compare")
    assert not app.error
    assert [line["name"] for line in plots_of(app)[0]["data"]] == ["gpt"]
    assert plots_of(app)[1]["data"] == []
    other = opened(path, monkeypatch, "loads")
    assert "records no MoE layer" in other.error[0].value


def test_the_link_restores_the_chosen_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(folder / "fox", monkeypatch, "compare", runs="lr=1e-3,k=2|no-such-run")
    assert [line["name"] for line in plots_of(app)[0]["data"]] == ["lr=1e-3,k=2"]
    assert link_of(app)["runs"] == "lr=1e-3,k=2"


def test_a_run_is_read_again_when_it_was_written_to(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "fox", planned_steps=STEPS)
    paths = {"fox": tmp_path / "fox"}
    assert compared.curves(paths, ["fox"], "scalar", "val_loss").frame.empty
    run.write_all(2)
    evaluated(run, "fox")
    found = compared.curves(paths, ["fox"], "scalar", "val_loss").frame
    assert list(found["value"]) == list(LOSSES["fox"].values())


def test_a_run_that_cannot_be_read_is_a_row_that_says_so(tmp_path: Path) -> None:
    rows = compared.table({"gone": tmp_path / "gone"}, ["gone"])
    assert rows["alerts"].tolist() == ["unreadable"]


def test_every_run_has_a_look_of_its_own() -> None:
    names = [f"run {at}" for at in range(plots.MOST_RUNS)]
    frame = pd.DataFrame({"run": names, "step": 0, "value": np.arange(plots.MOST_RUNS) * 1.0})
    looks = {
        line.name: (line.line.color, line.line.dash)
        for line in plots.run_curves(frame, names, label="x").data
    }
    assert len(set(looks.values())) == plots.MOST_RUNS
    logarithmic = plots.run_curves(frame, names, label="x", log=True).data
    assert [line.name for line in logarithmic] == names[1:], "a logarithm leaves out what is not positive"
    assert {line.name: (line.line.color, line.line.dash) for line in logarithmic}.items() <= looks.items()
    with pytest.raises(ValueError, match=f"{plots.MOST_RUNS + 1} runs exceed"):
        plots.run_curves(frame, [*names, "one more"], label="x")
