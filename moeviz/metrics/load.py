"""How evenly the tokens of a step are spread over the experts of a layer.

Everything here is a pure function of assignment counts. The value of an auxiliary loss is no substitute: with
flat scores it reads 1.009 ("balanced") while every token goes to one expert.

Arrays are `[..., E]`; leading axes are kept, so one layer, all layers or all steps go through the same line.
Layers of different width share an array by zero padding: pass `num_experts` (an int or an array of the
leading shape), and columns at or past it are ignored. A row without assignments gives NaN.

c counts; s = c / sum(c) load share, even 1/E; r = E s relative load, even 1; pi = k s coverage, even k/E.
"""

from __future__ import annotations

import numpy as np

from moeviz.metrics.glossary.docstrings import defines

Experts = int | np.ndarray
"""Number of experts: one for all rows, or one for each row."""


def _width(array_LE: np.ndarray, num_experts: Experts | None) -> np.ndarray:
    """E of each row as float64, shape of the leading axes."""
    width = array_LE.shape[-1] if num_experts is None else num_experts
    return np.asarray(width, dtype=np.float64)


def expert_mask(num_experts: Experts, width: int) -> np.ndarray:
    """True where a column of a `[..., width]` array is an expert and not padding. bool [..., width]."""
    return np.arange(width) < np.asarray(num_experts)[..., None]


def filled(table_LE: np.ndarray, num_experts: Experts | None, value: float) -> np.ndarray:
    """`table_LE` with `value` in its padding; the array itself where it has none."""
    width = table_LE.shape[-1]
    if num_experts is None or (isinstance(num_experts, int) and num_experts == width):
        return table_LE
    if np.equal(num_experts, width).all():
        return table_LE
    return np.where(expert_mask(num_experts, width), table_LE, value)


@defines("load_share")
def load_share(counts_LE: np.ndarray) -> np.ndarray:
    """Load share s_i = c_i / sum_j c_j. `[..., E]`, sums to 1, even 1/E.

    Switch Transformers eq. 5 is the case k = 1.
    """
    counts_LE = np.asarray(counts_LE, dtype=np.float64)
    total_L1 = counts_LE.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts_LE / total_L1


