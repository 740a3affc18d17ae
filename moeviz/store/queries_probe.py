"""Questions about the fixed probe: how far routing has settled, and what experts take from each domain over training.

Only passes over the newest set of tokens are compared: other tokens would differ because of the data.
Shapes: N sequences, T valid tokens of the probe, K experts per token, E experts, C passes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from moeviz.metrics import change
from moeviz.probe_history import ROUNDS, domain_counts
from moeviz.store.reader import Store

_DOMAIN_COLUMNS = ["step", "domain", "expert", "tokens", "share", "null_mean", "null_sd", "hidden"]


class ProbePasses(NamedTuple):
    """Decisions of one layer about the same tokens at several steps."""

    steps: list[int]
    """Optimizer steps that the weights had seen, rising."""
    ids_CTK: np.ndarray
    """uint16, slots by falling selection score."""
    domains: tuple[str | None, ...]
    """Of each sequence."""
    lengths_N: np.ndarray


def probe_steps(store: Store) -> list[int]:
    """Steps at which the newest probe was run, rising; empty without one."""
    rows = store.frame(
        lambda: (
            f"""
        SELECT step, string_agg(hash(seq, coalesce(domain, ''), token_ids)::VARCHAR, ' ' ORDER BY seq) AS tokens
        FROM {store.source("probe_sequences")} GROUP BY step ORDER BY step"""
        )
    )
    if rows.empty:
        return []
    other = np.flatnonzero((rows["tokens"] != rows["tokens"].iloc[-1]).to_numpy())
    return [int(step) for step in rows["step"].iloc[other[-1] + 1 if len(other) else 0 :]]


def probe_passes(store: Store, layer: int, last: int | None = None, points: int = 200) -> ProbePasses | None:
    """Decisions of a layer in all passes, or in about `points` of them spread evenly; None without a probe.

    Args:
        last: newest step that counts; None: all.
    """
    steps = [step for step in probe_steps(store) if last is None or step <= last]
    if len(steps) > points:
        steps = [steps[at] for at in np.linspace(0, len(steps) - 1, points).round().astype(int)]
    if not steps:
        return None
    wanted = ", ".join(map(str, steps))
    rows = store.frame(
        lambda: (
            f"""
        SELECT step, seq, n_tokens, k, experts FROM {store.source("probe_routing")}
        WHERE layer = {int(layer)} AND step IN ({wanted}) ORDER BY step, seq"""
        )
    )
    domains = store.frame(
        lambda: (
            f"""
        SELECT domain FROM {store.source("probe_sequences")} WHERE step = {steps[-1]} ORDER BY seq"""
        )
    )["domain"]
    if rows.empty:
        return None
    parts = {int(step): part for step, part in rows.groupby("step")}
    top_k = int(rows["k"].iloc[0])
    ids = [np.concatenate(list(parts[step]["experts"])).reshape(-1, top_k) for step in steps if step in parts]
    return ProbePasses(
        steps=[step for step in steps if step in parts],
        ids_CTK=np.stack(ids),
        domains=tuple(None if pd.isna(name) else str(name) for name in domains),
        lengths_N=parts[steps[-1]]["n_tokens"].to_numpy(),
    )


def probe_saturation(store: Store, layer: int | None = None, last: int | None = None) -> pd.DataFrame:
    """How much of the newest routing was in place at earlier steps: OLMoE's router saturation.

    Args:
        layer: one MoE layer, or None for all.
        last: newest step that counts, and the one that is compared with; None: all.

    Returns: step, layer, saturation (share of a token's K experts), top1 (share of first choices), chance
    (saturation of random routing, K/E), moving (share of tokens whose first choice was not yet the final one for
    good); ordered by layer and step. Empty without a probe.
    """
    layers = range(store.info.model.num_layers) if layer is None else [layer]
    frames = []
    for at in layers:
        passes = probe_passes(store, at, last)
        if passes is None:
            continue
        ids_CTK = passes.ids_CTK
        steps = np.array(passes.steps)
        fluctuation_T = change.last_fluctuation(ids_CTK[..., 0], steps)
        frames.append(
            pd.DataFrame(
                {
                    "step": steps,
                    "layer": at,
                    "saturation": [float(change.saturation(ids_TK, ids_CTK[-1])) for ids_TK in ids_CTK],
                    "top1": [1 - float(change.flip1(ids_TK, ids_CTK[-1])) for ids_TK in ids_CTK],
                    "chance": ids_CTK.shape[2] / store.info.model.layers[at].num_experts,
                    "moving": change.still_moving(fluctuation_T, steps),
                }
            )
        )
    columns = ["step", "layer", "saturation", "top1", "chance", "moving"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def probe_domains(store: Store, layer: int, last: int | None = None) -> pd.DataFrame:
    """What each expert takes of each domain of the probe, over training: OLMoE's domain specialisation.

    Returns: step, domain, expert, tokens (of the domain), share (of them that use the expert; K/E at random), null_mean
    and null_sd (of the share when labels move between whole sequences), hidden (chance explains it: within three
    standard deviations); ordered by step, domain (as in the probe) and expert. Empty without a probe, or where it names
    no domains.
    """
    passes = probe_passes(store, layer, last)
    names = [] if passes is None else [name for name in dict.fromkeys(passes.domains) if name is not None]
    if passes is None or not names:
        return pd.DataFrame(columns=_DOMAIN_COLUMNS)
    num_experts = store.info.model.layers[layer].num_experts
    frames = []
    for step, ids_TK in zip(passes.steps, passes.ids_CTK, strict=True):
        _, counts_NE, domain_N = domain_counts(ids_TK, passes.lengths_N, passes.domains, num_experts)
        length_N = counts_NE.sum(axis=1) // ids_TK.shape[1]
        share_DE, null_RDE = _shares(counts_NE, length_N, domain_N)
        mean_DE, sd_DE = null_RDE.mean(axis=0), null_RDE.std(axis=0)
        values = {
            "step": step,
            "domain": np.repeat(names, num_experts),
            "expert": np.tile(np.arange(num_experts), len(names)),
            "tokens": np.repeat(np.bincount(domain_N, weights=length_N).astype(np.int64), num_experts),
            "share": share_DE.ravel(),
            "null_mean": mean_DE.ravel(),
            "null_sd": sd_DE.ravel(),
            "hidden": (abs(share_DE - mean_DE) < 3 * sd_DE).ravel(),
        }
        frames.append(pd.DataFrame(values, columns=_DOMAIN_COLUMNS))
    return pd.concat(frames, ignore_index=True)


def _shares(
    counts_NE: np.ndarray, length_N: np.ndarray, domain_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Share of each domain's tokens by expert, [D, E], and the same with shuffled labels, [R, D, E]."""
    rng = np.random.default_rng(0)
    labels_RN = np.stack([domain_N, *(rng.permutation(domain_N) for _ in range(ROUNDS))])
    member_RDN = np.eye(int(domain_N.max()) + 1)[labels_RN].swapaxes(1, 2)
    share_RDE = (member_RDN @ counts_NE) / (member_RDN @ length_N)[:, :, None]
    return share_RDE[0], share_RDE[1:]
