"""What the latents of every attention block add up to on a probe; nothing for a model without latents.

Measured by the same hooks as in training, over all tokens of the probe in place of a sample.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from moeviz.capture.probe import attach
from moeviz.inspection.readings import losses
from moeviz.policy import SamplingPolicy
from moeviz.records import AnalysisValue, LatentRecord, Record


class _Latents:
    """A sink that keeps latents."""

    def __init__(self) -> None:
        self.records: list[LatentRecord] = []

    def write(self, record: Record) -> None:
        if isinstance(record, LatentRecord):
            self.records.append(record)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def latent_policy(num_tokens: int) -> SamplingPolicy:
    """Latents of every layer over so many tokens, and nothing else."""
    return SamplingPolicy(
        route_every=0,
        attention_every=0,
        latent_every=1,
        latent_layers="all",
        latent_tokens=max(num_tokens, 2),
    )


def latents(model: nn.Module, token_ids_NS: np.ndarray) -> list[AnalysisValue]:
    """The quantities of the group "latent attention" of `moeviz metrics`, for every block that has them.

    `layer` of a value is the block of its attention, as for heads. The model is in evaluation mode.
    """
    kept = _Latents()
    with attach(model, kept, policy=latent_policy(token_ids_NS.size), when="always") as probe:
        if not probe.info.latents:
            return []
        losses(model, token_ids_NS)
        probe.step(0)
    return [
        AnalysisValue(part="head", layer=record.layer, index=-1, name=name, value=value)
        for record in sorted(kept.records, key=lambda each: each.layer)
        for name, value in record.values.items()
    ]
