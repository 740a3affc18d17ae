"""The head of the live page: the state of the run in words, and six numbers with their recent past."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from dashboards.components import component, duration, grouped
from moeviz.alerts.config import AlertConfig
from moeviz.colors import SEVERITY_MARKS
from moeviz.live import Snapshot
from moeviz.metrics.load import starved_line
from moeviz.records import Severity

DEAD_BELOW = AlertConfig().dead_line
"""Smoothed relative load under which an expert counts as dead (the line of the EXPERT_DEAD rule)."""
_SPARK_POINTS = 60
_WORDS = {"waiting": "waiting", "live": "live", "stale": "stale", "ended": "ended", "dead": "presumed dead"}
_TONES: tuple[Severity, ...] = ("critical", "error", "warning")


def header(snapshot: Snapshot) -> None:
    component("header")(key="header", data=header_data(snapshot))


def header_data(snapshot: Snapshot) -> dict[str, Any]:
    """State word, run facts and the six tiles."""
    layers, experts = snapshot.info.num_layers, snapshot.info.max_experts
    top_k = max((layer.top_k for layer in snapshot.info.layers), default=0)
    rate = snapshot.scalars.get("tokens_per_second")
    facts = [("step ", grouped(snapshot.step), "")] if snapshot.step >= 0 else [("no step yet", "", "")]
    facts += [("", grouped(rate.values[-1]), " tokens/s")] if rate is not None and len(rate.values) else []
    facts += [("", f"{layers} × {experts}", f" experts, top-{top_k}")]
    planned = snapshot.planned_steps
    return {
        "name": snapshot.run_name,
        "state": snapshot.state,
        "word": _WORDS[snapshot.state],
        "behind": _behind(snapshot),
        "alarms": _alarms(snapshot),
        "facts": facts,
        "progress": min(1.0, (snapshot.step + 1) / planned) if planned else 0.0,
        "planned": f"{grouped(snapshot.step + 1)} of {grouped(planned)} planned steps"
        if planned
        else "open end",
        "tiles": tiles(snapshot),
    }


def tiles(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Loss, worst entropy, largest load, starved experts, dropped assignments, recorder."""
    if snapshot.step < 0:
        return []
    return [
        _loss(snapshot),
        _entropy(snapshot),
        _largest(snapshot),
        _unused(snapshot),
        _dropped(snapshot),
        _recorder(snapshot),
    ]


