"""Where latents of attention can be seen: at the norm of MLA's compressed vectors, and at the two stages of slots.

MLA is recognised by the names that DeepSeek gave its parts, which every later model kept: `kv_a_layernorm` and
`kv_b_proj` (and `q_a_layernorm`) side by side. A module `latents` beside them hands on the normed latents, and is
preferred. Two-stage attention is a module with `read(latents, k, v, valid, before)` and a core, both with
`softmax_scale` and `chunk`. Nothing is imported: the shape of the code decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from moeviz.records import LatentInfo


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentSite:
    """An attention layer with latents; `module` is the whole attention."""

    name: str
    module: nn.Module
    kind: Literal["mla", "two-stage"]
    width: int
    """Numbers of a latent of keys and values; slots of each key head."""
    num_heads: int
    """Query heads; 0 where the module does not say."""

    def info(self, block: int) -> LatentInfo:
        """What readers are told about it."""
        return LatentInfo(
            layer=block, name=self.name, kind=self.kind, width=self.width, num_heads=self.num_heads
        )


def find_latents(root: nn.Module) -> tuple[LatentSite, ...]:
    """Every attention of `root` that works through latents, in the order of its modules."""
    found = (_mla(name, module) or _two_stage(name, module) for name, module in root.named_modules())
    return tuple(site for site in found if site is not None)


def boundary(attention: nn.Module) -> nn.Module:
    """The module whose output are the normed latents of keys and values, [B, S, R]."""
    latents = getattr(attention, "latents", None)
    return latents if isinstance(latents, nn.Module) else attention.get_submodule("kv_a_layernorm")


def spread(count: int, wanted: int | Literal["all"]) -> tuple[int, ...]:
    """`wanted` of `count` places at even distances."""
    chosen = count if wanted == "all" else min(wanted, count)
    return tuple((2 * at + 1) * count // (2 * chosen) for at in range(chosen))


def _mla(name: str, module: Any) -> LatentSite | None:
    norm, up = getattr(module, "kv_a_layernorm", None), getattr(module, "kv_b_proj", None)
    if not isinstance(norm, nn.Module) or not isinstance(up, nn.Module):
        return None
    width = getattr(up, "in_features", 0) or _rows(getattr(norm, "weight", None))
    return LatentSite(name=name, module=module, kind="mla", width=int(width), num_heads=_heads(module))


def _two_stage(name: str, module: Any) -> LatentSite | None:
    read, core, latents = (getattr(module, part, None) for part in ("read", "core", "latents"))
    stages = (read, core)
    if not all(isinstance(stage, nn.Module) for stage in stages) or not isinstance(latents, nn.Parameter):
        return None
    if not all(hasattr(stage, "softmax_scale") and hasattr(stage, "chunk") for stage in stages):
        return None
    shape: Sequence[int] = getattr(latents, "ds_shape", latents.shape)
    if len(shape) != 3:
        return None
    groups = getattr(core, "num_kv_groups", 0)
    return LatentSite(
        name=name, module=module, kind="two-stage", width=int(shape[1]), num_heads=int(shape[0] * groups)
    )


def _heads(module: Any) -> int:
    heads = getattr(module, "num_heads", None)
    return heads if isinstance(heads, int) else 0


def _rows(weight: Any) -> int:
    shape = getattr(weight, "ds_shape", getattr(weight, "shape", (0,)))
    return int(shape[0])
