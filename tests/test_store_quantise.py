"""Numbers that are stored with fewer bits: an independent rounding, in Python's own arithmetic, says which."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moeviz.store.quantise import SUM_BITS, SUM_ERROR, significant, weight_codes


def _rounded(value: float, bits: int) -> float:
    """`value` to `bits` significant bits; Python's round() ties to even."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


@pytest.mark.parametrize("bits", [2, 9, SUM_BITS, 23])
def test_significant_bits_are_those_of_exact_arithmetic(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = np.concatenate((rng.lognormal(0, 20, 500), -rng.random(50), [1, 1.5, 3, 2 - 2**-23]))
    values = values.astype(np.float32)
    assert significant(values, bits).tolist() == [_rounded(float(value), bits) for value in values]


def test_ties_go_to_even() -> None:
    tie = np.array([1 + 2**-16, 1 + 3 * 2**-16], dtype=np.float32)  # halfway between two of 16 bits
    assert significant(tie).tolist() == [1, 1 + 4 * 2**-16]


def test_the_error_of_a_sum_is_as_told() -> None:
    values = np.random.default_rng(1).lognormal(3, 5, (40, 64)).astype(np.float32)
    error = np.abs(significant(values).astype(np.float64) - values) / values
    assert 0.9 * SUM_ERROR < error.max() <= SUM_ERROR


def test_what_has_no_digits_stays() -> None:
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(significant(values), values)
    assert np.signbit(significant(values)[1])


def test_weights_are_within_half_a_code() -> None:
    weights = np.random.default_rng(2).random((3, 2, 5, 4)).astype(np.float32)
    weights[1, 0] *= 7  # a router whose weights exceed 1 gets a scale of its own
    codes, scale_LN = weight_codes(weights)
    assert codes.dtype == np.uint8
    assert (scale_LN > 1).sum() == 1
    decoded = codes * (scale_LN / 255)[:, :, None, None]
    assert (np.abs(decoded - weights) <= (scale_LN / 255 * 0.5001)[:, :, None, None]).all()
