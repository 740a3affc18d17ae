"""Gradients and updates per expert, and how spiky a loss has been. E experts.

A dead expert has a gradient of exactly zero; weight decay then shrinks it, so watch the norm of its weights
too.
"""

from __future__ import annotations

import numpy as np

from moeviz.metrics.glossary.docstrings import defines


@defines("clip_frac")
def clip_frac(norms: np.ndarray, grad_clip: float) -> float:
    """Share of steps whose gradient norm was clipped."""
    return float((np.asarray(norms) > grad_clip).mean())


@defines("grad_per_token")
def grad_per_token(grad_norms_E: np.ndarray, counts_E: np.ndarray) -> np.ndarray:
    """Gradient norm of each expert per assignment, ||g_i|| / max(1, c_i)."""
    return np.asarray(grad_norms_E) / np.maximum(counts_E, 1)


@defines("update_ratio")
def update_ratio(update_norms_E: np.ndarray, weight_norms_E: np.ndarray) -> np.ndarray:
    """Relative size of an update, ||dW_i|| / ||W_i||; NaN for weights that are zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(update_norms_E) / np.asarray(weight_norms_E, dtype=np.float64)


@defines("spike_score")
def spike_score(values: np.ndarray, window: int = 1000, deviations: float = 7.0) -> float:
    """Share of points at least `deviations` sd above the mean of the `window` values before them. 0 to 1.

    OLMo 2 section 3.2 (1000 values, 7 sd); OLMo-core's monitor uses 128 and 6. NaN with fewer than window + 1
    values.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) <= window:
        return float("nan")
    past = np.lib.stride_tricks.sliding_window_view(values, window)[:-1]
    return float((values[window:] > past.mean(axis=1) + deviations * past.std(axis=1)).mean())
