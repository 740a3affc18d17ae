"""Rotary positions in a Hugging Face config.json.

Version 5 of transformers writes one `rope_parameters`; before it there were `rope_theta` beside an optional
`rope_scaling`, and `partial_rotary_factor` beside both. All are read, and the newest form is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.attention_config import RopeConfig
from model.config import ModelConfig

_SCALINGS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3"}
_YARN = {
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "truncate": "yarn_truncate",
    "attention_factor": "yarn_attention_factor",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}
_LLAMA3 = {"low_freq_factor": "llama3_low_freq", "high_freq_factor": "llama3_high_freq"}


def read_rope(data: Mapping[str, Any], *, rotary_share: float = 1.0) -> tuple[float, RopeConfig]:
    """(base, the rest) of a config.json.

    Args:
        data: the config.
        rotary_share: what this family takes where the config does not say.

    Raises:
        ValueError: a kind of scaling that the model does not have.
    """
    said = data.get("rope_parameters") or {**(data.get("rope_scaling") or {})}
    base = said.get("rope_theta", data.get("rope_theta", 10_000.0))
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in _SCALINGS:
        raise ValueError(f"rope_type={kind} is not implemented; the model knows {', '.join(_SCALINGS)}")
    share = said.get("partial_rotary_factor", data.get("partial_rotary_factor", rotary_share))
    values: dict[str, Any] = {"rope_scaling": _SCALINGS[kind], "rotary_share": share}
    if kind != "default":
        trained = said.get("original_max_position_embeddings") or data["max_position_embeddings"]
        values["rope_factor"] = said.get("factor") or data["max_position_embeddings"] / trained
        values["rope_trained_len"] = None if kind == "linear" else trained
    for theirs, ours in {"yarn": _YARN, "llama3": _LLAMA3}.get(kind, {}).items():
        if said.get(theirs) is not None:
            values[ours] = said[theirs]
    return float(base), RopeConfig(**values)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config`'s positions. NTK with a fixed base is written as that base."""
    rope, kind = config.rope, config.rope.rope_scaling
    kind = "none" if kind == "ntk" else kind
    names = {ours: theirs for theirs, ours in _SCALINGS.items()}
    said: dict[str, Any] = {"rope_type": names[kind], "rope_theta": fixed_base(config)}
    if kind != "none":
        said["factor"] = rope.rope_factor
    if kind not in ("none", "linear"):
        said["original_max_position_embeddings"] = rope.rope_trained_len
    for theirs, ours in {"yarn": _YARN, "llama3": _LLAMA3}.get(kind, {}).items():
        if getattr(rope, ours) is not None:
            said[theirs] = getattr(rope, ours)
    if rope.rotary_share != 1:
        said["partial_rotary_factor"] = rope.rotary_share
    return {"rope_parameters": said}


def fixed_base(config: ModelConfig) -> float:
    """The base of the frequencies, NTK's factor included."""
    width = config.rotary_width
    if config.rope.rope_scaling != "ntk" or width == 2:
        return config.rope_base
    return config.rope_base * config.rope.rope_factor ** (width / (width - 2))
