"""How uneven a perfectly balanced router looks, because a step is a finite sample of tokens.

With N tokens and k of E experts each, a relative load r_i scatters with variance D (E/(Nk)) r (1 - k r/E). D
is the design effect of survey statistics: 1 for independent tokens, 6 to 21 in tiny byte-level runs, because
the tokens of one sequence resemble each other. Draw these floors beside every load chart; compare runs of
different N only on `cv2_excess`.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np

from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.load import Experts

Number = float | np.ndarray


def load_rel_var(
    rel: Number, tokens: Number, top_k: Experts, num_experts: Experts, design_effect: Number = 1.0
) -> np.ndarray:
    """Sampling variance of a relative load r over `tokens` tokens: D (E/(N k)) r (1 - k r/E).

    The binomial variance N pi (1 - pi) of a count, with pi = k r/E, in units of the even count N k/E. Shapes
    broadcast.
    """
    return np.asarray(design_effect * num_experts / (tokens * top_k) * rel * (1 - top_k * rel / num_experts))


def even_load_sd(
    tokens: Number, top_k: Experts, num_experts: Experts, design_effect: Number = 1.0
) -> np.ndarray:
    """Standard deviation of r_i under perfect balance: sqrt(D (E - k) / (N k))."""
    return np.sqrt(load_rel_var(1.0, tokens, top_k, num_experts, design_effect))


@cache
def _largest_of(num_experts: int) -> float:
    """Expected largest of E standard normal numbers, Blom's approximation: 1.43 at 8, 2.35 at 64."""
    return NormalDist().inv_cdf((num_experts - 0.375) / (num_experts + 0.25))


def expected_largest(num_experts: Experts) -> Number:
    """m_E, the expected largest of E standard normal numbers."""
    if isinstance(num_experts, int):
        return _largest_of(num_experts)
    widths = np.asarray(num_experts)
    return np.array([_largest_of(width) for width in widths.ravel().tolist()]).reshape(widths.shape)


@defines("maxvio_floor")
def maxvio_floor(
    tokens: Number, top_k: Experts, num_experts: Experts, design_effect: Number = 1.0
) -> np.ndarray:
    """MaxVio that a perfectly balanced router is expected to show on N tokens: m_E sd(r)."""
    return expected_largest(num_experts) * even_load_sd(tokens, top_k, num_experts, design_effect)


def cv2_floor(
    tokens: Number, top_k: Experts, num_experts: Experts, design_effect: Number = 1.0
) -> np.ndarray:
    """CV^2 that a perfectly balanced router is expected to show: D (E - k) / (N k)."""
    return load_rel_var(1.0, tokens, top_k, num_experts, design_effect)


@defines("cv2_excess")
def cv2_excess(
    cv2: Number, tokens: Number, top_k: Experts, num_experts: Experts, design_effect: Number = 1.0
) -> np.ndarray:
    """CV^2 beyond sampling noise, max(0, CV^2 - D (E - k)/(N k)): 0 for a balanced router of any N."""
    return np.maximum(cv2 - cv2_floor(tokens, top_k, num_experts, design_effect), 0)


def entropy_gap_floor(
    tokens: Number, top_k: Experts, num_experts: Experts, design_effect: Number = 1.0
) -> np.ndarray:
    """ln E - H that a perfectly balanced router is expected to show, nats: about D (E - k) / (2 N k)."""
    return cv2_floor(tokens, top_k, num_experts, design_effect) / 2


def gini_floor(
    tokens: Number, top_k: Experts, num_experts: Experts, design_effect: Number = 1.0
) -> np.ndarray:
    """Gini coefficient that a perfectly balanced router is expected to show: about sd(r) / sqrt(pi)."""
    return even_load_sd(tokens, top_k, num_experts, design_effect) / math.sqrt(math.pi)