@defines("load_rel")
def load_rel(share_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Relative load r_i = E s_i. `[..., E]`, 0 to E/k, even 1.

    "Relative expert load" in DeepSeek-V3, fig. 9.
    """
    return share_LE * _width(share_LE, num_experts)[..., None]


@defines("coverage")
def coverage(share_LE: np.ndarray, top_k: Experts) -> np.ndarray:
    """Coverage pi_i = k s_i = c_i / N: the fraction of tokens that use expert i.

    0 to 1, sums to k, even k/E. OLMoE eq. 7 with D = all data.
    """
    return share_LE * np.asarray(top_k, dtype=np.float64)[..., None]


def load_cv2(share_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Squared coefficient of variation of the load, E sum(s^2) - 1: 0 even, E/k - 1 collapsed.

    Shazeer et al. 2017 eq. 6-7 penalise this (of gate sums and of a smooth load).
    """
    return cv2(hill_sum(share_LE), _width(share_LE, num_experts))


def hill_sum(share_LE: np.ndarray) -> np.ndarray:
    """sum_i s_i^2: 1/E even, 1/k collapsed. The probability that two assignments share their expert."""
    return np.einsum("...e,...e->...", share_LE, share_LE)


def cv2(hill_sum_L: np.ndarray, num_experts: Experts) -> np.ndarray:
    """`load_cv2` of a known sum of squared shares, E sum(s^2) - 1."""
    return np.maximum(num_experts * hill_sum_L - 1, 0)


@defines("load_cv")
def load_cv(share_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Coefficient of variation std(r) with ddof 0: 0 even, sqrt(E/k - 1) collapsed."""
    return np.sqrt(load_cv2(share_LE, num_experts))


@defines("importance_cv2")
def importance_cv2(weight_sum_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """CV^2 of the summed gate weights of each expert: 0 even, E/k - 1 collapsed.

    Shazeer et al. 2017 eq. 6-7. The twin of `load_cv2` by weight: they part where a few heavy gates carry an
    expert.
    """
    return load_cv2(load_share(weight_sum_LE), num_experts)


@defines("load_imbalance")
def load_imbalance(share_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Largest relative load max_i r_i: 1 even, E/k collapsed. OLMo-core logs it as "load imbalance"."""
    return _width(share_LE, num_experts) * share_LE.max(axis=-1)


@defines("maxvio_batch", "maxvio_global")
def maxvio(share_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Maximal violation max_i r_i - 1: 0 even, E/k - 1 collapsed.

    Wang et al. 2024 (loss-free balancing) eq. 4. Of the counts of one step it is MaxVio_batch; of counts
    accumulated over an evaluation set or a window of steps it is MaxVio_global. Both have a noise floor: see
    `noise.maxvio_floor`.
    """
    return load_imbalance(share_LE, num_experts) - 1


@defines("min_load")
def min_load(share_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Smallest relative load min_i r_i: 1 even, 0 when an expert is unused."""
    return _width(share_LE, num_experts) * filled(share_LE, num_experts, np.inf).min(axis=-1)


def entropy_nats(share_LE: np.ndarray) -> np.ndarray:
    """Shannon entropy -sum_i s_i ln s_i over the last axis, nats, with 0 ln 0 = 0. NaN stays NaN."""
    share_LE = np.asarray(share_LE, dtype=np.float64)
    log_LE = np.log(np.maximum(share_LE, 1e-300))  # half the time of a logarithm under a mask
    return np.maximum(-np.einsum("...e,...e->...", share_LE, log_LE), 0)


@defines("load_entropy")
def load_entropy(share_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Load entropy H / ln E: 1 even, ln k / ln E collapsed. NaN for a layer of one expert."""
    return normalised_entropy(entropy_nats(share_LE), _width(share_LE, num_experts))


def normalised_entropy(nats_L: np.ndarray, num_experts: Experts) -> np.ndarray:
    """An entropy over experts in units of its maximum, H / ln E: 0 to 1. NaN for one expert."""
    most_L = np.log(num_experts)
    return nats_L / np.where(most_L > 0, most_L, np.nan)


@defines("n_eff")
def n_eff(share_LE: np.ndarray) -> np.ndarray:
    """Effective number of experts exp(H): E even, k collapsed. Hill number of order 1."""
    return np.exp(entropy_nats(share_LE))


@defines("n_eff2")
def n_eff2(share_LE: np.ndarray) -> np.ndarray:
    """Effective number of experts 1 / sum(s^2) = E / (1 + CV^2). Hill number of order 2."""
    return 1 / hill_sum(share_LE)


@defines("eff_util")
def eff_util(share_LE: np.ndarray, top_k: Experts, num_experts: Experts | None = None) -> np.ndarray:
    """Effective utilisation u = (exp(H) - k) / (E - k): 1 even, 0 collapsed, comparable across E and k.

    NaN where E = k: a layer that uses all its experts has nothing to balance.
    """
    return utilisation(n_eff(share_LE), top_k, _width(share_LE, num_experts))


def utilisation(n_eff_L: np.ndarray, top_k: Experts, num_experts: Experts) -> np.ndarray:
    """`eff_util` of a known effective number of experts: (n_eff - k) / (E - k), NaN where E = k."""
    free_L = np.asarray(num_experts, dtype=np.float64) - top_k
    return (n_eff_L - top_k) / np.where(free_L > 0, free_L, np.nan)


@defines("excess_cov")
def excess_cov(share_LE: np.ndarray, top_k: Experts, num_experts: Experts | None = None) -> np.ndarray:
    """Excess coverage v = (max_i pi_i - k/E) / (1 - k/E) = MaxVio / (E/k - 1): 0 even, 1 collapsed.

    Comparable across E and k. NaN where E = k.
    """
    return excess(maxvio(share_LE, num_experts), top_k, _width(share_LE, num_experts))


def excess(maxvio_L: np.ndarray, top_k: Experts, num_experts: Experts) -> np.ndarray:
    """`excess_cov` of a known maximal violation, MaxVio / (E/k - 1), NaN where E = k."""
    most_L = np.asarray(num_experts, dtype=np.float64) / top_k - 1
    return maxvio_L / np.where(most_L > 0, most_L, np.nan)


@defines("gini")
def gini(share_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Gini coefficient sum_i (2i - E - 1) s_(i) / E, s ascending, i from 1: 0 even, 1 - k/E collapsed.

    Padding sorts to the front with share 0; the ranks of the true experts are shifted back by its length.
    """
    columns = share_LE.shape[-1]
    width_L = _width(share_LE, num_experts)
    rank_sum_L = np.sort(share_LE, axis=-1) @ np.arange(1.0, columns + 1)
    return (2 * rank_sum_L - (2 * columns - width_L + 1)) / width_L


def starved_line(num_experts: Experts, *, cap: float = 0.4, scale: float = 1.2) -> np.ndarray:
    """Relative load below which an expert counts as starved, tau(E) = min(0.4, 1.2 / sqrt(E)).

    0.4 up to nine experts (5 % of the assignments at E = 8), 0.15 at 64, 0.075 at 256: below every load that
    healthy OLMoE-1B-7B and Mixtral-8x7B show on a training mixture.
    """
    return np.minimum(cap, scale / np.sqrt(np.asarray(num_experts, dtype=np.float64)))


@defines("n_starved", "n_dead")
def experts_below(
    rel_LE: np.ndarray, line: float | np.ndarray, num_experts: Experts | None = None
) -> np.ndarray:
    """Number of experts with r_i < line: starved or dead experts, when loads are smoothed."""
    below_LE = rel_LE < np.asarray(line, dtype=np.float64)[..., None]
    if num_experts is not None:
        below_LE &= expert_mask(num_experts, rel_LE.shape[-1])
    return below_LE.sum(axis=-1)


@defines("load_chi2")
def load_chi2(counts_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Pearson's X^2 of the counts against even ones, N k CV^2; its mean is E - k for a balanced router.

    Under independent balanced top-k routing X^2 (E-1)/(E-k) follows chi^2 with E - 1 degrees of freedom. Real
    tokens are correlated and N is large, so everything is significant: never alert on it.
    """
    return np.asarray(counts_LE).sum(axis=-1) * load_cv2(load_share(counts_LE), num_experts)