def _tile(
    label: str,
    value: str,
    detail: str,
    help: str,
    *,
    tone: str = "",
    spark: Any = (),
    limits: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """One tile. `limits` are those of the sparkline: a quantity with a natural range must not look wild when flat."""
    recent = np.asarray(spark, dtype=np.float64)
    recent = recent[np.isfinite(recent)]
    if len(recent) > _SPARK_POINTS:
        recent = recent[np.linspace(0, len(recent) - 1, _SPARK_POINTS).round().astype(int)]
    line = [float(f"{point:.5g}") for point in recent]
    text = {"label": label, "value": value, "detail": detail, "help": help, "tone": tone}
    return {**text, "spark": line, "limits": limits or ([min(line), max(line)] if line else [0, 1])}


def _loss(snapshot: Snapshot) -> dict[str, Any]:
    series = snapshot.scalars.get("loss")
    if series is None or not len(series.values):
        return _tile("Loss", "–", "not recorded", "Pass loss= to probe.step().")
    now, before = float(series.values[-1]), float(series.values[0])
    detail = f"{now - before:+.3f} over {grouped(series.steps[-1] - series.steps[0])} steps"
    return _tile("Loss", f"{now:.3f}", detail, "Training loss of the newest step, nats.", spark=series.values)


def _entropy(snapshot: Snapshot) -> dict[str, Any]:
    layer = int(np.nanargmin(snapshot.load_entropy_TL[-1]))
    worst = float(snapshot.load_entropy_TL[-1, layer])
    effective = f"{snapshot.n_eff_L[layer]:.1f} of {snapshot.info.layers[layer].num_experts} experts"
    return _tile(
        "Lowest load entropy",
        f"{worst:.2f}",
        f"L{layer} · {effective}",
        "Entropy of the load over experts divided by its maximum ln E; 1 is even. Effective experts: exp(entropy).",
        tone=_layer_tone(snapshot, layer),
        spark=snapshot.load_entropy_TL[:, layer],
        limits=(0, 1),
    )


def _largest(snapshot: Snapshot) -> dict[str, Any]:
    load_LE = np.nan_to_num(snapshot.load_rel_LE, nan=-1.0)
    layer, expert = (int(at) for at in np.unravel_index(load_LE.argmax(), load_LE.shape))
    width, top_k = snapshot.info.layers[layer].num_experts, snapshot.info.layers[layer].top_k
    share = float(load_LE[layer, expert]) * top_k / width
    return _tile(
        "Largest load",
        f"{load_LE[layer, expert]:.1f}×",
        f"L{layer} E{expert} · {share:.0%} of tokens",
        "Load of the busiest expert in units of the even share 1/E; E/K is the most possible.",
        tone=_layer_tone(snapshot, layer),
        spark=snapshot.max_load_TL[:, layer],
        limits=(0, width / top_k),
    )


def _unused(snapshot: Snapshot) -> dict[str, Any]:
    widths = np.array([layer.num_experts for layer in snapshot.info.layers])
    smooth_LE = snapshot.load_rel_ema_LE
    dead_LE = smooth_LE < DEAD_BELOW
    starved_LE = (smooth_LE < starved_line(widths)[:, None]) & ~dead_LE
    places = [f"L{layer}" for layer in np.flatnonzero((dead_LE | starved_LE).any(axis=1))]
    where = (
        f"in {', '.join(places[:6])}{' …' if len(places) > 6 else ''}" if places else "every expert is in use"
    )
    return _tile(
        "Dead / starved",
        f"{int(dead_LE.sum())} / {int(starved_LE.sum())}",
        where,
        f"Smoothed load under {DEAD_BELOW} × the even share: dead. Under min(0.4, 1.2/√E): starved.",
        tone="error" if dead_LE.any() else "warning" if starved_LE.any() else "",
    )


def _dropped(snapshot: Snapshot) -> dict[str, Any]:
    layer = int(np.nan_to_num(snapshot.drop_rate_L).argmax())
    worst = float(np.nan_to_num(snapshot.drop_rate_L)[layer])
    return _tile(
        "Dropped",
        f"{worst:.2%}",
        f"most in layer {layer}" if worst > 0 else "no capacity limit hit",
        "Share of assignments beyond an expert's capacity, in the layer where it is largest.",
        tone="warning" if worst > 0.01 else "",
    )


def _recorder(snapshot: Snapshot) -> dict[str, Any]:
    lost = snapshot.dropped_samples
    help = "Token-level samples that did not fit the recorder's queue; loads and scalars are never dropped."
    cost = snapshot.scalars.get("recorder_ms")
    detail = f"{grouped(lost)} samples dropped"
    if cost is None or not len(cost.values):
        return _tile("Recorder", grouped(lost), "samples dropped", help, tone="warning" if lost else "")
    value = f"{float(np.median(cost.values)):.2f} ms"
    return _tile("Recorder, per step", value, detail, help, tone="warning" if lost else "", spark=cost.values)


def _alarms(snapshot: Snapshot) -> list[dict[str, str]]:
    """Open alerts by severity, worst first: `● 2 CRITICAL`."""
    found = Counter(alert.severity for alert in snapshot.open_alerts)
    return [
        {"severity": severity, "text": f"{SEVERITY_MARKS[severity]} {found[severity]} {severity.upper()}"}
        for severity in _TONES
        if found[severity]
    ]


def _layer_tone(snapshot: Snapshot, layer: int) -> str:
    found = [alert.severity for alert in snapshot.open_alerts if alert.layer == layer]
    return next((severity for severity in _TONES if severity in found), "")


def _behind(snapshot: Snapshot) -> str:
    seconds = snapshot.behind_seconds
    if snapshot.state == "live":
        return f"{seconds:.1f} s behind"
    if snapshot.state == "waiting":
        return "for the first step"
    return f"{duration(seconds)} ago" if snapshot.state == "ended" else f"no write for {duration(seconds)}"
