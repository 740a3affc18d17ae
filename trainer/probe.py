"""The fixed probe of a run: the same held-out sequences from its first step to its last, after a resume too.

A pure function of the data and the config, so that every rank and every attempt makes the same one.
"""

from __future__ import annotations

from model.config import ModelConfig
from moeviz.errors import MoevizError
from moeviz.inspection.probe_batch import ProbeBatch, probe_of_windows, spread_windows
from trainer.config import TrainConfig
from trainer.text import Text

LONGEST = 64
"""Tokens of a sequence at most: many short sequences say more about domains than a few long ones."""


def held_out_probe(text: Text, config: TrainConfig, model: ModelConfig) -> ProbeBatch | None:
    """Equally many windows of every domain's validation text; None where there is none, or none is wanted."""
    options = config.evaluation
    if not options.probe_every or not has_choice(model):
        return None
    length = min(config.data.seq_len, LONGEST)
    shards = text.batches.shards
    count = options.probe_sequences
    windows = {
        name: spread_windows(shards.tokens("validation", name), length, count) for name in shards.domains
    }
    try:
        return probe_of_windows(windows, count * length * len(windows))
    except MoevizError:
        return None


def has_choice(model: ModelConfig) -> bool:
    """Whether tokens choose among experts: where experts choose tokens, nothing of a token can change."""
    return model.num_moe_layers > 0 and model.router.chooser == "token"
