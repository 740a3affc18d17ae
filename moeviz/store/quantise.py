"""Fewer bits for numbers that carry noise: how gate weights and sums of scores are stored, and how far off they are.

Counts, biases and losses are stored as they are. Two kinds are not, because their last bits are noise that no
compressor shrinks: a gate weight gets 8 bits (`weight_codes`), a sum over tokens 16 significant bits
(`significant`).

Shapes: L layers, N sequences, S sequence, K experts per token.
"""

from __future__ import annotations

import numpy as np

SUM_BITS = 16
"""Significant bits of a sum over tokens: a hundred times finer than one bfloat16 term of it, a third fewer bytes."""
SUM_ERROR = 2.0**-SUM_BITS
"""Largest relative error that rounding to SUM_BITS makes: half of the last bit."""
_MANTISSA_BITS = 24
"""Of float32, with the leading one that is not stored."""


def weight_codes(weights_LNSK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gate weights in 8 bits: round(255 w / scale), an error of at most 0.002 of the scale.

    Returns: codes, uint8 [L, N, S, K], and the value of code 255, float32 [L, N]: 1 unless a weight exceeds 1.
    """
    weights = np.asarray(weights_LNSK, dtype=np.float32)
    peak_LN = weights.max(axis=(2, 3), initial=0.0)
    if not np.isfinite(peak_LN).all():  # a diverging run: NaN has no code, 0 is the honest one
        weights = np.nan_to_num(weights, posinf=0.0, neginf=0.0)
        peak_LN = weights.max(axis=(2, 3), initial=0.0)
    scale_LN = np.where(peak_LN > 1, peak_LN, np.float32(1)).astype(np.float32)
    codes = weights * (np.float32(255) / scale_LN)[:, :, None, None]
    np.rint(codes, out=codes)
    if codes.min(initial=0.0) < 0:  # a weight has no sign; asking costs less than np.clip
        np.maximum(codes, 0, out=codes)
    return codes.astype(np.uint8), scale_LN


def significant(values: np.ndarray, bits: int = SUM_BITS) -> np.ndarray:
    """`values` as float32 with `bits` significant bits, rounded to nearest, ties to even.

    The relative error is at most 2^-bits; zeros, infinities and NaN stay what they are.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    drop = np.uint32(_MANTISSA_BITS - bits)
    codes = values.view(np.uint32)
    half = np.uint32((1 << (int(drop) - 1)) - 1)
    rounded = (codes + half + ((codes >> drop) & np.uint32(1))) >> drop << drop
    return np.where(np.isnan(values), values, rounded.view(np.float32))
