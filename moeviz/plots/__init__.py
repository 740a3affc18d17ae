"""Figures: a table in, a plotly Figure out, and nothing else. Dashboards and notebooks draw the same ones.

No function here asks a store, reads a file or shows anything. Statistics (table to table) are functions of their own,
so that a test or a notebook can have the numbers without the drawing.
"""

from __future__ import annotations

from moeviz.plots.attention import attention_map
from moeviz.plots.curves import alert_spans, metric_curves
from moeviz.plots.experts import coactivation_map, coactivation_rows, domain_bars, life_line, token_lifts
from moeviz.plots.latents import latent_picture, latent_spectrum, latent_time_map
from moeviz.plots.loads import load_bars, load_river, load_time_map, river_groups
from moeviz.plots.paths import PathLinks, lift_matrix, path_links, path_sankey, strongest_routes
from moeviz.plots.runs import MOST_RUNS, run_curves
from moeviz.plots.settling import domain_time_map, saturation_curves

__all__ = [
    "MOST_RUNS",
    "PathLinks",
    "alert_spans",
    "attention_map",
    "coactivation_map",
    "coactivation_rows",
    "domain_bars",
    "domain_time_map",
    "latent_picture",
    "latent_spectrum",
    "latent_time_map",
    "life_line",
    "lift_matrix",
    "load_bars",
    "load_river",
    "load_time_map",
    "metric_curves",
    "path_links",
    "path_sankey",
    "river_groups",
    "run_curves",
    "saturation_curves",
    "strongest_routes",
    "token_lifts",
]
