"""A checkpoint for others: as transformers opens it, or the bare weights in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from model.hf import CONFIG, to_hf
from moeviz.errors import MoevizError
from trainer.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE, LoadedCheckpoint, without_tied
from trainer.tokenizer_export import save_for_transformers

_GENERATION = "generation_config.json"


def export_hf(loaded: LoadedCheckpoint, folder: Path, family: str | None = None) -> Path:
    """A folder for `AutoModelForCausalLM` and, where the run has a tokenizer, `AutoTokenizer`.

    Raises:
        ValueError: no family computes this model, or the folder holds one already.
    """
    to_hf(loaded.model, folder, family=family)
    end = loaded.tokenizer.eos_id if loaded.tokenizer else None
    # A family's own ids for beginning and end stand for other tokens in this vocabulary.
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **ids}, indent=2) + "\n")
    if loaded.tokenizer is not None:
        save_for_transformers(loaded.tokenizer, folder)
        (folder / _GENERATION).write_text(json.dumps(ids, indent=2) + "\n")
    return folder


def export_safetensors(loaded: LoadedCheckpoint, folder: Path) -> Path:
    """model.safetensors under our names, with model.json (its config) and the run's tokenizer.

    Raises:
        MoevizError: the folder holds weights already.
    """
    if (folder / WEIGHTS_FILE).exists():
        raise MoevizError(f"{folder} already holds a {WEIGHTS_FILE}; name an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    model = loaded.model
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    save_file(without_tied(weights, model.config), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / "model.json").write_text(json.dumps(model.config.to_dict(), indent=1) + "\n")
    if loaded.tokenizer is not None:
        loaded.tokenizer.save(folder / TOKENIZER_FILE)
    return folder
