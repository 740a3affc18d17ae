"""One metric of all layers over steps: the chosen layer in front, its noise floor dashed, alerts as spans behind."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moeviz.colors import SEVERITY_COLORS, SEVERITY_MARKS, Theme
from moeviz.plots.style import CHOSEN, INK, NAMES_ABOVE, blank, fade

_NAMED_SPANS = 2
"""Alert spans that are named above the figure; more would hide each other."""


def metric_curves(
    frame: pd.DataFrame,
    *,
    label: str,
    layer: int | None = None,
    floor: pd.DataFrame | float | None = None,
    limits: tuple[float, float] | None = None,
    noun: str = "layer",
    theme: Theme = "dark",
    height: int = 240,
) -> go.Figure:
    """A thin line per layer; the chosen one in orange.

    Args:
        frame: `step`, `layer` (missing for a run-level series), `value`.
        label: name and unit of the value, for the axis.
        floor: what perfect balance would show with this many tokens, as `step`, `value` or one number: dashed.
        limits: of the axis, for quantities with a natural range.
        noun: what the layers of the frame are called.
    """
    ink = INK[theme]
    figure = blank(theme, height, showlegend=False, hovermode="closest", margin=NAMES_ABOVE)
    for at, rows in sorted(frame.groupby("layer", dropna=False), key=lambda group: group[0] == layer):
        chosen = at == layer
        name = "run" if pd.isna(at) else f"{noun} {int(at)}"
        figure.add_scatter(
            x=rows["step"],
            y=rows["value"],
            name=name,
            mode="lines",
            line={"color": CHOSEN if chosen else fade(ink.muted, 0.55), "width": 2.2 if chosen else 1},
            hovertemplate=f"{name}, step %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    _add_floor(figure, floor, frame, ink.text)
    figure.update_xaxes(title_text="step", showgrid=False, range=_span(frame))
    return figure.update_yaxes(title_text=label, range=limits)


def _span(frame: pd.DataFrame) -> list[int] | None:
    """First to last step, so that shaded spans do not stretch the axis."""
    return None if frame.empty else [int(frame["step"].min()), int(frame["step"].max())]


def _add_floor(
    figure: go.Figure, floor: pd.DataFrame | float | None, frame: pd.DataFrame, color: str
) -> None:
    if floor is None or frame.empty:
        return
    if isinstance(floor, pd.DataFrame):
        line = floor
    else:
        line = pd.DataFrame({"step": _span(frame), "value": [floor, floor]})
    figure.add_scatter(
        x=line["step"],
        y=line["value"],
        name="noise floor",
        mode="lines",
        line={"color": color, "width": 1, "dash": "dash"},
        hovertemplate="perfect balance would show %{y:.4g} with this many tokens<extra></extra>",
    )


def alert_spans(figure: go.Figure, alerts: pd.DataFrame, *, last_step: int) -> go.Figure:
    """Shade the steps of each alert episode and name its rule at the top. Returns the same figure.

    Args:
        alerts: `rule`, `severity`, `raised_step`, `cleared_step` (missing while open).
        last_step: where open episodes end for now.
    """
    for at, row in enumerate(alerts.itertuples()):
        until = last_step if pd.isna(row.cleared_step) else row.cleared_step
        color = SEVERITY_COLORS[row.severity]
        figure.add_vrect(
            row.raised_step,
            until,
            fillcolor=fade(color, 0.10),
            line={"color": fade(color, 0.7), "width": 1},
            layer="below",
        )
        if at < _NAMED_SPANS:
            figure.add_annotation(
                x=until,
                y=1,
                yref="paper",
                xanchor="right",
                yanchor="bottom",
                yshift=13 * at,
                showarrow=False,
                text=f"{SEVERITY_MARKS[row.severity]} {row.rule} from step {row.raised_step:,}",
                font={"color": color, "size": 11},
            )
    return figure
