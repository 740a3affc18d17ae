"""Which weights a run trains: all of them, or those that are left when parts are frozen by name.

A part is a word of the table below, or a glob over parameter names, as `model.layers.0.*`; several are separated by
| or given one after the other. A frozen router keeps its selection bias too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import nn

from moeviz.errors import MoevizError

PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "router": ("*.mlp.gate.*",),
        "experts": ("*.mlp.experts.*",),
        "shared_experts": ("*.mlp.shared_expert*",),
        "attention": ("*.self_attn.*",),
        "embeddings": ("*.embed_tokens.weight", "lm_head.weight"),
        "norms": ("*norm.weight",),
    }
)
"""What a word stands for."""


def freeze(model: nn.Module, frozen: Iterable[str], trained: Iterable[str]) -> None:
    """Set `requires_grad` of every parameter.

    Args:
        model: as it is built, before an engine takes it.
        frozen: parts that keep their weights.
        trained: parts that alone are trained; empty: all.

    Raises:
        MoevizError: a part that no parameter belongs to, or nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    kept = _matching(names, frozen)
    chosen = _matching(names, trained) if tuple(trained) else set(names)
    if not chosen - kept:
        raise MoevizError("every weight is frozen; leave out a part of --freeze, or add one to --train-only")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in chosen and name not in kept)


def _matching(names: list[str], parts: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for part in (word.strip() for text in parts for word in text.split("|")):
        globs = PARTS.get(part, (part,))
        hits = {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}
        if not hits:
            raise MoevizError(f"no weight belongs to {part!r}; {_hint(part, names)}")
        found |= hits
    return found


def _hint(part: str, names: list[str]) -> str:
    near = get_close_matches(part, [*PARTS, *names], n=2)
    if not near:
        near = [name for name in names if part.strip("*") and part.strip("*") in name][:2]
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{meant}there is {', '.join(PARTS)}, or a glob like 'model.layers.0.*'"
