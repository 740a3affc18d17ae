"""How much of a latent space is used.

Compressed key/value vectors, and the slots of two-stage latent attention.

N tokens (at least ten times the width), C latent width, H heads, M slots, S positions.
"""

from __future__ import annotations

import numpy as np

from moeviz.metrics.glossary.docstrings import defines
from moeviz.metrics.load import entropy_nats


def spectrum(latents_NC: np.ndarray) -> np.ndarray:
    """Singular values of the centred latents, largest first: [C], zeros where there are fewer tokens.

    By the eigenvalues of the square, in float64: exact to about 1e-8 of the largest, and much faster where N >> C.
    """
    centred_NC = latents_NC.astype(np.float64) - latents_NC.mean(axis=0, dtype=np.float64)
    return _roots(centred_NC.T @ centred_NC)


def _roots(square_CC: np.ndarray) -> np.ndarray:
    """Square roots of the eigenvalues of X^T X, largest first; what is rounding is 0."""
    eigenvalues_C = np.linalg.eigvalsh(square_CC)[::-1]
    rounding = eigenvalues_C[0] * np.finfo(np.float64).eps * len(eigenvalues_C)
    return np.sqrt(np.where(eigenvalues_C > rounding, eigenvalues_C, 0.0))


@defines("latent_pr")
def participation_ratio(latents_NC: np.ndarray) -> float:
    """(sum lambda)^2 / sum lambda^2 of the covariance's eigenvalues: 1 to C dimensions, NaN when all are alike."""
    eigenvalues_C = spectrum(latents_NC) ** 2
    total = (eigenvalues_C**2).sum()
    return float(eigenvalues_C.sum() ** 2 / total) if total > 0 else float("nan")


def effective_rank(matrix: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values: 1 to the rank. Roy & Vetterli 2007."""
    return _erank(np.linalg.svd(matrix, compute_uv=False))


def _erank(singular: np.ndarray) -> float:
    total = singular.sum()
    return float(np.exp(entropy_nats(singular / total))) if total > 0 else float("nan")


@defines("latent_erank", "latent_q_erank")
def latent_erank(latents_NC: np.ndarray) -> float:
    """Effective rank of centred latents: dimensions in use, 1 to C; NaN when all are alike."""
    return _erank(spectrum(latents_NC))


@defines("latent_erank_k", "latent_erank_v")
def erank_through(latents_NC: np.ndarray, square_CC: np.ndarray) -> float:
    """Effective rank of C W^T, the centred latents after an up-projection: dimensions that are read, 1 to C.

    Args:
        latents_NC: latents.
        square_CC: W^T W of the up-projection W, of whatever height.
    """
    centred_NC = latents_NC.astype(np.float64) - latents_NC.mean(axis=0, dtype=np.float64)
    values_C, vectors_CC = np.linalg.eigh(square_CC.astype(np.float64))
    through_NC = centred_NC @ (vectors_CC * np.sqrt(np.maximum(values_C, 0)))
    return _erank(_roots(through_NC.T @ through_NC))


@defines("latent_util")
def latent_util(latents_NC: np.ndarray) -> float:
    """Effective rank over width: 0 to 1."""
    return latent_erank(latents_NC) / latents_NC.shape[1]


@defines("latent_dim90")
def dims_for_variance(latents_NC: np.ndarray, share: float = 0.9) -> int:
    """Fewest principal dimensions that hold `share` of the variance."""
    variance_C = spectrum(latents_NC) ** 2
    return int(np.searchsorted(np.cumsum(variance_C) / variance_C.sum(), share - 1e-12) + 1)


@defines("latent_dead")
def latent_dead(latents_NC: np.ndarray) -> int:
    """Dimensions whose standard deviation is below 1 % of the median one."""
    deviation_C = latents_NC.std(axis=0)
    return int((deviation_C < 0.01 * np.median(deviation_C)).sum())


def slot_mass(write_SM: np.ndarray) -> np.ndarray:
    """Mean attention that tokens pay to each slot, `[..., M]`: sums to 1, even 1/M.

    The load of a latent slot.
    """
    return write_SM.mean(axis=-2)


@defines("slot_share")
def slot_share(write_SM: np.ndarray) -> np.ndarray:
    """Part of a token's attention that goes to slots, mean over tokens: 0 to 1. Leading shape."""
    return write_SM.sum(axis=-1).mean(axis=-1)


@defines("slot_n_eff")
def slot_n_eff(write_SM: np.ndarray) -> np.ndarray:
    """Effective number of slots, exp H(slot mass): 1 to M."""
    return np.exp(entropy_nats(slot_mass(write_SM)))


@defines("slot_dead")
def slot_dead(write_SM: np.ndarray) -> np.ndarray:
    """Slots with less than 2 % of an even share of the mass."""
    mass_M = slot_mass(write_SM)
    return (mass_M < 0.02 / mass_M.shape[-1]).sum(axis=-1)


@defines("read_entropy")
def read_entropy(read_MS: np.ndarray) -> np.ndarray:
    """Mean entropy of a slot's view of the tokens / ln S: 0 reads one token, 1 reads all alike.

    Leading shape.
    """
    return entropy_nats(read_MS).mean(axis=-1) / np.log(read_MS.shape[-1])


def slot_read_entropy(read_SM: np.ndarray) -> np.ndarray:
    """Entropy of each slot's view of S tokens / ln S, `[..., M]`; the mean over slots is `read_entropy`."""
    return entropy_nats(np.swapaxes(read_SM, -1, -2)) / np.log(read_SM.shape[-2])


@defines("write_entropy")
def write_entropy(write_SM: np.ndarray) -> np.ndarray:
    """Mean entropy of a token's choice of slots / ln M: 0 to 1. Leading shape."""
    return entropy_nats(write_SM).mean(axis=-1) / np.log(write_SM.shape[-1])


@defines("slot_overlap")
def slot_overlap(read_MS: np.ndarray) -> float:
    """Mean cosine of what two slots read: 1 when slots are copies of each other."""
    unit_MS = read_MS / np.linalg.norm(read_MS, axis=-1, keepdims=True)
    slots = unit_MS.shape[-2]
    squared = np.linalg.norm(unit_MS.sum(axis=-2), axis=-1) ** 2
    return float(((squared - slots) / (slots * (slots - 1))).mean())


@defines("eff_map_rank")
def effective_map_rank(write_SM: np.ndarray, read_MS: np.ndarray) -> float:
    """Effective rank of the token-to-token map write @ read: at most M."""
    return effective_rank(write_SM @ read_MS)


def future_leak(write_SM: np.ndarray, read_MS: np.ndarray) -> float:
    """Largest entry of write @ read above the diagonal: 0 in a causal model."""
    return float(np.abs(np.triu(write_SM @ read_MS, k=1)).max())


TELLING = {
    "mla": ("latent_erank", "latent_erank_k", "latent_erank_v", "latent_dim90", "latent_dead"),
    "two-stage": ("slot_n_eff", "slot_dead", "slot_share", "read_entropy", "slot_overlap", "eff_map_rank"),
}
"""Quantities that views show of a block, by kind of latent attention, the most telling first."""
