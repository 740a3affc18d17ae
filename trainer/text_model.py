"""A finished model that reads text: one of our checkpoints, or a Hugging Face folder, opened alike.

Hugging Face folders are read by `model.hf` and the `tokenizers` library: transformers is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.hf import from_hf
from model.lm import ModelOutput, MoELanguageModel
from moeviz.errors import MoevizError
from trainer.checkpoint import Checkpoint, load_checkpoint
from trainer.engine import choose_device
from trainer.resume import find_checkpoint, run_of
from trainer.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class TextModel:
    """A model in evaluation mode and its tokenizer."""

    module: MoELanguageModel
    tokenizer: Tokenizer | None
    """None for a run on token files without one."""
    path: Path
    checkpoint: Checkpoint | None = None
    """None for a Hugging Face folder."""

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def name(self) -> str:
        """RUN-STEP, or the folder's name."""
        if self.checkpoint is None:
            return self.path.resolve().name
        return f"{run_of(self.checkpoint).name}-{self.checkpoint.step}"

    def forward(self, input_ids_BS: Tensor, labels_BS: Tensor) -> ModelOutput:
        return self.module(input_ids_BS, labels_BS)

    def words(self) -> Tokenizer:
        """The tokenizer. Raises MoevizError where there is none."""
        if self.tokenizer is None:
            raise MoevizError(
                f"{self.path} was trained on token ids and has no tokenizer, so it reads no text; "
                "train with text, or with --tokenizer"
            )
        return self.tokenizer


def open_text_model(
    path: Path, *, device: str = "auto", note: Callable[[str], None] = lambda text: None
) -> TextModel:
    """Open a run (its newest checkpoint), a checkpoint folder, or a Hugging Face folder.

    Args:
        path: where it is.
        device: cpu, cuda, or auto.
        note: told when a damaged checkpoint is passed over.

    Raises:
        MoevizError: nothing there, a damaged file, or a family that is not implemented.
    """
    where = choose_device(device)
    if (path / "config.json").exists():
        try:
            module = from_hf(path, device=where)
        except ValueError as error:
            raise MoevizError(f"cannot open {path}: {error}") from error
        return TextModel(module=module, tokenizer=load_tokenizer(path), path=path)
    if not path.exists():
        raise MoevizError(
            f"no checkpoint at {path}: no such folder; give a run, a checkpoint or a model folder"
        )
    found = find_checkpoint(str(path), None, note=note)
    loaded = load_checkpoint(found.path)
    return TextModel(
        module=loaded.model.to(where), tokenizer=loaded.tokenizer, path=found.path, checkpoint=found
    )
