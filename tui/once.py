"""The overview without a full screen: for scripts, logs, screen readers and agents. The same drawings, printed."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.segment import Segment

from moeviz.live import Snapshot
from tui.drawings.alert_list import draw_alert_list
from tui.drawings.entropy_rows import draw_entropy_rows
from tui.drawings.load_map import draw_load_map
from tui.drawings.now_panel import draw_now_panel
from tui.drawings.status_line import Status, draw_status
from tui.ink import Ink
from tui.lines import Line, Panel, Row, paragraph
from tui.scene import Eye, Scene, dead_LE, highest_load

MAX_WIDTH = 160


def overview_rows(snapshot: Snapshot, ink: Ink, width: int) -> list[Row]:
    """The overview as rows of at most `width` cells, one panel under the other."""
    width = min(width, MAX_WIDTH)
    status = Status(run_name=snapshot.run_name, latest=snapshot, behind_seconds=snapshot.behind_seconds)
    rows = [draw_status(status, ink, width)]
    if snapshot.step < 0:
        return [*rows, *paragraph("No step yet: the run waits for its first one.", ink, width, "muted")]
    scene = _scene(snapshot)
    num_layers = snapshot.info.num_layers
    map_lines = num_layers if ink.marks or num_layers <= 16 else (num_layers + 1) // 2
    rows += _titled(draw_load_map(scene, ink, width, map_lines + 2), ink, width)
    rows += _titled(draw_entropy_rows(scene, ink, width, map_lines + 1), ink, width)
    rows += _titled(draw_now_panel(scene, ink, width, 16), ink, width)
    rows += _titled(draw_alert_list(scene, ink, width, 3 * max(len(snapshot.open_alerts), 1)), ink, width)
    for alert in snapshot.open_alerts[:3]:
        rows += paragraph(f"{alert.rule}: {alert.remedy}", ink, width, "muted", indent=2)
    return rows


def _scene(snapshot: Snapshot) -> Scene:
    """With the cursor where the first alert is, or on the busiest expert."""
    first = next((alert for alert in snapshot.open_alerts if alert.layer is not None), None)
    if first is not None and first.layer is not None:
        eye = Eye(layer=first.layer, expert=first.experts[0] if first.experts else 0)
    else:
        highest = highest_load(snapshot)
        eye = Eye(layer=highest.layer, expert=highest.expert) if highest else Eye()
    return Scene(snapshot=snapshot, eye=eye.inside(snapshot.info))


def _titled(panel: Panel, ink: Ink, width: int) -> list[Row]:
    line = Line(ink, width).put(panel.title, "accent", bold=True)
    if panel.note:
        line.put(f"  {panel.note}", "faint")
    body = list(panel.rows)
    while body and not "".join(segment.text for segment in body[-1]).strip():
        body.pop()
    return [[Segment("")], line.row(), *body]


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """Everything that the overview shows, as plain data; numbers that are unknown are None."""
    dead = dead_LE(snapshot)
    layers = [
        {
            "layer": layer.layer,
            "name": layer.name,
            "num_experts": layer.num_experts,
            "top_k": layer.top_k,
            "load_entropy": _newest(snapshot.load_entropy_TL, layer.layer),
            "route_entropy": _newest(snapshot.route_entropy_TL, layer.layer),
            "n_eff": _plain(snapshot.n_eff_L[layer.layer]),
            "drop_rate": _plain(snapshot.drop_rate_L[layer.layer]),
            "dead": np.flatnonzero(dead[layer.layer]).tolist(),
            "load_rel": [_plain(value) for value in snapshot.load_rel_LE[layer.layer, : layer.num_experts]],
        }
        for layer in snapshot.info.layers
    ]
    return {
        "run": snapshot.run_name,
        "path": snapshot.run_path,
        "state": snapshot.state,
        "behind_seconds": _plain(snapshot.behind_seconds),
        "step": snapshot.step,
        "planned_steps": snapshot.planned_steps,
        "tokens": snapshot.tokens,
        "scalars": {
            name: _plain(series.values[-1]) for name, series in snapshot.scalars.items() if len(series.values)
        },
        "layers": layers,
        "alerts": [asdict(alert) for alert in snapshot.alerts],
        "dropped_samples": snapshot.dropped_samples,
        "notes": list(snapshot.notes),
    }


def _newest(history_TL: np.ndarray, layer: int) -> float | None:
    return _plain(history_TL[-1, layer]) if len(history_TL) else None


def _plain(value: Any) -> float | None:
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
