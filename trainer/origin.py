"""The trained model that a new run begins with: a checkpoint of ours, or a folder of transformers.

Its weights, architecture and tokenizer are taken; optimizer, data position and counters are not, which is what sets
fine-tuning apart from resuming.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from model.config import ModelConfig
from model.hf import CONFIG, from_hf
from model.hf_families import family_of
from model.lm import MoELanguageModel
from moeviz.errors import MoevizError
from trainer.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE, with_tied
from trainer.config import TrainConfig
from trainer.resume import find_checkpoint

LOWER = 0.1
"""Learning rate of fine-tuning, over that of training from scratch, unless one is given."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where weights come from."""

    path: Path
    model_config: ModelConfig
    train_config: TrainConfig | None
    """How it was trained; None for a folder of transformers."""

    @property
    def tokenizer_file(self) -> Path | None:
        path = self.path / TOKENIZER_FILE
        return path if path.exists() else None


def find_origin(init_from: str) -> Origin:
    """The model that `--init-from` means: a run (its newest checkpoint), a checkpoint, or a folder with config.json.

    Raises:
        MoevizError: nothing there, a damaged checkpoint, or a family that is not implemented.
    """
    path = Path(init_from)
    if (path / CONFIG).is_file():
        try:
            data = json.loads((path / CONFIG).read_text())
            config = family_of(data.get("model_type", "of no name")).read(data)
        except ValueError as error:
            raise MoevizError(f"{path} cannot be opened: {error}") from error
        return Origin(path=path, model_config=config, train_config=None)
    found = find_checkpoint(init_from, None)
    return Origin(path=found.path, model_config=found.model_config, train_config=found.config)


def fine_tuning(origin: Origin, preset: TrainConfig | None) -> TrainConfig:
    """What flags change: the config that the model was trained with, or a preset's, at a lower rate.

    Args:
        preset: values for everything but the model; None: those of the model's own training.
    """
    base = preset or origin.train_config or TrainConfig()
    tokenizer = str(origin.tokenizer_file) if origin.tokenizer_file else base.data.tokenizer
    return replace(
        base,
        preset=base.preset if preset else "fine-tune",
        run=None,
        resume=None,
        init_from=str(origin.path),
        model=origin.model_config,
        data=replace(base.data, tokenizer=tokenizer),
        optim=replace(base.optim, learning_rate=LOWER * base.optim.learning_rate),
        freeze=(),
        train_only=(),
    )


def model_from(origin: Origin, config: ModelConfig, vocab_size: int) -> MoELanguageModel:
    """The model with its weights, in fp32.

    Args:
        config: what the run asks for; it may differ from the origin's where no weight depends on it.
        vocab_size: token ids of the run's text.

    Raises:
        MoevizError: weights do not fit the config, or a text with more token ids than the model knows.
    """
    known = origin.model_config.vocab_size
    if vocab_size > known:
        raise MoevizError(
            f"the text has {vocab_size} token ids and {origin.path} knows {known}; leave --tokenizer out, so that "
            "its own is used"
        )
    model = MoELanguageModel(replace(config, vocab_size=known))
    weights = _weights(origin)
    expected = model.state_dict()
    _check(expected, weights, origin.path)
    present = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    model.load_state_dict({**expected, **{name: present[name] for name in expected if name in present}})
    return model


def _weights(origin: Origin) -> dict[str, torch.Tensor]:
    if origin.train_config is None:
        return dict(from_hf(origin.path, dtype=torch.float32).state_dict())
    weights = load_file(origin.path / WEIGHTS_FILE)
    return with_tied(weights, origin.model_config)


_NEW = ("e_score_correction_bias", "draws._extra_state", "noise_weight", "contrastive.", "mtp.")
"""What a fine-tuning may add to a model: it begins as in a new one, or, for counters, at zero."""


def _check(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], path: Path) -> None:
    for name, value in expected.items():
        if name not in found:
            if any(part in name for part in _NEW):
                continue
            raise MoevizError(f"{path} has no {name}; leave out the flags that change the architecture")
        if found[name].shape != value.shape:
            raise MoevizError(
                f"{name} is {list(value.shape)} in this config and {list(found[name].shape)} in {path}; leave out "
                "the flags that change the architecture"
            )
