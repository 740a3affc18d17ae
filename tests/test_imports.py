"""Imported runs say what their files say, count for count; faulty lines are named and cost nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metrics_routing import published_counts, published_folder

from moeviz.cli import main
from moeviz.errors import MoevizError
from moeviz.imports.importing import import_recording, read_recording, sniff
from moeviz.imports.lines import LineReader, read_routes
from moeviz.store import run as run_module
from moeviz.store.queries import (
    alerts,
    coactivation,
    events,
    has_ended,
    load_matrix,
    metric_names,
    sequences,
    token_flow,
    trace_arrays,
)
from moeviz.store.reader import open_run

E, K = 6, 2
LAYERS = (1, 4)


@pytest.fixture(autouse=True)
def without_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing replaces the views anyway; writing them takes a process of its own."""
    monkeypatch.setattr(run_module, "write_views", lambda path: True)


def routes(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Two requests, of 5 and 3 tokens, through two layers: a line per (layer, token), layers in turn."""
    lines = []
    for request, length in (("a", 5), ("b", 3)):
        for layer in LAYERS:
            for position in range(length):
                weights = np.sort(rng.random(K))[::-1]
                lines.append(
                    {
                        "type": "route",
                        "req_id": request,
                        "token_idx": position,
                        "layer": layer,
                        "topk_ids": rng.permutation(E)[:K].tolist(),
                        "topk_weights": weights.tolist(),
                    }
                )
    return lines


def write_lines(path: Path, lines: list[dict[str, Any] | str]) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


META = {"type": "meta", "model_id": "some/moe", "top_k": K, "num_experts": E, "seed": 1}


def counted(lines: list[dict[str, Any]], layer: int) -> list[int]:
    found = Counter(one for line in lines if line["layer"] == layer for one in line["topk_ids"])
    return [found[expert] for expert in range(E)]


def test_a_vllm_log_opens_as_loads_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = routes(np.random.default_rng(0))
    file = write_lines(tmp_path / "log.jsonl", [META, *lines])
    assert main(["import", str(file), "--run", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert "route-jsonl, 1 steps, 2 layers x 6 experts, top-2" in captured.out
    assert captured.err == ""
    with open_run(tmp_path / "run") as store:
        assert store.notes == []
        assert has_ended(store)
        assert [(one.block, one.num_experts, one.top_k) for one in store.info.model.layers] == [
            (1, E, K),
            (4, E, K),
        ]
        loads = load_matrix(store)
        for at, layer in enumerate(LAYERS):
            assert loads[loads["layer"] == at]["count"].tolist() == counted(lines, layer)
        assert sequences(store)["n_tokens"].tolist() == [5, 3]
        for seq, request in enumerate("ab"):
            mine = [line for line in lines if line["req_id"] == request]
            trace = trace_arrays(store, 0, seq)
            expected = np.array([line["topk_ids"] for line in mine]).reshape(2, -1, K)
            np.testing.assert_array_equal(trace.experts_LSK, expected)
            weights = np.array([line["topk_weights"] for line in mine]).reshape(2, -1, K)
            np.testing.assert_allclose(trace.weights_LSK, weights, atol=0.002)
        pairs = coactivation(store, 0)
        assert len(pairs) > 0
        assert len(metric_names(store)) > 0
        assert alerts(store).empty


def test_faulty_lines_are_named_and_cost_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = routes(np.random.default_rng(1))
    good = dict(lines[0])
    faulty: list[dict[str, Any] | str] = [
        "not json",
        "[1, 2]",
        {**good, "topk_ids": [0, E]},
        {**good, "topk_ids": [0]},
        {**good, "topk_ids": [3, 3]},
        {**good, "topk_ids": [-1, 2]},
        {**good, "topk_ids": [True, 2]},
        {**good, "topk_weights": [0.5]},
        {**good, "topk_weights": [0.5, "x"]},
        {**good, "layer": None},
        {key: value for key, value in good.items() if key != "token_idx"},
    ]
    mixed: list[dict[str, Any] | str] = [META, *lines[:2]]
    for one in faulty:
        mixed.append(one)
    file = write_lines(tmp_path / "log.jsonl", [*mixed, *lines[2:]])
    file.write_text(file.read_text() + json.dumps(good)[:-20])
    assert main(["import", str(file), "--run", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().err
    assert "log.jsonl, line 4: no JSON: " in text
    assert "line 6: expert id 6 is outside 0 to 5; correct the id" in text
    assert f"{len(faulty) + 1:,} faulty lines in all" in text
    recording = read_recording(file, "route-jsonl")
    assert [fault.line for fault in recording.faults] == [*range(4, 4 + len(faulty)), len(lines) + 13]
    assert "cut off while it was written" in recording.faults[-1].problem
    with open_run(tmp_path / "run") as store:
        loads = load_matrix(store)
        for at, layer in enumerate(LAYERS):
            assert loads[loads["layer"] == at]["count"].tolist() == counted(lines, layer)
        detail = json.loads(events(store).set_index("kind").loc["imported", "detail"])
        assert detail["faulty_lines"] == len(faulty) + 1


def test_a_token_index_that_starts_again_begins_a_sequence(tmp_path: Path) -> None:
    lines: list[dict[str, Any] | str] = [
        {"type": "route", "layer": layer, "token_idx": position, "topk_ids": [turn, 5], "step": 3}
        for turn, length in enumerate((3, 1, 1))
        for layer in LAYERS
        for position in range(length)
    ]
    made = import_recording(write_lines(tmp_path / "log.jsonl", lines), tmp_path / "run")
    assert any("1/K" in note for note in made.recording.notes)
    assert any("--num-experts" in note for note in made.recording.notes)
    with open_run(tmp_path / "run") as store:
        assert sequences(store)["n_tokens"].tolist() == [3, 1, 1]
        for seq in range(3):
            flow = token_flow(store, 3, seq)
            assert set(flow["expert"]) == {seq, 5}
            np.testing.assert_allclose(flow["weight"], 1 / K, atol=0.002)


def test_experts_that_nobody_chose_count_when_told(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "log.jsonl", [{"layer": 0, "token_idx": 0, "topk_ids": [1]}])
    assert read_recording(file, "route-jsonl").model.max_experts == 2
    assert not any("different numbers" in note for note in read_recording(file, "route-jsonl").notes)
    more: list[dict[str, Any] | str] = [
        {"layer": layer, "token_idx": 0, "topk_ids": [1], "step": step}
        for step, layer in ((0, 0), (0, 2), (5, 2))
    ]
    uneven = read_recording(write_lines(tmp_path / "uneven.jsonl", more), "route-jsonl")
    assert any("different numbers of tokens in 1 steps, first in step 5" in note for note in uneven.notes)
    assert read_recording(file, "route-jsonl", num_experts=9).model.max_experts == 9
    decisions, _ = read_routes(
        LineReader([write_lines(tmp_path / "two.jsonl", [{**META, "num_experts": 9}])])
    )
    assert decisions.num_experts == 9


def test_a_megatron_trace_of_two_ranks_sums_over_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    expected = np.zeros((2, 3, E), dtype=int)
    kept: dict[tuple[int, int, int], list[list[int]]] = {}
    (tmp_path / "trace").mkdir()
    keys = [("decoder", None, 1), ("decoder", None, 3), ("mtp", 0, 1)]
    for rank in range(2):
        lines: list[dict[str, Any] | str] = []
        for step in range(2):
            for at, (block, mtp, layer) in enumerate(keys):
                ids = [sorted(rng.permutation(E)[:K].tolist()) for _ in range(4 + rank)]
                np.add.at(expected[step, at], np.array(ids).ravel(), 1)
                kept[rank, step, at] = ids
                line: dict[str, Any] = {"step": step, "stage": "pre_dispatch", "block": block, "layer": layer}
                line |= {"rank": rank, "num_tokens": len(ids), "topk": K, "top_indices": ids}
                lines.append(line if mtp is None else {**line, "mtp_idx": mtp})
        lines.append({"step": 1, "block": "decoder", "layer": 1, "rank": rank, "num_tokens": 9, "topk": K})
        write_lines(tmp_path / "trace" / f"router_trace_rank{rank}.jsonl", lines)
    made = import_recording(tmp_path / "trace", tmp_path / "run", num_experts=E)
    assert [(fault.file, fault.line) for fault in made.recording.faults] == [
        ("router_trace_rank0.jsonl", 7),
        ("router_trace_rank1.jsonl", 7),
    ]
    with open_run(tmp_path / "run") as store:
        names = [layer.name for layer in store.info.model.layers]
        assert names == ["layers.1", "layers.3", "mtp.0.layers.1"]
        for step in range(2):
            loads = load_matrix(store, step)
            np.testing.assert_array_equal(loads["count"].to_numpy().reshape(3, E), expected[step])
            for rank in range(2):
                trace = trace_arrays(store, step, 0, rank)
                assert trace.experts_LSK.tolist() == [kept[rank, step, at] for at in range(3)]


def test_published_counts_open_with_a_step_a_domain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = published_folder() / "expert_counts.json"
    for model, size in (("olmoe", 64), ("mistral", 8)):
        assert main(["import", str(file), "--run", str(tmp_path / model), "--model", model]) == 0
        with open_run(tmp_path / model) as store:
            assert [layer.block for layer in store.info.model.layers] == [0, 7, 15]
            named = events(store).query("kind == 'domain'")
            domains = [json.loads(detail)["domain"] for detail in named["detail"]]
            assert {"arxiv", "github", "wikipedia"} <= set(domains)
            for step, domain in zip(named["step"], domains, strict=True):
                loads = load_matrix(store, step)["count"].to_numpy().reshape(3, size)
                np.testing.assert_array_equal(loads, published_counts(model, domain))
            assert sequences(store).empty
    capsys.readouterr()
    assert main(["import", str(file), "--run", str(tmp_path / "x"), "--model", "gpt"]) == 1
    assert "give --model with one of olmoe, " in capsys.readouterr().err


def test_counts_that_no_router_makes_are_refused(tmp_path: Path) -> None:
    facts = {"experts": 3, "top_k": 2, "layers": [0, 5], "expert_counts": {"c4": [[2, 1, 1], [2, 1, 2]]}}
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"tiny": facts}))
    with pytest.raises(MoevizError, match=r"sums to \[4, 5\]"):
        import_recording(file, tmp_path / "run")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["counts.json"]


def test_nothing_is_overwritten_and_nonsense_is_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "log.jsonl", ["hello"])
    (tmp_path / "run").mkdir()
    with pytest.raises(MoevizError, match="is not overwritten"):
        import_recording(file, tmp_path / "run")
    with pytest.raises(MoevizError, match="name it with --format"):
        sniff(file)
    with pytest.raises(MoevizError, match=r"the first fault: log\.jsonl, line 1: no JSON"):
        import_recording(file, tmp_path / "other", "route-jsonl")
    with pytest.raises(MoevizError, match="no file at"):
        import_recording(tmp_path / "nowhere.jsonl", tmp_path / "other")
