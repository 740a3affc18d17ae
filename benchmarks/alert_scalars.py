"""The scalar rules in numbers.

False alarms on healthy losses and gradient norms, steps until a bad one is told.
"""

from __future__ import annotations

import numpy as np

from moeviz.alerts import ScalarDetector
from moeviz.records import ScalarRecord

RULES = ("LOSS_SPIKE", "LOSS_DIVERGING", "GRAD_EXPLOSION")
ONSET = 2000


def unit_noise(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit variance: Gaussian, Student t with 5 degrees of freedom, or AR(1) with memory 0.5."""
    if kind == "t5":
        return rng.standard_t(5, size) / np.sqrt(5 / 3)
    white = rng.normal(size=size)
    if kind == "gauss":
        return white
    series, last = np.empty(size), 0.0
    for index, shock in enumerate(white):
        last = 0.5 * last + np.sqrt(0.75) * shock
        series[index] = last
    return series


def scalar_false_alarms(steps: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Alarms per 10,000 steps of a loss that falls and a gradient norm that stays, by kind of noise."""
    table = {}
    for number, kind in enumerate(("gauss", "t5", "ar")):
        rng = np.random.default_rng(number + 100 * seed)
        loss = (2 + 2 * np.exp(-np.arange(steps) / 3000)) * (1 + 0.01 * unit_noise(kind, steps, rng))
        norm = np.exp(0.15 * unit_noise("ar" if kind == "ar" else "gauss", steps, rng))
        detector, raised = ScalarDetector(), dict.fromkeys(RULES, 0)
        for step in range(steps):
            values = {"loss": float(loss[step]), "grad_norm": float(norm[step])}
            for alert in detector.observe(ScalarRecord(step=step, rank=0, ts=0.0, values=values)):
                raised[alert.rule] += alert.raised_step == step
        table[kind] = {rule: 1e4 * count / steps for rule, count in raised.items()}
    return table


def scalar_delays(seed: int = 0) -> dict[str, int | None]:
    """Steps until a rising loss is called diverging and a growing gradient norm an explosion."""
    rng, after = np.random.default_rng(seed), np.arange(8000) - ONSET
    table: dict[str, int | None] = {}
    for rate in (1e-3, 3e-4, 1e-4):
        loss = 2 * (1 + np.clip(after, 0, None) * rate) * (1 + 0.01 * rng.normal(size=8000))
        table[f"loss +{rate:g} a step"] = first(loss, "loss", "LOSS_DIVERGING")
    norm = np.exp(0.15 * rng.normal(size=8000))
    table["gradient norm x 10"] = first(norm * np.where(after < 0, 1, 10), "grad_norm", "GRAD_EXPLOSION")
    growth = np.exp(np.clip(after, 0, 3000) / 300)
    table["gradient norm, e-fold in 300 steps"] = first(norm * growth, "grad_norm", "GRAD_EXPLOSION")
    return table


def first(series: np.ndarray, name: str, rule: str) -> int | None:
    """Steps from the onset to the first alert of a rule."""
    detector = ScalarDetector()
    for step, value in enumerate(series):
        for alert in detector.observe(ScalarRecord(step=step, rank=0, ts=0.0, values={name: float(value)})):
            if alert.rule == rule and step >= ONSET:
                return step - ONSET
    return None
