"""From a config to batches: which text, which tokenizer, and a model whose vocabulary fits it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from model.config import ModelConfig
from moeviz.errors import MoevizError
from trainer.config import TrainConfig
from trainer.data import DataConfig, open_data
from trainer.data_batches import TokenBatches, Weights
from trainer.data_mixture import parse_mixture, weights_of
from trainer.data_prefetch import PrefetchedBatches
from trainer.data_shards import Shards
from trainer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a run reads."""

    batches: TokenBatches
    tokenizer: Tokenizer | None
    """None for token files without a tokenizer."""
    key: str
    """Changes when any token of the training or validation data does."""
    document_end: int | None = None
    """The id that ends a document, where tokens are to read their own document only."""

    @property
    def token_bytes_V(self) -> np.ndarray | None:
        """Length of every token in bytes."""
        return self.tokenizer.token_lengths() if self.tokenizer else None

    def repetition(self, steps: int, sequences_per_step: int) -> str | None:
        """What to say about a run that reads a text more than once; None where none does."""
        passes = self.batches.passes(steps * sequences_per_step)
        often = {name: times for name, times in passes.items() if times > 1}
        if not often:
            return None
        most = sorted(often, key=lambda name: -often[name])[:3]
        told = ", ".join(f"{name} {often[name]:.1f} times" for name in most)
        rest = f" and {len(often) - 3} more" if len(often) > 3 else ""
        return f"{steps} steps read {told}{rest}: each pass in another order"

    def fit(self, model: ModelConfig) -> ModelConfig:
        """The model's config with as many token ids as the text has: a small text gives a small
        vocabulary.
        """
        return replace(model, vocab_size=self.batches.shards.vocab_size)


def open_text(config: TrainConfig, *, tokenizer_file: Path | None = None, quiet: bool = False) -> Text:
    """Open the data of a run, building corpus, tokenizer and shards where the cache has none.

    Args:
        tokenizer_file: the tokenizer of a run that is resumed, in place of the one the config asks for.
        quiet: show no progress bar.

    Raises:
        MoevizError: no such data, or nothing in it.
    """
    data = config.data
    source = DataConfig(
        source=data.train_data,
        validation_source=data.val_data,
        tokenizer=str(tokenizer_file) if tokenizer_file else data.tokenizer,
        vocab_size=config.model.vocab_size,
        validation_fraction=data.validation_fraction,
        bytes_per_domain=data.bytes_per_domain,
    )
    opened = open_data(source, quiet=quiet)
    if data.document_mask and config.model.attention == "latent":
        raise MoevizError(
            "document_mask cannot stop latents from carrying on; use another attention, or no mask"
        )
    if data.document_mask and opened.shards.eos_id is None:
        raise MoevizError(
            "document_mask needs to know which token ends a document; name the tokenizer of the token files"
        )
    batches = PrefetchedBatches(
        opened.shards,
        batch_size=data.batch_size,
        seq_len=data.seq_len,
        seed=config.seed,
        weights=_weights(config, opened.shards),
        micro_batches=data.gradient_accumulation_steps,
    )
    return Text(
        batches=batches,
        tokenizer=opened.tokenizer,
        key=opened.shards.key,
        document_end=opened.shards.eos_id if data.document_mask else None,
    )


def _weights(config: TrainConfig, shards: Shards) -> Weights:
    if not config.data.mixture:
        return config.data.domain_weights
    tokens = {domain: shards.num_tokens("train", domain) for domain in shards.domains}
    return weights_of(parse_mixture(config.data.mixture), {name: n for name, n in tokens.items() if n})
