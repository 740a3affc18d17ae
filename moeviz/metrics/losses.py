"""Balance and stability losses, per layer, as definitions to compare with what a trainer adds to its loss.

The value at balance differs by library: 1 for Switch, Megatron, MegaBlocks and OLMo-core, k for the Mixtral
family in transformers, 1/E^2 for GShard. It is a value, not a minimum: load and scores that disagree
give 0.9. None of these detects collapse (see `load`).

B batch, S sequence, T tokens, E experts, K experts per token, L layers, D width, G groups. Weighted losses
(times alpha) carry another name wherever they are logged.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.load import Experts, _width, filled


@defines("aux_switch")
def aux_switch(
    share_LE: np.ndarray, mean_prob_LE: np.ndarray, num_experts: Experts | None = None
) -> np.ndarray:
    """Load balancing loss E sum_i s_i P_i: 1 at balance, up to E/k. Switch Transformers eq. 4-6.

    Args:
        share_LE: load shares s. Of the global batch for the global variant (Qiu et al. 2025).
        mean_prob_LE: P, the mean over tokens of the normalised scores; each row sums to 1.
    """
    return _width(share_LE, num_experts) * np.einsum("...e,...e->...", share_LE, mean_prob_LE)


@defines("aux_hf")
def aux_hf(share_LE: np.ndarray, mean_prob_LE: np.ndarray, top_k: int) -> float:
    """The loss as `transformers` computes it for the Mixtral family: k at balance, up to E.

    It pools the layers before it multiplies: eight layers, each collapsed onto another expert, read as
    perfect. Use it to reproduce a logged number, never to judge balance.
    """
    return float(share_LE.shape[-1] * top_k * (share_LE.mean(axis=0) @ mean_prob_LE.mean(axis=0)))


@defines("aux_gshard")
def aux_gshard(top1_counts_GE: np.ndarray, mean_prob_GE: np.ndarray) -> np.ndarray:
    """GShard's loss (1/E) sum_e (c_e/S) m_e of each group, on first choices: 1/E^2 at balance, up to 1/E.

    Lepikhin et al. 2020, algorithm 1.
    """
    share_GE = top1_counts_GE / top1_counts_GE.sum(axis=-1, keepdims=True)
    return (share_GE * mean_prob_GE).mean(axis=-1)


@defines("aux_seq")
def aux_seq(expert_ids_BSK: np.ndarray, probs_BSE: np.ndarray) -> float:
    """Sequence-wise loss, mean over sequences of sum_i f_i P_i: 1 at balance. DeepSeek-V3 eq. 17-20.

    f_i = E/(k S) x tokens of the sequence that chose expert i; P_i = mean normalised score over the sequence.
    """
    batch, length, top_k = expert_ids_BSK.shape
    num_experts = probs_BSE.shape[-1]
    rows_BSK = np.broadcast_to(np.arange(batch)[:, None, None], expert_ids_BSK.shape)
    counts_BE = np.zeros((batch, num_experts))
    np.add.at(counts_BE, (rows_BSK.ravel(), expert_ids_BSK.ravel()), 1)
    frequency_BE = counts_BE * num_experts / (top_k * length)
    return float((frequency_BE * probs_BSE.mean(axis=1)).sum(axis=-1).mean())


def logsumexp(logits_TE: np.ndarray) -> np.ndarray:
    """ln sum_j exp z_j over the last axis, in float64 and without overflow."""
    logits_TE = np.asarray(logits_TE, dtype=np.float64)
    top_T1 = logits_TE.max(axis=-1, keepdims=True)
    return np.log(np.exp(logits_TE - top_T1).sum(axis=-1)) + top_T1[..., 0]


@defines("z_loss")
def z_loss(logits_TE: np.ndarray) -> float:
    """Router z-loss, mean over tokens of (logsumexp_j z_j)^2, unweighted: (ln E)^2 at z = 0.

    ST-MoE eq. 5.
    """
    return float((logsumexp(logits_TE) ** 2).mean())


@defines("lse_rms")
def lse_rms(z_loss_L: float | np.ndarray) -> np.ndarray:
    """sqrt of the raw z-loss: the size of the router's logits in logit units, readable and comparable."""
    return np.sqrt(z_loss_L)


def bf16_rounding(magnitude: float) -> float:
    """Largest rounding error of a bfloat16 number of this size, 2^(floor(log2 |x|) - 8).

    0.06 at 16, 0.5 at 128: why routers are kept in float32.
    """
    return float(2.0 ** (np.floor(np.log2(abs(magnitude))) - 8)) if magnitude else 0.0


@defines("router_orth")
def router_orth(router_ED: np.ndarray, norm: Literal["l1", "fro"] = "l1") -> float:
    """Distance of the router's rows from orthonormal, ||R R^T - I||: 0 when orthonormal.

    `l1` is the entrywise 1-norm of SimBal (arXiv 2506.14038 eq. 4); `fro` the Frobenius norm of ERNIE 4.5.
    """
    gap_EE = router_ED @ router_ED.T - np.eye(len(router_ED))
    return float(np.abs(gap_EE).sum() if norm == "l1" else np.linalg.norm(gap_EE))


@defines("bias_range")
def bias_range(bias_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Span max b - min b of the selection bias, in units of the scores: 0 at the start."""
    high_L = filled(bias_LE, num_experts, -np.inf).max(axis=-1)
    return high_L - filled(bias_LE, num_experts, np.inf).min(axis=-1)


@defines("bias_rms")
def bias_rms(bias_LE: np.ndarray, num_experts: Experts | None = None) -> np.ndarray:
    """Root mean square of the selection bias around its mean: a shift of all experts changes nothing."""
    bias_LE = np.asarray(filled(bias_LE, num_experts, 0.0), dtype=np.float64)
    width_L = _width(bias_LE, num_experts)
    mean_L = bias_LE.sum(axis=-1) / width_L
    centred_LE = filled(bias_LE - mean_L[..., None], num_experts, 0.0)
    return np.sqrt(np.einsum("...e,...e->...", centred_LE, centred_LE) / width_L)
