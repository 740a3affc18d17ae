"""The attention figure shows the weights, and nothing where a causal model cannot look."""

from __future__ import annotations

import numpy as np

from moeviz import plots

Q = 6


def weights_QC() -> np.ndarray:
    return np.tril(np.random.default_rng(2).random((Q, Q)))


def test_weights_below_the_diagonal_and_nothing_above() -> None:
    weights = weights_QC()
    (heat,) = plots.attention_map(weights).data
    shown = np.array(heat.z)
    assert np.isnan(shown[np.triu_indices(Q, 1)]).all()
    below = np.tril_indices(Q)
    assert (shown[below] == weights[below]).all()
    assert (heat.zmin, heat.zmax) == (0, 1)


def test_a_map_that_is_not_causal_is_shown_whole() -> None:
    weights = np.full((Q, Q + 2), 1 / (Q + 2))
    (heat,) = plots.attention_map(weights).data
    assert (np.array(heat.z) == weights).all()


def test_labels_are_unique_even_for_repeated_tokens() -> None:
    (heat,) = plots.attention_map(weights_QC(), texts=["the", " cat", "\n", "the", " cat", "."]).data
    assert len(set(heat.x)) == Q
    assert list(heat.x) == list(heat.y)


def test_labels_are_left_out_of_a_pooled_map() -> None:
    (heat,) = plots.attention_map(weights_QC(), texts=["the"] * 3 * Q).data
    assert heat.x is None
