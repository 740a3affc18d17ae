"""One layer in numbers: the layer, its busiest experts over time, and the expert under the cursor."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from moeviz.colors import LOAD_LIMIT, load_level
from moeviz.metrics.load import starved_line
from tui import quantities
from tui.drawings.alert_list import headline
from tui.drawings.layer_bars import shown_loads
from tui.heat import Grid, full_lines
from tui.ink import LEVELS, Ink
from tui.lines import Line, Panel, Row, chart, filled, paragraph, resample, sparkline
from tui.scene import DEAD_LOAD, Scene, coverage, noise_log2_L

TOP = 8
_MARGIN = 6


def draw_layer_facts(scene: Scene, ink: Ink, width: int, height: int) -> Panel:
    """What the numbers of this layer are, beside what they could be."""
    shot, layer = scene.snapshot, scene.layer
    info = shot.info.layers[layer]
    loads, average = shown_loads(scene), shot.load_rel_ema_LE[layer, : info.num_experts]
    known = loads[np.isfinite(loads)]
    starved = float(starved_line(info.num_experts))
    facts = (
        ("experts used", quantities.fixed(float(shot.n_eff_L[layer]), 1), f"of {info.num_experts}"),
        ("load H/ln E", quantities.fixed(_newest(shot.load_entropy_TL, layer)), "1 is even"),
        ("token H/ln E", quantities.fixed(_newest(shot.route_entropy_TL, layer)), "1 is undecided"),
        (
            "highest load",
            quantities.ratio(known.max(initial=-1)),
            f"at most {quantities.ratio(info.num_experts / info.top_k)}",
        ),
        ("lowest load", quantities.ratio(known.min(initial=info.num_experts)), "in this step"),
        ("starved", str(int((average < starved).sum())), f"below {quantities.ratio(starved)}"),
        ("dead", str(int((average < DEAD_LOAD).sum())), f"below {quantities.ratio(DEAD_LOAD)}"),
        ("dropped", quantities.percent(float(shot.drop_rate_L[layer])), "of assignments"),
        ("scores", info.score, "with bias" if info.has_bias else ""),
    )
    return Panel(
        f"layer {layer}", filled(_fact_rows(facts, ink, width), ink, width, height), f"block {info.block}"
    )


def _newest(history_TL: np.ndarray, layer: int) -> float:
    return float(history_TL[-1, layer]) if len(history_TL) else math.nan


def _fact_rows(facts: Iterable[tuple[str, str, str]], ink: Ink, width: int) -> list[Row]:
    """Label, value and what to compare it with, in columns."""
    rows = []
    for label, value, aside in facts:
        row = (
            Line(ink, width)
            .put(label, "muted", 13)
            .put(value, "strong", 8, align="right", bold=True)
            .put("  ")
        )
        rows.append(row.put(aside, "faint").row())
    return rows


def draw_top_experts(scene: Scene, ink: Ink, width: int, height: int) -> Panel:
    """The busiest experts of the layer now, a row each over the last ticks, in the colours of the map."""
    order = np.argsort(-np.nan_to_num(shown_loads(scene), nan=-1.0), kind="stable")[
        : min(TOP, max(height - 1, 1))
    ]
    title = f"busiest {len(order)} over time"
    history = scene.history
    if history is None or not len(history.steps):
        words = "reading the history" if scene.snapshot.step >= 0 else "no step yet"
        return Panel(title, filled([Line(ink, width).put(words, "muted").row()], ink, width, height))
    columns = max(width - _MARGIN - 7, 1)
    tick = min(max(columns // len(history.steps), 1), 4)
    loads_TE = history.load_rel_TE[-(columns // tick) :]
    strips = _strips(np.repeat(loads_TE[:, order].T, tick, axis=1), scene, ink, columns)
    rows = []
    for expert, strip in zip(order.tolist(), strips, strict=True):
        here = expert == scene.expert
        line = Line(ink, width).put(
            f"E{expert} ", "strong" if here else "muted", _MARGIN, align="right", bold=here
        )
        line.extend(strip).put(quantities.ratio(float(loads_TE[-1, expert])), "text", 7, align="right")
        rows.append(line.row())
    steps = history.steps[-len(loads_TE) :]
    first, last = f"step {quantities.count(steps[0])}", quantities.count(steps[-1])
    axis = Line(ink, width).to(_MARGIN + columns - len(steps) * tick)
    if axis.used + len(first) + len(last) + 2 <= _MARGIN + columns:
        axis.put(first, "faint")
    rows.append(axis.to(_MARGIN + columns - len(last)).put(last, "faint").row())
    return Panel(f"{title} · last {len(steps)} ticks", filled(rows, ink, width, height))


def _strips(loads_RT: np.ndarray, scene: Scene, ink: Ink, columns: int) -> list[Row]:
    """Loads as rows of cells, newest at the right."""
    if ink.marks:
        with np.errstate(divide="ignore"):
            logs = np.log2(loads_RT)
        return [
            Line(ink, columns).put(sparkline(row, -LOAD_LIMIT, LOAD_LIMIT, columns)).row() for row in logs
        ]
    levels = load_level(loads_RT, float(noise_log2_L(scene.snapshot)[scene.layer]), LEVELS).astype(np.int64)
    levels[levels < 0] = ink.load.dead
    early = np.full((len(levels), columns - levels.shape[1]), ink.load.blank)
    grid = Grid("full", len(levels), 0, columns, 1, 1, 1)
    return full_lines(np.hstack([early, levels]), ink.load, ink, grid)


def draw_expert_facts(scene: Scene, ink: Ink, width: int, height: int) -> Panel:
    """The expert under the cursor: its load now, on average and over time, and the alerts that name it."""
    shot, layer, expert = scene.snapshot, scene.layer, scene.expert
    average = float(shot.load_rel_ema_LE[layer, expert])
    order = np.argsort(-np.nan_to_num(shown_loads(scene), nan=-1.0), kind="stable")
    rank = int(np.flatnonzero(order == expert)[0]) + 1
    facts = (
        ("load", quantities.ratio(scene.load_rel), "1× is even"),
        ("tokens", quantities.percent(coverage(shot, layer, scene.load_rel)), "use it now"),
        ("mean load", quantities.ratio(average), "20 steps"),
        ("rank", str(rank), f"of {scene.num_experts} by load"),
    )
    rows = _fact_rows(facts, ink, width)
    rows += _life_line(scene, ink, width, max(min(height - len(rows) - 3, 6), 0))
    for alert in shot.open_alerts:
        if alert.layer == layer and expert in alert.experts:
            rows += [Line(ink, width).row(), headline(alert, scene, ink, width)]
            rows += paragraph(alert.message, ink, width, "muted")
    return Panel(f"expert {expert}", filled(rows, ink, width, height))


def _life_line(scene: Scene, ink: Ink, width: int, lines: int) -> list[Row]:
    """Its relative load over the history, on a log2 scale from 1/8 to 8x."""
    if scene.history is None or lines < 2:
        return []
    with np.errstate(divide="ignore"):
        logs = np.log2(scene.history.load_rel_TE[:, scene.expert])
    columns = max(width - 4, 1)
    drawn = chart(resample(np.maximum(logs, -LOAD_LIMIT), columns), -LOAD_LIMIT, LOAD_LIMIT, columns, lines)
    labels = {0: "8×", lines - 1: "1/8", **({lines // 2: "1×"} if lines % 2 else {})}
    rows = [Line(ink, width).row()]
    for at, text in enumerate(drawn):
        row = Line(ink, width).put(labels.get(at, ""), "faint", 3, align="right").put(" ")
        rows.append(row.put(text, "accent", on="field").row())
    return rows
