"""Text that a finished model is judged on: what its run held out, or all of some other text."""

from __future__ import annotations

from collections.abc import Mapping

from moeviz.errors import MoevizError
from trainer.data import DataConfig, open_data
from trainer.data_batches import TokenBatches
from trainer.evaluate import DomainLoss, evaluate
from trainer.text import open_text
from trainer.text_model import TextModel

_LONGEST = 1024
"""Tokens of a window for a model that says no better."""


def text_losses(
    opened: TextModel, source: str | None, *, sequences: int, batch_size: int, quiet: bool = False
) -> Mapping[str, DomainLoss]:
    """Loss of each domain of held-out text.

    Args:
        opened: the model.
        source: a file or folder, of which every document counts. None: what the checkpoint's own run held out.
        sequences: windows of each domain at most.
        batch_size: of them at a time.
        quiet: show no progress bar.

    Raises:
        MoevizError: no such text, none that was held out, or a model that reads none.
    """
    batches = _run_batches(opened, quiet) if source is None else _batches(opened, source, batch_size, quiet)
    tokenizer = opened.tokenizer
    if opened.checkpoint is not None and opened.checkpoint.config.data.document_mask:
        opened.module.separate_documents(batches.shards.eos_id)
    losses = evaluate(opened, batches, tokenizer.token_lengths() if tokenizer else None, sequences)
    if not losses:
        raise MoevizError("the run held out no text; name some with --data")
    return losses


def _run_batches(opened: TextModel, quiet: bool) -> TokenBatches:
    checkpoint = opened.checkpoint
    if checkpoint is None:
        raise MoevizError(
            f"{opened.path} is no checkpoint of a run; name the text to judge it by with --data"
        )
    return open_text(checkpoint.config, tokenizer_file=checkpoint.tokenizer_file, quiet=quiet).batches


def _batches(opened: TextModel, source: str, batch_size: int, quiet: bool) -> TokenBatches:
    file = opened.checkpoint.tokenizer_file if opened.checkpoint else opened.path
    config = DataConfig(source=source, tokenizer=str(file) if file else "auto", all_held_out=True)
    data = open_data(config, quiet=quiet)
    seq_len = min(opened.module.config.max_seq_len, _LONGEST)
    return TokenBatches(data.shards, batch_size=batch_size, seq_len=seq_len, split="validation")
