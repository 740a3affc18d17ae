"""`moeviz export`: hand a trained model on to other tools."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff, Positional

from moeviz.errors import MoevizError, require


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Save a checkpoint as a folder that transformers' `AutoModelForCausalLM.from_pretrained` opens.

    The family is the first one that computes exactly what the model computes: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE,
    GLM4-MoE, DeepSeek-V2, DeepSeek-V3 or GPT-OSS. A model that no family computes is refused, and the message names
    what is in the way.
    """

    checkpoint: Positional[Path]
    """A run of `moeviz train` (its newest checkpoint is taken), or one checkpoint folder."""
    folder: Positional[Path]
    """Folder to make."""
    format: Literal["hf"] = "hf"
    """hf: Hugging Face, config.json and safetensors."""
    family: str | None = None
    """Name the family yourself, by transformers' model_type: mixtral, olmoe, qwen3_moe ..."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the saved weights."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0."""
    import tyro

    arguments = tyro.cli(ExportArguments, args=argv, prog="moeviz export", config=(FlagCreatePairsOff,))
    require("torch", "train", "exporting a checkpoint")

    import torch

    from model.hf import to_hf
    from trainer.checkpoint import load_checkpoint
    from trainer.resume import find_checkpoint

    found = find_checkpoint(str(arguments.checkpoint), None, note=lambda text: print(text, file=sys.stderr))
    model = load_checkpoint(found.path).model.to(
        torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    )
    try:
        to_hf(model, arguments.folder, family=arguments.family)
    except ValueError as error:
        raise MoevizError(f"{found.path} was not exported: {error}") from error
    print(f"{arguments.folder}: step {found.step} of {arguments.checkpoint}, {arguments.dtype}")
    return 0
