"""Figures of latents show the numbers they are given, on the scale that they name."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moeviz import plots
from moeviz.colors import LOAD_LIMIT

SPECTRA = pd.DataFrame(
    [(step, place + 1, share) for step in range(30) for place, share in enumerate((0.7, 0.2, 0.1, 0.0))],
    columns=["step", "place", "share"],
)


def test_the_chosen_step_is_in_front_and_even_is_dashed() -> None:
    lines = plots.latent_spectrum(SPECTRA, step=7).data
    assert [line.name for line in lines[-2:]] == ["step 7", "all alike"]
    assert list(lines[-2].y) == [0.7, 0.2, 0.1]
    assert set(lines[-1].y) == {0.25}
    assert len(lines) <= 10


def test_time_maps_compare_with_an_even_share_or_start_at_zero() -> None:
    frame = pd.DataFrame({"step": [0, 0, 5, 5], "place": [0, 1, 0, 1], "value": [0.5, 0.5, 1.0, 0.0]})
    (even,) = plots.latent_time_map(frame, what="mass", place="slot", scale="even").data
    np.testing.assert_allclose(np.array(even.z, dtype=float), np.array([[0.0, 1.0], [0.0, np.nan]]))
    assert (even.zmin, even.zmax) == (-LOAD_LIMIT, LOAD_LIMIT)
    (weight,) = plots.latent_time_map(frame, what="std", place="dimension", scale="weight").data
    assert (weight.zmin, weight.zmax) == (0, 1)
    tiny = frame.assign(value=frame["value"] / 1000)
    (focus,) = plots.latent_time_map(tiny, what="focus", place="slot", scale="weight", least=0.1).data
    assert focus.zmax == 0.1


def test_a_picture_is_around_zero_or_even_or_from_zero() -> None:
    grid = np.array([[-2.0, 1.0], [0.5, 4.0], [0.0, 0.25]])
    (signed,) = plots.latent_picture(grid, place="dimension", scale="signed").data
    np.testing.assert_array_equal(np.array(signed.z), grid)
    assert signed.zmin == -signed.zmax
    (even,) = plots.latent_picture(np.full((3, 2), 1 / 3), place="slot", scale="even").data
    np.testing.assert_allclose(np.array(even.z), 0)
    (weight,) = plots.latent_picture(np.abs(grid), place="slot", scale="weight").data
    assert (weight.zmin, weight.zmax) == (0, 4)


def test_rows_are_named_by_their_tokens_which_cannot_write_markup() -> None:
    figure = plots.latent_picture(
        np.zeros((3, 2)), place="slot", scale="weight", texts=(" the", "\n", "<b>x")
    )
    assert list(figure.layout.yaxis.ticktext) == ["the 0", "↵ 1", "&lt;b>x 2"]
    blocks = plots.latent_picture(np.zeros((3, 2)), place="slot", scale="weight", texts=("a",) * 9, block=3)
    assert list(blocks.layout.yaxis.ticktext) == ["0", "3", "6"]
