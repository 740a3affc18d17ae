"""One attention map, for notebooks and exports; the dashboard draws its own in the browser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from moeviz.colors import Theme
from moeviz.plots.style import INK, blank, unit_scale


def attention_map(
    map_QC: np.ndarray,
    *,
    texts: Sequence[str] = (),
    largest: float = 1.0,
    causal: bool = True,
    theme: Theme = "dark",
    height: int = 560,
) -> go.Figure:
    """Rows are queries, columns the keys they read; 0 to `largest` on the sequential table.

    Args:
        map_QC: weights, each row sums to 1 unless the map was pooled.
        texts: one label per row of an unpooled map; numbers where empty.
        largest: end of the colour scale; keep it the same for the maps that are compared.
        causal: hatch the half above the diagonal, which a causal model cannot read, instead of colouring its zeros.
    """
    ink = INK[theme]
    rows, cols = map_QC.shape
    z_QC = np.array(map_QC, dtype=np.float64)
    if causal and rows == cols:
        z_QC[np.triu_indices(rows, 1)] = np.nan
    labels = [f"{at} {text!r}"[:18] for at, text in enumerate(texts)] if len(texts) == rows == cols else None
    figure = blank(theme, height, showlegend=False, plot_bgcolor="rgba(0,0,0,0)")
    figure.add_heatmap(
        z=z_QC,
        x=labels,
        y=labels,
        hoverongaps=False,
        hovertemplate="%{y} reads %{x}: %{z:.3f}<extra></extra>",
        **unit_scale(theme, "weight", largest),
    )
    if causal and rows == cols:
        figure.add_shape(
            type="path",
            path=f"M -0.5 -0.5 L {cols - 0.5} -0.5 L {cols - 0.5} {rows - 0.5} Z",
            fillcolor=ink.grid,
            opacity=0.25,
            line={"width": 0},
            layer="below",
        )
    figure.update_xaxes(title_text="key (what is read)", showgrid=False, constrain="domain")
    return figure.update_yaxes(
        title_text="query (who reads)",
        showgrid=False,
        autorange="reversed",
        scaleanchor="x",
        constrain="domain",
    )
