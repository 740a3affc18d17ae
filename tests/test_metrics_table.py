"""The METRICS table is complete, unambiguous and true to the code; `moeviz metrics` prints it."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import import_module

import pytest

from moeviz.cli import main
from moeviz.metrics import GROUPS, METRICS, Metric, by_id, live_ids

FUNCTIONS = {
    "load_entropy": "load.load_entropy",
    "load_count": None,
    "maxvio_batch": "load.maxvio",
    "maxvio_global": "load.maxvio",
    "n_starved": "load.experts_below",
    "n_dead": "load.experts_below",
    "design_effect": None,
    "margin": "decision.margin_sel",
    "router_cos": "similarity.off_diagonal",
    "expert_w_cos": "similarity.cosines",
    "rc": "similarity.representation_collapse",
    "induction": "attention.induction_pattern",
    "duplicate": "attention.duplicate_pattern",
    "latent_pr": "latent.participation_ratio",
    "latent_erank_k": "latent.erank_through",
    "latent_erank_v": "latent.erank_through",
    "latent_q_erank": "latent.latent_erank",
    "latent_dim90": "latent.dims_for_variance",
    "eff_map_rank": "latent.effective_map_rank",
    "mi_token": "information.information",
    "mi_pos": "information.information",
    "mi_layer": "information.mutual_information",
    "path_entropy": "paths.paths",
}
"""Where a metric's function does not carry its name; None for those that only a running detector knows."""
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


def definition(metric: Metric) -> object:
    name = FUNCTIONS.get(metric.id, metric.id)
    if name is None:
        return None
    if "." in name:
        module, function = name.split(".")
        return getattr(import_module(f"moeviz.metrics.{module}"), function)
    homes = [import_module(f"moeviz.metrics.{module}") for module in MODULES]
    return next(getattr(home, name) for home in homes if hasattr(home, name))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.id)
def test_every_metric_is_explained_and_has_its_function(metric: Metric) -> None:
    for field in fields(Metric):
        if field.name != "live":
            assert getattr(metric, field.name).strip(), field.name
    assert metric.how_to_read.endswith((".", "”"))
    function = definition(metric)
    assert function is None or function.__doc__


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
    assert main(["metrics", "gini", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "gini"


def test_an_unknown_metric_is_answered_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "maxvio"]) == 1
    error = capsys.readouterr().err
    assert "maxvio_global" in error
    assert "'maxvio'" in error
