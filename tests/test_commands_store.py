"""The commands that read a run: what they print, in which form, and how they fail."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from store_runs import EXPERTS, L, Step, alert, event, new_run, write_steps

from moeviz.cli import main
from moeviz.commands.heatmap import heatmap
from moeviz.commands.show import spark
from moeviz.store.run import read_info
from moeviz.store.writer import SegmentWriter


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with runs/old (collapsing, ended) and runs/new (no step yet)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    path = new_run(tmp_path / "runs" / "old", created=1.0)
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(6), flush_every=6)
    writer.write(alert("COLLAPSE/1/5", 5, severity="critical"))
    writer.write(alert("STARVED/2/3", 4, cleared=4, message="expert 3 starves"))
    writer.write(event(6, "ended"))
    writer.close()
    new_run(tmp_path / "runs" / "new", created=2.0)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    assert main(list(argv)) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


def test_runs_lists_the_newest_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "runs")
    assert text.index("new") < text.index("old")
    assert "5 / 100" in text
    assert "ended" in text
    rows = json.loads(run(capsys, "runs", "runs", "--json"))
    assert [(row["name"], row["state"], row["last_step"]) for row in rows] == [
        ("new", "waiting", None),
        ("old", "ended", 5),
    ]


def test_runs_of_an_empty_folder_says_how_to_make_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "none").mkdir()
    assert "moeviz demo" in run(capsys, "runs", "none", status=1)


def test_show_takes_a_name_a_path_or_the_newest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("old", "runs/old", str(folder / "runs" / "old"), "runs/old/run.duckdb"):
        assert json.loads(run(capsys, "show", argument, "--json"))["name"] == "old"
    newest = json.loads(run(capsys, "show", "--json"))
    assert (newest["name"], newest["state"], newest["layers"]) == ("new", "waiting", [])


def test_show_states_the_loads_of_the_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run(capsys, "show", "old", "--step", "2", "--json"))
    step = Step(2)
    for layer, size in enumerate(EXPERTS):
        counts = step.counts_LE[layer, :size]
        found = facts["layers"][layer]
        assert found["load_rel"] == pytest.approx((counts / counts.sum() * size).tolist(), abs=1e-4)
        assert (found["tokens"], found["max_expert"]) == (step.tokens, int(counts.argmax()))
        assert found["drop_rate"] == 0
    assert facts["scalars"]["loss"]["value"] == pytest.approx([Step(at).loss for at in range(6)])
    assert [one["episode"] for one in facts["alerts"]] == ["COLLAPSE/1/5", "STARVED/2/3"]


def test_show_is_one_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", "old")
    for part in (
        "old",
        "ended",
        "step 5 of 100",
        "3 MoE layers x 4 to 7 experts, top-2",
        "expert load",
        "loss",
    ):
        assert part in text
    assert "1 open, 1 cleared" in text
    assert "raise the balance loss" in text
    assert "expert 3 starves" not in text, "cleared alerts are for `moeviz alerts`"


def test_show_of_a_step_that_was_not_recorded_names_those_that_were(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "steps 0 to 5 were" in run(capsys, "show", "old", "--step", "77", status=1)


def test_show_of_a_run_without_steps_is_short(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "show", "new")
    assert "waiting" in text
    assert "expert load" not in text


def test_show_says_how_a_run_ended(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = new_run(folder / "runs" / "broken")
    writer = SegmentWriter(path)
    writer.write(event(0, "started"))
    writer.write(event(3, "ended", status="failed"))
    writer.close()
    assert "ended (failed)" in run(capsys, "show", "broken")
    assert json.loads(run(capsys, "show", "broken", "--json"))["ending"] == "failed"


def test_alerts_open_first_with_their_remedy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "alerts", "old")
    assert text.index("CRITICAL") < text.index("expert 3 starves")
    assert "raise the balance loss" in text
    assert "expert 3 starves" not in run(capsys, "alerts", "old", "--open")
    rows = json.loads(run(capsys, "alerts", "old", "--json", "--open"))
    assert [(row["episode"], row["evidence"]["note"]) for row in rows] == [("COLLAPSE/1/5", "x")]
    assert "no alerts" in run(capsys, "alerts", "new")


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_query_prints_in_three_forms(folder: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    sql = "SELECT step, counts[1:2] AS two FROM expert_load WHERE layer = 1 ORDER BY step LIMIT 2"
    text = run(capsys, "query", "old", sql, "--format", form)
    expected = [Step(step).counts_LE[1, :2].tolist() for step in (0, 1)]
    if form == "json":
        assert json.loads(text) == [{"step": at, "two": expected[at]} for at in (0, 1)]
    elif form == "csv":
        assert text.splitlines() == ["step,two", *(f'{at},"{expected[at]}"' for at in (0, 1))]
    else:
        assert str(expected[1]) in text
        assert "2 rows" in text


def test_query_reads_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT count(*) AS n FROM expert_load"))
    assert json.loads(run(capsys, "query", "old", "-", "--format", "json")) == [{"n": 6 * L}]


def test_query_without_sql_explains_the_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "query", "old")
    for part in ("expert_load", "UINTEGER[]", "decisions", "vocab", "assignments per expert"):
        assert part in text


def test_query_refuses_to_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "read-only" in run(capsys, "query", "old", "DELETE FROM routing", status=1)


def test_pack_turns_the_run_into_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(run(capsys, "show", "old", "--json"))
    assert "rows in" in run(capsys, "pack", "old")
    assert read_info(folder / "runs" / "old").packed
    after = json.loads(run(capsys, "show", "old", "--json"))
    assert {**before, "packed": True} == after
    assert "packed already" in run(capsys, "pack", "old", status=1)


def test_a_mistyped_run_is_answered_with_a_near_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean runs/old?" in run(capsys, "show", "odl", status=1)


LAYERS = [
    {
        "layer": at,
        "tokens": 10_000,
        "load_rel": loads,
        "load_entropy": 0.5,
        "max_load": max(loads),
        "max_expert": 0,
    }
    for at, loads in enumerate([[0.0, 0.4, 1.0, 3.0, 5.0], [1.0, 1.0, 1.0, 1.0, 0.0]])
]


def plain(renderable: object, color: bool = False) -> str:
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=100, force_terminal=color, color_system="truecolor" if color else None
    )
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_colour_glyphs_carry_the_sign() -> None:
    lines = plain(heatmap(LAYERS, {0: 2, 1: 2}, color=False)).splitlines()
    assert lines[0].split("H")[0].split() == ["0", "x", "-", ".", "+", "#"]
    assert lines[1].split("H")[0].split() == ["1", ".", ".", ".", ".", "x"]


def test_a_hot_or_dead_expert_survives_pooling() -> None:
    wide = [{**LAYERS[0], "load_rel": [1.0] * 100 + [0.0] + [1.0] * 60 + [6.0] + [1.0] * 94}]
    line = plain(heatmap(wide, {0: 2}, width=100, color=False)).splitlines()[0].split("H")[0]
    assert line.count("x") == 1
    assert line.count("#") == 1
    assert "of 5 experts" in plain(heatmap(wide, {0: 2}, width=100, color=False))


def test_a_dead_expert_has_a_mark_and_even_load_the_background() -> None:
    text = plain(heatmap(LAYERS, {0: 2, 1: 2}), color=True)
    assert text.count("×") >= 2 + 1
    assert "48;2;22;24;28" in text


def test_many_layers_share_lines_in_half_blocks() -> None:
    layers = [{**LAYERS[1], "layer": at} for at in range(24)]
    lines = plain(heatmap(layers, dict.fromkeys(range(24), 2)), color=True).splitlines()
    assert sum("▀" in line for line in lines) == 12


def test_a_spark_line_spans_the_range_and_leaves_gaps() -> None:
    assert spark([0.0, 7.0, float("nan"), 3.0]) == "▁█ ▄"
    assert spark([2.0, 2.0]) == "▁▁"
    assert spark([float("nan")]) == " "
