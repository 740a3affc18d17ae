"""How routing changes over training, on a fixed probe.

The same tokens at every checkpoint, in evaluation mode.

Compare checkpoints of one run only on the same tokens; otherwise the difference is the data's. T tokens, K
experts per token, E experts, C checkpoints; leading axes (layers) are kept.
"""

from __future__ import annotations

import numpy as np

from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.load import entropy_nats


def overlap(ids_TK: np.ndarray, other_ids_TK: np.ndarray) -> np.ndarray:
    """Share of each token's experts that both routings chose, |A and B| / k. `[..., T]`, 0 to 1."""
    shared_TK = (ids_TK[..., :, None] == other_ids_TK[..., None, :]).any(axis=-1)
    return shared_TK.mean(axis=-1)


@defines("saturation")
def saturation(early_ids_TK: np.ndarray, final_ids_TK: np.ndarray) -> np.ndarray:
    """Router saturation: mean over tokens of `overlap` with the final checkpoint. OLMoE eq. 5.

    0 to 1; random routing gives k/E. Pass the first column alone ([..., :1]) for the first choice.
    OLMoE-1B-7B: about 60 % after 0.4 % of pretraining, 80 % after 40 %, later layers earlier, layer 0 much
    later.
    """
    return overlap(early_ids_TK, final_ids_TK).mean(axis=-1)


@defines("saturation_adj")
def saturation_adj(saturation_L: float | np.ndarray, top_k: int, num_experts: int) -> np.ndarray:
    """Saturation beyond chance, (sat - k/E) / (1 - k/E): comparable across E and k."""
    chance = top_k / num_experts
    return np.asarray((saturation_L - chance) / (1 - chance))


@defines("churn")
def churn(before_ids_TK: np.ndarray, after_ids_TK: np.ndarray) -> np.ndarray:
    """Share of a token's experts replaced from one probe to the next; random routing gives 1 - k/E.

    Falls with the learning rate.
    """
    return 1 - saturation(before_ids_TK, after_ids_TK)


@defines("flip1")
def flip1(before_ids_TK: np.ndarray, after_ids_TK: np.ndarray) -> np.ndarray:
    """Share of tokens whose first choice changed."""
    return (before_ids_TK[..., 0] != after_ids_TK[..., 0]).mean(axis=-1)


@defines("last_fluctuation")
def last_fluctuation(first_ids_CT: np.ndarray, steps_C: np.ndarray) -> np.ndarray:
    """Step of the last checkpoint at which each token's first choice was not its final one, int [T].

    -1 for tokens that never moved.

    StableMoE section 1: 40.9 % of the tokens of BASE layers still move after 20 % of training, 15.4 % after
    80 %.
    """
    differs_CT = first_ids_CT != first_ids_CT[-1]
    last_T = len(first_ids_CT) - 1 - differs_CT[::-1].argmax(axis=0)
    return np.where(differs_CT.any(axis=0), np.asarray(steps_C)[last_T], -1)


def still_moving(last_steps_T: np.ndarray, at_steps: np.ndarray) -> np.ndarray:
    """Share of tokens whose last fluctuation is at or after each step: the curve of StableMoE fig. 2."""
    return (last_steps_T[:, None] >= np.asarray(at_steps)).mean(axis=0)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence over the last axis, nats: 0 to ln 2. The square of scipy's distance."""
    return entropy_nats((p + q) / 2) - (entropy_nats(p) + entropy_nats(q)) / 2


@defines("probe_drift")
def probe_drift(before_TE: np.ndarray, after_TE: np.ndarray) -> np.ndarray:
    """Mean Jensen-Shannon divergence of the scores of two probes, nats: moves before ids flip."""
    return np.maximum(jensen_shannon(before_TE, after_TE), 0).mean(axis=-1)
