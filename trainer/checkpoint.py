"""Checkpoints that are whole or absent: written beside their place, made durable, then renamed into it.

    RUN/checkpoints/step-00000400/
      checkpoint.json     step, training config, model config
      model.safetensors   weights and persistent buffers (the selection bias among them)
      tokenizer.json      the run's tokenizer
      optimizer.pt | deepspeed/   the engine's state
      rng-RANK.pt         random number generators
      standing.json       what guards and interventions remember
      alerts.state        the alert rules, where the run acts on them
      manifest.json       size and sha256 of every file above

A folder describes itself: `load_checkpoint` needs nothing else. Batches are a pure function of the step, so
the data position is the step. No file is read by executing pickled code.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.lm import MoELanguageModel
from moeviz.errors import MoevizError
from trainer.checkpoint_folder import commit, discard, prepare, verify
from trainer.config import TrainConfig
from trainer.engine import Engine
from trainer.process_group import rank_seed
from trainer.standing import Standing
from trainer.text import Text
from trainer.tokenizer import Tokenizer, load_tokenizer

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "checkpoint.json", "model.safetensors", "tokenizer.json"
_FORMAT = "moeviz-checkpoint/1"


class SaveError(MoevizError):
    """A checkpoint could not be written; earlier ones are whole."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint folder says about itself."""

    path: Path
    step: int
    """Optimizer steps done; the next one has this index."""
    config: TrainConfig
    model_config: ModelConfig
    text_key: str = ""
    """`trainer.text.Text.key` of the data it was trained on."""
    num_ranks: int = 1
    """Processes that wrote it."""

    @property
    def num_replicas(self) -> int:
        """Parts in which they read each step; fewer than processes where several held a model together."""
        return self.num_ranks // self.config.engine.pipeline_stages

    @property
    def tokenizer_file(self) -> Path | None:
        """The run's tokenizer; None for a run on token files without one."""
        path = self.path / TOKENIZER_FILE
        return path if path.exists() else None


class LoadedCheckpoint(NamedTuple):
    """What is needed to use a trained model."""

    model: MoELanguageModel
    tokenizer: Tokenizer | None
    """None for a run on token files without one."""
    config: TrainConfig
    step: int


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    config: TrainConfig,
    engine: Engine,
    text: Text,
    standing: Standing,
    more: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `folder`/step-N, every rank its part; `more` are further files. Returns the finished folder.

    Raises:
        SaveError: the disk is full or the folder cannot be written; nothing that was there has changed.
    """
    work, done = folder / f".step-{step:08d}.tmp", folder / f"step-{step:08d}"
    first = engine.rank == 0
    weights = engine.weights()
    try:
        _on_every_rank(engine, lambda: prepare(work) if first else None)
        _on_every_rank(
            engine, lambda: _write(work, step, config, engine, text, weights, standing, more or {})
        )
        _on_every_rank(engine, lambda: commit(work, done) if first else None)
    except SaveError as error:
        if first:
            discard(work)
        raise SaveError(
            f"no checkpoint of step {step}: writing to {folder} failed ({error}); free space there. "
            "Earlier checkpoints are whole"
        ) from error
    return done


def _on_every_rank(engine: Engine, part: Callable[[], object]) -> None:
    """Do this rank's part of saving; a disk that refuses one rank is an error on all of them."""
    problem: Exception | None = None
    try:
        part()
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_disk_trouble(error):
            raise
        problem = error
    if engine.sum_ranks(torch.tensor(float(problem is not None), device=engine.device)):
        raise SaveError(_told(problem) if problem else "on another rank") from problem


def read_checkpoint(path: Path) -> Checkpoint:
    """Check that a checkpoint folder is whole, and read its description.

    Raises:
        MoevizError: no checkpoint there, or a damaged one; the message names the file.
    """
    verify(path)
    return _read_description(path)


