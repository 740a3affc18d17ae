"""What an expert is worth: the loss without it, and a proxy that needs no extra pass.

Two ways to remove an expert answer different questions, so name the one that was used: `reroute` (its logit
is minus infinity, the next expert takes over) and `zero` (its contribution is dropped, the other weights
stay).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from moeviz.metrics.glossary.docstrings import defines

Removal = Literal["reroute", "zero"]


class Knockout(NamedTuple):
    """Effect of removing an expert on the loss of a probe, nats per token; positive is a worse model."""

    mode: Removal
    delta: float
    standard_error: float

    @property
    def visible(self) -> bool:
        """Whether it is more than two standard errors: show nothing else."""
        return abs(self.delta) > 2 * self.standard_error


@defines("knockout")
def knockout(
    base_loss_N: np.ndarray, without_loss_N: np.ndarray, mode: Removal, design_effect: float = 1.0
) -> Knockout:
    """Mean change of the loss of the same tokens, paired: se = sd(delta) / sqrt(N) x sqrt(D).

    NaN losses (padding) are left out. D makes up for tokens of one sequence depending on each other; where
    sequences are known, `design_effect_of` estimates it.
    """
    delta_N = np.asarray(without_loss_N, dtype=np.float64) - base_loss_N
    delta_N = delta_N[~np.isnan(delta_N)]
    error = delta_N.std(ddof=1) / np.sqrt(len(delta_N)) * np.sqrt(design_effect)
    return Knockout(mode=mode, delta=float(delta_N.mean()), standard_error=float(error))


def design_effect_of(values_N: np.ndarray, sequences_N: np.ndarray) -> float:
    """Variance of a mean over tokens that come in sequences, over that of independent tokens; at least 1.

    The ratio of the cluster-robust to the plain variance of the mean (Kish's design effect), with the usual
    correction G/(G - 1) for G sequences; 1 for a single sequence, which says nothing about it.
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    centred_N = values_N - values_N.mean()
    _, place_N = np.unique(sequences_N, return_inverse=True)
    sums_G = np.bincount(place_N, weights=centred_N)
    plain = (centred_N**2).sum()
    if plain <= 0 or len(sums_G) < 2:
        return 1.0
    return max(float((sums_G**2).sum() / plain * len(sums_G) / (len(sums_G) - 1)), 1.0)


@defines("reap")
def reap(
    weights_TK: np.ndarray, ids_TK: np.ndarray, output_norms_TK: np.ndarray, num_experts: int
) -> np.ndarray:
    """Mean over the tokens routed to an expert of gate weight x norm of its output. [E].

    NaN for an unused expert.

    The saliency of REAP (arXiv 2510.13999): what an expert adds to the residual stream when it is used.
    """
    flat = np.ravel(ids_TK)
    total_E = np.bincount(flat, weights=np.ravel(weights_TK * output_norms_TK), minlength=num_experts)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total_E / np.bincount(flat, minlength=num_experts)
