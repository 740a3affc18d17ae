"""The metrics of one training step or of several, for all layers at once, from the sums of LoadRecords.

Only sums travel from the device, so only quantities that are functions of sums can be complete for every
step. What needs token-level scores (selection margin of each token, churn, co-activation) is computed from
sampled rows elsewhere.
"""

from __future__ import annotations

import numpy as np

from moeviz.metrics import capacity, load, losses, noise
from moeviz.metrics.load import Experts
from moeviz.metrics.load_block import LoadBlock
from moeviz.records import LoadRecord, ModelInfo

_MEANS = {"lse_squared": "z_loss", "confidence": "route_conf", "margin": "margin"}
"""Sum over tokens -> name of its mean. `entropy_nats` is normalised below."""


def layer_shapes(info: ModelInfo) -> tuple[np.ndarray, np.ndarray]:
    """(num_experts, top_k) of each MoE layer, int64 [L] each."""
    num_experts_L = np.array([layer.num_experts for layer in info.layers], dtype=np.int64)
    return num_experts_L, np.array([layer.top_k for layer in info.layers], dtype=np.int64)


def live_metrics(
    record: LoadRecord | LoadBlock,
    num_experts_L: np.ndarray,
    top_k_L: np.ndarray,
    design_effect_L: np.ndarray | float = 1.0,
) -> dict[str, np.ndarray]:
    """Metrics of one step, float64 [L] by id of METRICS; an id whose sums were not recorded is absent.

    Of a block of T steps: [T, L].

    Args:
        record: the sums of the step, with at least one token; or those of a block of such steps.
        num_experts_L: experts of each layer; columns of the record past it are padding.
        top_k_L: active experts per token of each layer.
        design_effect_L: D of `noise`, for the noise floor and the noise-corrected CV^2; of a block [T, L].
    """
    # Layers of one width need neither a mask nor a width for each row.
    columns = record.counts_LE.shape[-1]
    widths: Experts = columns if (num_experts_L == columns).all() else num_experts_L
    share_LE = load.load_share(record.counts_LE)
    values = _balance(share_LE, record.tokens, widths, top_k_L, design_effect_L)
    if record.dropped_LE is not None:
        values["drop_rate"] = capacity.drop_rate(record.dropped_LE, record.counts_LE)
    if record.weight_sum_LE is not None:
        values["importance_cv2"] = load.importance_cv2(record.weight_sum_LE, widths)
    if record.bias_LE is not None:
        values["bias_range"] = losses.bias_range(record.bias_LE, widths)
        values["bias_rms"] = losses.bias_rms(record.bias_LE, widths)
    return values | _decisions(record, share_LE, widths)


def _balance(
    share_LE: np.ndarray,
    tokens: int | np.ndarray,
    widths: Experts,
    top_k_L: np.ndarray,
    design_effect_L: np.ndarray | float,
) -> dict[str, np.ndarray]:
    # Passes over [L, E] are the cost of a step: what is a function of another metric of the step takes none.
    square_L = load.hill_sum(share_LE)
    cv2_L = load.cv2(square_L, widths)
    imbalance_L = load.load_imbalance(share_LE, widths)
    maxvio_L = imbalance_L - 1
    variance_L = noise.cv2_floor(tokens, top_k_L, widths, design_effect_L)
    entropy_L = load.entropy_nats(share_LE)
    n_eff_L = np.exp(entropy_L)
    return {
        "load_entropy": load.normalised_entropy(entropy_L, widths),
        "n_eff": n_eff_L,
        "n_eff2": 1 / square_L,
        "eff_util": load.utilisation(n_eff_L, top_k_L, widths),
        "load_cv": np.sqrt(cv2_L),
        "cv2_excess": np.maximum(cv2_L - variance_L, 0),
        "load_imbalance": imbalance_L,
        "maxvio_batch": maxvio_L,
        "maxvio_floor": noise.expected_largest(widths) * np.sqrt(variance_L),
        "excess_cov": load.excess(maxvio_L, top_k_L, widths),
        "min_load": load.min_load(share_LE, widths),
        "gini": load.gini(share_LE, widths),
    }


def _decisions(
    record: LoadRecord | LoadBlock, share_LE: np.ndarray, widths: Experts
) -> dict[str, np.ndarray]:
    means = {
        name: np.asarray(total, dtype=np.float64) / record.tokens for name, total in record.token_sums.items()
    }
    values = {_MEANS[name]: mean_L for name, mean_L in means.items() if name in _MEANS}
    if "z_loss" in values:
        values["lse_rms"] = losses.lse_rms(values["z_loss"])
    if "entropy_nats" in means:
        values["route_entropy"] = load.normalised_entropy(means["entropy_nats"], widths)
    if record.prob_sum_LE is not None:
        mean_prob_LE = record.prob_sum_LE.astype(np.float64) / np.asarray(record.tokens)[..., None]
        values["aux_switch"] = losses.aux_switch(share_LE, mean_prob_LE, widths)
        if "entropy_nats" in means:
            values["route_mi"] = np.maximum(load.entropy_nats(mean_prob_LE) - means["entropy_nats"], 0)
    return values
