"""Hugging Face checkpoints: `from_hf` opens a folder as our model, `to_hf` saves ours as such a folder.

A folder holds config.json and weights in safetensors, in one file or in shards with an index. Tensors are
read one at a time straight into their place, so loading needs the memory of the model and one tensor more.
Nothing is skipped in silence: a weight that is missing, left over or of another shape is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

from model.config import ModelConfig
from model.hf_families import family_for, family_of
from model.hf_weights import Piece, pieces
from model.lm import MoELanguageModel

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_NO_WEIGHT = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$")
"""Constants that old versions of transformers saved with the weights."""
_TRAINING_ONLY = ("contrastive.", "mtp.")
"""Our heads for auxiliary losses: they change no logit, and transformers has no place for them."""


def from_hf(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MoELanguageModel:
    """Open a checkpoint folder of transformers as our model, in evaluation mode.

    Args:
        folder: with config.json and safetensors.
        dtype: of the weights. None: as they are stored. Routers compute in float32 either way.
        device: where to put them.

    Raises:
        ValueError: no such folder, a family or an option that is not implemented, or weights that do not fit.
    """
    folder = Path(folder)
    data = _read_json(folder / CONFIG)
    family = family_of(data.get("model_type", "of no name"))
    with ExitStack() as stack:
        files = _open(folder, stack, str(device))
        config = family.read(data)
        model = _empty(config, dtype or _dtype_of(files), device)
        state = _state(model)
        stacked = any(name.endswith("mlp.experts.gate_up_proj") for name in files)
        bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in files)
        table = pieces(
            family, {name: value.shape for name, value in state.items()}, stacked=stacked, bare=bare
        )
        _check_names(table, files, config, folder)
        _fill(table, files, state)
    return model.eval()


def to_hf(
    model: MoELanguageModel,
    folder: str | Path,
    *,
    family: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Save `model` as a folder that transformers' `AutoModelForCausalLM.from_pretrained` opens.

    Heads that only training uses, for further tokens and the contrastive loss, are left out.

    Args:
        model: ours.
        folder: made if needed; it must not hold a checkpoint.
        family: transformers' model_type. None: the first one that computes the same.
        max_shard_bytes: size above which weights go into several files.

    Raises:
        ValueError: no family computes this model, or not the one asked for; the message names what it lacks.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder} already holds a {CONFIG}; name an empty folder")
    chosen = family_for(model.config) if family is None else family_of(family)
    lacking = chosen.differences(model.config)
    if lacking:
        raise ValueError(f"{family} has no {', '.join(lacking)}; leave the family out, or change the model")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value for name, value in _state(model).items() if not name.startswith(_TRAINING_ONLY)}
    table = pieces(chosen, {name: value.shape for name, value in state.items()})
    _save_shards(_shards(table, state, max_shard_bytes), state, folder)
    config = {**chosen.write(model.config), "dtype": str(model.dtype).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder that transformers' save_pretrained wrote")
    return json.loads(path.read_text())


def _open(folder: Path, stack: ExitStack, device: str) -> dict[str, Any]:
    """Name of each tensor -> the open file that holds it."""
    names = [WEIGHTS]
    if (folder / INDEX).exists():
        names = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
    found: dict[str, Any] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name} does not exist; weights must be in safetensors, all shards of them"
            )
        file = stack.enter_context(safe_open(folder / name, framework="pt", device=device))
        found |= dict.fromkeys(file.keys(), file)
    return found


def _dtype_of(files: Mapping[str, Any]) -> torch.dtype:
    """Of the embeddings, as the model's own."""
    embeddings = ("embed_tokens", "wte")
    name = next((name for name in files if any(each in name for each in embeddings)), next(iter(files)))
    return files[name].get_slice(name)[:0].dtype


def _empty(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> MoELanguageModel:
    """The model with memory for its weights and nothing in it."""
    with torch.device("meta"):
        model = MoELanguageModel(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _state(model: MoELanguageModel) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, each tensor once."""
    state = {name: value.detach() for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    return state


def _check_names(table: Iterable[Piece], files: Mapping[str, Any], config: ModelConfig, folder: Path) -> None:
    wanted = {piece.hub: piece.hub_shape for piece in table}
    missing = [name for name in wanted if name not in files]
    if missing:
        raise ValueError(f"{folder} lacks {_some(missing)}; is the download complete?")
    surplus = [name for name in files if name not in wanted and not _ignorable(name, config)]
    if surplus:
        raise ValueError(
            f"{folder} has weights that this model has no place for: {_some(surplus)}; quantised weights "
            "must be dequantised first, with transformers' save_pretrained for example"
        )
    for name, shape in wanted.items():
        actual = Size(files[name].get_slice(name).get_shape())
        if actual != shape:
            raise ValueError(
                f"{name} in {folder} has shape {list(actual)} where {CONFIG} promises {list(shape)}; "
                "are the two of one checkpoint?"
            )


def _ignorable(name: str, config: ModelConfig) -> bool:
    """Constants, a copy of a tied matrix, and the extra blocks that only predict further tokens."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    extra = layer is not None and int(layer[1]) >= config.num_layers
    return bool(_NO_WEIGHT.search(name)) or extra or (config.tie_embeddings and name == "lm_head.weight")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fill(table: Iterable[Piece], files: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    for piece in table:
        tensor = files[piece.hub].get_tensor(piece.hub)
        piece.of_ours(state[piece.ours]).copy_(piece.of_hub(tensor))


def _shards(
    table: Iterable[Piece], state: Mapping[str, Tensor], max_bytes: int
) -> Iterator[dict[str, list[Piece]]]:
    """Hub tensors with the pieces they are made of, in portions of at most `max_bytes`."""
    parts: dict[str, list[Piece]] = {}
    for piece in table:
        parts.setdefault(piece.hub, []).append(piece)
    shard: dict[str, list[Piece]] = {}
    size = 0
    for name, members in parts.items():
        each = members[0].hub_shape.numel() * state[members[0].ours].element_size()
        if shard and size + each > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = members
        size += each
    yield shard


def _save_shards(shards: Iterable[dict[str, list[Piece]]], state: Mapping[str, Tensor], folder: Path) -> None:
    """One file, or several and their index."""
    portions = list(shards)
    placed: dict[str, str] = {}
    for number, shard in enumerate(portions, start=1):
        several = len(portions) > 1
        name = f"model-{number:05d}-of-{len(portions):05d}.safetensors" if several else WEIGHTS
        tensors = {hub: _assemble(members, state) for hub, members in shard.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
    if len(portions) > 1:
        total = sum(value.numel() * value.element_size() for value in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _assemble(members: list[Piece], state: Mapping[str, Tensor]) -> Tensor:
    first = members[0]
    tensor = torch.empty(first.hub_shape, dtype=state[first.ours].dtype)
    for piece in members:
        piece.of_hub(tensor).copy_(piece.of_ours(state[piece.ours]))
    return tensor
