"""The METRICS table is complete, unambiguous and true to the code; `moeviz metrics` prints it."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from moeviz.cli import main
from moeviz.metrics import GROUPS, METRICS, Metric, by_id, live_ids

MODULES = (
    "load",
    "noise",
    "losses",
    "decision",
    "capacity",
    "change",
    "coactivation",
    "specialization",
    "information",
    "paths",
    "similarity",
    "importance",
    "attention",
    "latent",
    "gradients",
)
WITHOUT_FUNCTION = {"load_count", "design_effect", "expert_w_norm", "grad_norm_expert"}
"""A count, a norm of torch's, and what only a running detector knows."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def definitions() -> dict[str, list[object]]:
    """Metric -> the functions that are marked as its definition."""
    found: dict[str, list[object]] = {}
    for module in MODULES:
        for function in vars(import_module(f"moeviz.metrics.{module}")).values():
            if getattr(function, "__module__", "") == f"moeviz.metrics.{module}":
                for metric_id in getattr(function, "metric_ids", ()):
                    found.setdefault(metric_id, []).append(function)
    return found


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.id)
def test_every_metric_is_explained_and_found_somewhere(metric: Metric) -> None:
    for field in fields(Metric):
        if field.name not in ("live", "analysis", "recorded"):
            assert getattr(metric, field.name).strip(), field.name
    assert metric.how_to_read.endswith((".", "”"))
    assert metric.places


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.id)
def test_a_metric_has_one_definition_whose_docstring_is_its_row(metric: Metric) -> None:
    functions = definitions().get(metric.id, [])
    assert len(functions) == (metric.id not in WITHOUT_FUNCTION)
    for function in functions:
        assert metric.text in (function.__doc__ or "")


def test_a_stored_name_belongs_to_one_metric() -> None:
    names = [name for metric in METRICS for name in metric.analysis]
    assert len(names) == len(set(names))


def test_the_documentation_page_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert PAGE.read_text() == page, "run: moeviz metrics --markdown > docs/metrics.md"
    for metric in METRICS:
        for fact in (metric.how_to_read, *metric.facts.values()):
            assert fact in page
    assert main(["metrics", "gini", "--markdown"]) == 1


def test_text_and_help_hold_every_fact() -> None:
    for metric in METRICS:
        assert all(fact in metric.text for fact in (metric.how_to_read, *metric.facts.values()))
        assert metric.id.replace("_", "") in metric.help.replace("\\", "").replace("_", "")
        assert metric.help.count("\n- ") == len(metric.facts)


def test_ids_are_unique_and_groups_partition_the_table() -> None:
    assert len({metric.id for metric in METRICS}) == len(METRICS)
    assert sum(len(group) for group in GROUPS.values()) == len(METRICS)
    assert by_id("gini").id == "gini"
    assert "gini" in live_ids()
    with pytest.raises(KeyError):
        by_id("nothing")


def test_the_command_lists_explains_and_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics"]) == 0
    listing = capsys.readouterr().out
    assert all(metric.id in listing for metric in METRICS)
    assert main(["metrics", "n_eff"]) == 0
    assert "exp(H(s))" in capsys.readouterr().out
    assert main(["metrics", "--json", "--live"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == list(live_ids())
    assert main(["metrics", "knockout_zero"]) == 0
    assert "knockout  Knock-out" in capsys.readouterr().out
    assert main(["metrics", "gini", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "gini"


def test_an_unknown_metric_is_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "maxvio"]) == 1
    error = capsys.readouterr().err
    assert "maxvio_global" in error
    assert "'maxvio'" in error
