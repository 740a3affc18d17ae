"""Several runs in one figure: a line for each, told apart by hue, then by dash."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from moeviz.colors import EXPERT_HUES, Theme
from moeviz.plots.style import blank

_DASHES = ("solid", "dash", "dot")
MOST_RUNS = len(EXPERT_HUES) * len(_DASHES)
"""More lines than these would repeat a look."""
_LEGEND_PIXELS = 21
"""Height of a row of the legend, which has two runs side by side in half a page."""


def run_curves(
    frame: pd.DataFrame,
    runs: Sequence[str],
    *,
    label: str,
    log: bool = False,
    theme: Theme = "dark",
    height: int = 280,
) -> go.Figure:
    """A line per run over steps, under a legend.

    Args:
        frame: `run`, `step`, `value`.
        runs: all that are compared, at most MOST_RUNS. A run looks alike in all figures of the same runs, those that
            miss some of them too.
        label: name and unit of the value, for the axis.
        log: logarithmic values; those that are not positive are left out.

    Raises:
        ValueError: more runs than there are looks.
    """
    if len(runs) > MOST_RUNS:
        raise ValueError(f"{len(runs)} runs exceed the {MOST_RUNS} that can be told apart; draw fewer")
    legend_pixels = _LEGEND_PIXELS * -(-len(runs) // 2)
    figure = blank(theme, height + legend_pixels, hovermode="closest", showlegend=True)
    for at, name in enumerate(runs):
        rows = frame[(frame["run"] == name) & ((frame["value"] > 0) | (not log))]
        if rows.empty:
            continue
        figure.add_scatter(
            x=rows["step"],
            y=rows["value"],
            name=name,
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
    # Labels at 1, 2 and 5 of each decade: at every digit they run into each other.
    scale = {"type": "log", "dtick": "D2"} if log else {"type": "linear"}
    return figure.update_yaxes(title_text=label, **scale)
