"""Several runs in one figure: a line for each, told apart by hue, then by dash."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moeviz.colors import EXPERT_HUES, Theme
from moeviz.plots.style import blank

_DASHES = ("solid", "dash", "dot")
MOST_RUNS = len(EXPERT_HUES) * len(_DASHES)
"""More lines than these would repeat a look."""


def run_curves(
    frame: pd.DataFrame, *, label: str, log: bool = False, theme: Theme = "dark", height: int = 340
) -> go.Figure:
    """A line per run over steps; looks go by the order in which runs first appear.

    Args:
        frame: `run`, `step`, `value`; at most MOST_RUNS runs.
        label: name and unit of the value, for the axis.
        log: logarithmic values; those that are not positive are left out.

    Raises:
        ValueError: more runs than there are looks.
    """
    groups = list(frame.groupby("run", sort=False))
    if len(groups) > MOST_RUNS:
        raise ValueError(f"{len(groups)} runs exceed the {MOST_RUNS} that can be told apart; draw fewer")
    figure = blank(theme, height, hovermode="closest", showlegend=True)
    for at, (name, rows) in enumerate(groups):
        rows = rows[rows["value"] > 0] if log else rows
        figure.add_scatter(
            x=rows["step"],
            y=rows["value"],
            name=str(name),
            mode="lines+markers" if len(rows) <= 20 else "lines",
            line={
                "color": EXPERT_HUES[at % len(EXPERT_HUES)],
                "dash": _DASHES[at // len(EXPERT_HUES)],
                "width": 1.8,
            },
            marker={"size": 5},
            hovertemplate="%{fullData.name}<br>step %{x}: %{y:.4g}<extra></extra>",
        )
    figure.update_xaxes(title_text="step", showgrid=False)
    return figure.update_yaxes(title_text=label, type="log" if log else "linear")