def load_checkpoint(path: str | Path) -> LoadedCheckpoint:
    """A checkpoint folder -> its model on the CPU in evaluation mode, tokenizer, training config, steps done.

    Raises:
        MoevizError: no checkpoint there, or a damaged one; the message names the file.
    """
    found = read_checkpoint(Path(path))
    model = MoELanguageModel(found.model_config)
    weights = load_file(found.path / WEIGHTS_FILE)
    model.load_state_dict(with_tied(weights, found.model_config))
    tokenizer = load_tokenizer(found.tokenizer_file) if found.tokenizer_file else None
    return LoadedCheckpoint(model.eval(), tokenizer, found.config, found.step)


def restore(found: Checkpoint, engine: Engine) -> None:
    """Put an engine back to the state in which the checkpoint was written, its random generators too."""
    weights = load_file(found.path / WEIGHTS_FILE)
    engine.load_state(with_tied(weights, engine.module.config), found.path)
    generators = found.path / f"rng-{engine.rank}.pt"
    if not generators.exists():  # a rank that was not there before
        torch.manual_seed(rank_seed(found.config.seed, engine.rank, found.step))
        return
    states = torch.load(generators, weights_only=True)
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], engine.device)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def _write(
    work: Path,
    step: int,
    config: TrainConfig,
    engine: Engine,
    text: Text,
    weights: Mapping[str, Tensor],
    standing: Standing,
    more: Mapping[str, bytes],
) -> None:
    """This rank's files; what all ranks share is the first one's."""
    engine.save_state(work)
    torch.save(_random_states(engine), work / f"rng-{engine.rank}.pt")
    if engine.rank > 0:
        return
    standing.save(work)
    for name, content in more.items():
        (work / name).write_bytes(content)
    model_config = engine.module.config
    save_file(without_tied(weights, model_config), work / WEIGHTS_FILE)
    if text.tokenizer is not None:
        text.tokenizer.save(work / TOKENIZER_FILE)
    about = {
        "format": _FORMAT,
        "step": step,
        "text_key": text.key,
        "num_ranks": engine.world_size,
        "train": config.to_dict(),
        "model": model_config.to_dict(),
    }
    (work / CONFIG_FILE).write_text(json.dumps(about, indent=1))


def _read_description(path: Path) -> Checkpoint:
    about = json.loads((path / CONFIG_FILE).read_text())
    if about["format"] != _FORMAT:
        raise MoevizError(
            f"{path} is of format {about['format']}, not {_FORMAT}; use the version that wrote it"
        )
    return Checkpoint(
        path=path,
        step=about["step"],
        config=TrainConfig.from_dict(about["train"]),
        model_config=ModelConfig.from_dict(about["model"]),
        text_key=about["text_key"],
        num_ranks=about["num_ranks"],
    )


_TIED, _SOURCE = "lm_head.weight", "model.embed_tokens.weight"


def without_tied(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A tied output matrix is one tensor under two names; safetensors stores it once."""
    return {
        name: value.contiguous()
        for name, value in weights.items()
        if not (config.tie_embeddings and name == _TIED)
    }


def with_tied(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint's weights with the output matrix under its own name, also where it is the embedding."""
    return weights | {_TIED: weights[_SOURCE]} if config.tie_embeddings else weights


def _random_states(engine: Engine) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(engine.device) if engine.device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


_CUT_SHORT = ("PytorchStreamWriter failed", "unexpected pos")
"""What torch says of a disk that takes a part of a file, without the system's error."""


def _is_disk_trouble(error: Exception) -> bool:
    """torch and safetensors wrap the system's error in their own, with its text inside."""
    texts = ("No space left", "Disk quota", "File too large", "Read-only file system", "Permission denied")
    return isinstance(error, OSError) or any(text in str(error) for text in (*texts, *_CUT_SHORT))


def _told(error: Exception) -> str:
    return "the file was cut short" if any(text in str(error) for text in _CUT_SHORT) else str(error)
