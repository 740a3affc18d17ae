"""Find what can be watched: the routers and attention cores of any model, or say plainly why there are none.

Wrappers (DistributedDataParallel, a DeepSpeed engine) are looked through. A compiled model is refused,
because hooks added after compiling never fire; so is a model whose routers no adapter can read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from moeviz.capture.adapters import active_adapters
from moeviz.capture.failures import ProbeError
from moeviz.capture.latent_sites import LatentSite, find_latents
from moeviz.capture.reading import Adapter, CoreSite, RouterSite
from moeviz.records import AttentionInfo, LayerInfo, ModelInfo

_LOOKS_LIKE_ROUTER = re.compile(r"(Router|TopKGate|TopKGating|Top[K0-9]+Gat\w*)$", re.IGNORECASE)
_S = TypeVar("_S", CoreSite, LatentSite)
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Where the hooks go. The order of `routers` is the `layer` of every record."""

    root: nn.Module
    routers: tuple[RouterSite, ...]
    cores: tuple[CoreSite, ...]
    info: ModelInfo
    latents: tuple[LatentSite, ...] = ()
    """Attention layers that work through latents, in the order of `info.latents`."""


def find_sites(model: nn.Module, adapters: Sequence[Adapter] = ()) -> Sites:
    """Find the routers and attention cores of `model`.

    Args:
        model: any module, also wrapped.
        adapters: asked before the built-in ones.

    Raises:
        ProbeError: compiled already; dense; or routers of a kind that no adapter reads.
    """
    root = unwrap(model)
    _refuse_compiled(model)
    asked = [*adapters, *active_adapters()]
    routers, cores = _search(root, asked)
    if not routers:
        raise ProbeError(_no_router(root))
    cores = _same_stack(cores, routers)
    latents = _same_stack(list(find_latents(root)), routers)
    info = replace(
        _describe(root, routers, cores),
        latents=tuple(site.info(block_of(site.name, index)) for index, site in enumerate(latents)),
    )
    return Sites(root=root, routers=tuple(routers), cores=tuple(cores), info=info, latents=tuple(latents))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers whose only child is `module`: DistributedDataParallel, DeepSpeed engines."""
    while True:
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or [*model.children()] != [inner]:
            return model
        model = inner


def block_of(name: str, otherwise: int) -> int:
    """Index of the transformer block in a dotted module name: its first number."""
    match = _NUMBER.search(name)
    return int(match.group(1)) if match else otherwise


def _search(root: nn.Module, adapters: Sequence[Adapter]) -> tuple[list[RouterSite], list[CoreSite]]:
    routers, cores = [], []
    for name, module, parent in _walk(root):
        router = next(filter(None, (a.find_router(name, module, parent) for a in adapters)), None)
        if router is not None:
            routers.append(router)
            continue
        core = next(filter(None, (a.find_core(name, module, parent) for a in adapters)), None)
        if core is not None:
            cores.append(core)
    return routers, cores


def _walk(root: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    modules = dict(root.named_modules())
    for name, module in modules.items():
        yield name, module, modules.get(name.rpartition(".")[0]) if name else None


def _same_stack(cores: list[_S], routers: list[RouterSite]) -> list[_S]:
    """The cores of the stack that holds the routers: a vision tower beside it has blocks of its own."""
    stacks = {_stack(router.name) for router in routers}
    return [core for core in cores if _stack(core.name) in stacks]


def _stack(name: str) -> str:
    match = _NUMBER.search(name)
    return name[: match.start()] if match else ""


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or type(module).__name__ == "OptimizedModule":
            raise ProbeError(
                f"{name or 'the model'} is compiled already, and hooks added after compiling never fire; "
                "call moeviz.watch(model, ...) first, then torch.compile(model) or model.compile()"
            )


def _no_router(root: nn.Module) -> str:
    kinds = sorted({type(m).__name__ for m in root.modules() if _LOOKS_LIKE_ROUTER.search(type(m).__name__)})
    if kinds:
        return (
            f"no adapter reads the routers of this model ({', '.join(kinds)}); "
            "hand one to watch(..., adapters=[...]), see moeviz.capture.reading.Adapter"
        )
    return (
        f"{type(root).__name__} has no Mixture-of-Experts router: it looks dense, and there is nothing to watch; "
        "if its routers go by another name, hand an adapter to watch(..., adapters=[...])"
    )


def _describe(root: nn.Module, routers: Sequence[RouterSite], cores: Sequence[CoreSite]) -> ModelInfo:
    layers = []
    for index, router in enumerate(routers):
        _check(router)
        layers.append(
            LayerInfo(
                layer=index,
                name=router.name,
                block=block_of(router.name, index),
                num_experts=router.num_experts,
                top_k=router.top_k,
                score=router.score,
                has_bias=router.bias() is not None,
            )
        )
    attentions = [
        AttentionInfo(layer=block_of(core.name, index), name=core.name, num_heads=core.num_heads)
        for index, core in enumerate(cores)
    ]
    family = getattr(getattr(root, "config", None), "model_type", None) or type(root).__name__
    return ModelInfo(
        family=str(family),
        layers=tuple(layers),
        attentions=tuple(attentions),
        num_parameters=sum(_whole_size(parameter) for parameter in root.parameters()),
    )


def _whole_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter on all ranks.

    Under ZeRO-3 it is empty outside of forward and remembers its size; DeepSpeed's experts, which are not added over
    all ranks, carry the name of a group of N ranks, each with other experts: `ep_size_N`.
    """
    whole = getattr(parameter, "ds_numel", parameter.numel())
    if getattr(parameter, "allreduce", True):
        return whole
    ranks = str(getattr(parameter, "group_name", "")).removeprefix("ep_size_")
    return whole * int(ranks) if ranks.isdecimal() else whole


def _check(router: RouterSite) -> None:
    if not 1 <= router.top_k <= router.num_experts:
        raise ProbeError(
            f"router {router.name} says top_k={router.top_k} of num_experts={router.num_experts}; "
            "top_k must be between 1 and the number of experts: fix the model or its adapter"
        )
    with_shared = getattr(router.module, "n_total_experts", router.num_experts)
    for parameter in router.module.parameters(recurse=False):
        rows = getattr(parameter, "ds_shape", parameter.shape)
        if len(rows) == 2 and not {router.num_experts, with_shared} & {*rows}:
            raise ProbeError(
                f"router {router.name} says num_experts={router.num_experts} but its weight has shape "
                f"{tuple(rows)}; the adapter hooked the wrong module"
            )
