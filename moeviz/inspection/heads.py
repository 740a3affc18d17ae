"""What every attention head does: on the text of the probe, and on random tokens repeated twice.

Induction and duplicate-token heads are measured on random tokens, because frequent pairs of natural text look like
them. Maps are recomputed from the queries and keys that reach the model's own attention.

Shapes: H heads, S positions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from moeviz.capture.attention import pattern, select
from moeviz.capture.reading import AttentionCall, CoreSite
from moeviz.inspection.trace import logits_of
from moeviz.metrics import attention
from moeviz.records import AnalysisValue

SEQUENCES, LENGTH = 4, 64
"""Sequences and positions at most that heads are measured on."""
SINK = 0.3
"""`sink_mass` that makes a head a sink; Gu et al. 2025."""


def heads(
    model: nn.Module,
    cores: tuple[CoreSite, ...],
    blocks: tuple[int, ...],
    token_ids_NS: np.ndarray,
    vocab_size: int,
    tick: Callable[[], None],
) -> list[AnalysisValue]:
    """Metrics of every head, `head_redundancy` of every block and the model's `sink_rate`.

    Args:
        blocks: transformer block of each core.
        token_ids_NS: the probe; its first sequences are used.
        vocab_size: random tokens are below this.
    """
    picked = np.linspace(0, len(token_ids_NS) - 1, min(SEQUENCES, len(token_ids_NS))).round().astype(int)
    text_NS = token_ids_NS[picked, :LENGTH]
    rng = np.random.default_rng(0)
    half_NS = rng.integers(0, vocab_size, (len(text_NS), max(2, text_NS.shape[1] // 2)))
    twice_NS = np.concatenate([half_NS, half_NS], axis=1)[:, : text_NS.shape[1]]
    maps, maps_twice = (_maps(model, cores, ids_NS) for ids_NS in (text_NS, twice_NS))
    tick()
    found: list[AnalysisValue] = []
    for block, maps_NHSS, twice_NHSS in zip(blocks, maps, maps_twice, strict=True):
        found += _head_values(block, maps_NHSS, twice_NHSS, twice_NS)
        if maps_NHSS.shape[1] > 1:
            alike = float(np.mean([attention.head_redundancy(maps_HSS) for maps_HSS in maps_NHSS]))
            found.append(
                AnalysisValue(part="head", layer=block, index=-1, name="head_redundancy", value=alike)
            )
    sinks = [each.value > SINK for each in found if each.name == "sink_mass"]
    if sinks:
        rate = float(np.mean(sinks))
        found.append(AnalysisValue(part="run", layer=-1, index=-1, name="sink_rate", value=rate))
    return found


def _head_values(
    block: int, maps_NHSS: np.ndarray, twice_NHSS: np.ndarray, twice_NS: np.ndarray
) -> list[AnalysisValue]:
    induction_N1SS = np.stack([attention.induction_pattern(ids_S) for ids_S in twice_NS])[:, None]
    duplicate_N1SS = np.stack([attention.duplicate_pattern(ids_S) for ids_S in twice_NS])[:, None]
    per_head = {
        "attn_entropy": attention.attn_entropy(maps_NHSS),
        "sink_mass": attention.sink_mass(maps_NHSS),
        "prev_token": attention.prev_token(maps_NHSS),
        "attn_distance": attention.attn_distance(maps_NHSS),
        "induction": attention.pattern_share(twice_NHSS, induction_N1SS),
        "duplicate": attention.pattern_share(twice_NHSS, duplicate_N1SS),
    }
    return [
        AnalysisValue(part="head", layer=block, index=head, name=name, value=float(value))
        for name, values_NH in per_head.items()
        for head, value in enumerate(values_NH.mean(axis=0))
    ]


def _maps(model: nn.Module, cores: tuple[CoreSite, ...], token_ids_NS: np.ndarray) -> list[np.ndarray]:
    """Attention of every core on these sequences, float64 [N, H, S, S] each."""
    calls: dict[int, AttentionCall] = {}
    handles = []
    for at, core in enumerate(cores):

        def observe(call: AttentionCall, at: int = at) -> None:
            calls[at] = call

        handles.append(core.attach(observe))
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            logits_of(model(torch.from_numpy(token_ids_NS).to(device)))
    finally:
        for handle in handles:
            handle.remove()
    rows_N = torch.arange(len(token_ids_NS))
    found = []
    for at in range(len(cores)):
        call = calls[at]
        chosen = select(call, rows_N, range(call.q_BHSD.shape[1]))
        maps = pattern(chosen).double()
        found.append(maps.cpu().numpy())
    return found
