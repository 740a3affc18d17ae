"""How decided the router is about each token: entropy, confidence, margins, size of the logits.

Functions of token-level scores, for probes, notebooks and oracles. The live series of the same names are
computed in `live` from sums over tokens that the probe took on the device. T tokens, E experts, K experts per
token.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.load import entropy_nats
from moeviz.metrics.losses import logsumexp


def normalised_scores(logits_TE: np.ndarray, score: Literal["softmax", "sigmoid"] = "softmax") -> np.ndarray:
    """p of the whole table: softmax of the logits, or sigmoids divided by their sum (DeepSeek-V3 eq. 18)."""
    logits_TE = np.asarray(logits_TE, dtype=np.float64)
    if score == "softmax":
        return np.exp(logits_TE - logsumexp(logits_TE)[..., None])
    scores_TE = 1 / (1 + np.exp(-logits_TE))
    return scores_TE / scores_TE.sum(axis=-1, keepdims=True)


@defines("route_entropy")
def route_entropy(probs_TE: np.ndarray) -> float:
    """Mean over tokens of H(p_t) / ln E: 1 undecided, 0 hard."""
    return float(entropy_nats(probs_TE).mean() / np.log(probs_TE.shape[-1]))


@defines("route_conf")
def route_conf(probs_TE: np.ndarray) -> float:
    """Mean over tokens of the largest score: 1/E undecided, 1 hard."""
    return float(probs_TE.max(axis=-1).mean())


@defines("margin12")
def margin12(probs_TE: np.ndarray) -> float:
    """Mean gap between the best and the second score, 0 to 1; of logits, in logit units."""
    ordered_TE = np.sort(probs_TE, axis=-1)
    return float((ordered_TE[..., -1] - ordered_TE[..., -2]).mean())


@defines("margin")
def margin_sel(selection_TE: np.ndarray, top_k: int) -> float:
    """Mean gap between the last selected and the best rejected expert, selection bias included.

    The margin that decides flips: tokens with a small one change expert under quantisation or a small update.
    """
    ordered_TE = np.sort(selection_TE, axis=-1)
    return float((ordered_TE[..., -top_k] - ordered_TE[..., -top_k - 1]).mean())


@defines("gate_eff")
def gate_eff(weights_TK: np.ndarray) -> float:
    """Mean effective number of experts per token by gate weight, 1 / sum_j w_j^2 after w /= sum w: 1 to k."""
    unit_TK = weights_TK / weights_TK.sum(axis=-1, keepdims=True)
    return float((1 / (unit_TK**2).sum(axis=-1)).mean())


@defines("gate_mass")
def gate_mass(probs_TE: np.ndarray, top_k: int) -> float:
    """Mean score mass of the k best experts: k/E undecided, 1 hard.

    OLMoE (eq. 1) does not renormalise its gates: they sum to this.
    """
    return float(np.sort(probs_TE, axis=-1)[..., -top_k:].sum(axis=-1).mean())


@defines("route_mi")
def route_mi(probs_TE: np.ndarray) -> float:
    """Soft information between token and expert, H(mean p) - mean H(p), nats: 0 to ln E.

    High means balanced and decisive at once; collapse and indecision both give 0.
    """
    flat_TE = probs_TE.reshape(-1, probs_TE.shape[-1])
    return float(entropy_nats(flat_TE.mean(axis=0)) - entropy_nats(flat_TE).mean())


@defines("logit_rms")
def logit_rms(logits_TE: np.ndarray) -> float:
    """Root mean square of the logits. Growth is the sign of instability, not the size."""
    return float(np.sqrt(np.mean(np.square(logits_TE, dtype=np.float64))))


@defines("logit_max")
def logit_max(logits_TE: np.ndarray) -> float:
    """Largest absolute logit."""
    return float(np.abs(logits_TE).max())


@defines("lse_mean")
def lse_mean(logits_TE: np.ndarray) -> float:
    """Mean logsumexp of the logits, logit units: ln E at z = 0."""
    return float(logsumexp(logits_TE).mean())


@defines("router_norm")
def router_norm(router_ED: np.ndarray) -> float:
    """Frobenius norm of the router's weights."""
    return float(np.linalg.norm(router_ED))


@defines("router_update_ratio")
def router_update_ratio(before_ED: np.ndarray, after_ED: np.ndarray) -> float:
    """Relative size of a change of the router's weights, ||R' - R|| / ||R||."""
    return float(np.linalg.norm(after_ED - before_ED) / np.linalg.norm(before_ED))
