"""Models that say what they do: `Router.forward` is annotated to return a NamedTuple.

This is moeviz's own model, recognised by the shape of its code and not by import, and any project that
writes its router the same way:

    class Routing(NamedTuple):
        logits_TE: Tensor
        weights_TK: Tensor
        expert_ids_TK: Tensor      # or indices, ids
        kept_TK: Tensor | None     # only where capacity drops

    class Router(nn.Module):
        num_experts: int; top_k: int
        def forward(self, x) -> Routing: ...

An attention core is a module called as core(q, k, v, mask, sinks_H=...) with attributes `softmax_scale` and
`num_kv_groups`, and optionally `causal`, `window`, `softcap` and `sinks`. A mask [B, C] marks padding keys; one
of [B or 1, H or 1, S, C] says everything. A core with rules of its own has a method
`visible_keys(num_queries, num_keys, mask, device)` that makes the latter of whatever it is called with.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moeviz.capture.reading import AttentionCall, CoreSite, Handle, Observe, Reading, RouterSite, always
from moeviz.records import ScoreFunction

_FIELDS = (("logits",), ("weights",), ("expert_ids", "indices", "ids"))
_SCORES: tuple[ScoreFunction, ...] = ("softmax", "sigmoid", "softmax_topk")


def find_router(name: str, module: nn.Module, parent: nn.Module | None) -> RouterSite | None:
    num_experts, top_k = getattr(module, "num_experts", None), getattr(module, "top_k", None)
    if not isinstance(num_experts, int) or not isinstance(top_k, int):
        return None
    kind = _returned(module)
    if kind is None:
        return None
    fields = kind._fields
    if len(fields) < 3 or not all(
        field.startswith(stems) for field, stems in zip(fields, _FIELDS, strict=False)
    ):
        return None
    config = getattr(module, "config", None)
    score = getattr(config, "score", None)
    experts_choose = getattr(config, "chooser", "token") == "expert"
    kept = next((place for place, field in enumerate(fields) if field.startswith("kept")), None)
    return RouterSite(
        name=name,
        module=module,
        num_experts=num_experts,
        top_k=getattr(module, "num_chosen", top_k) if experts_choose else top_k,
        score=score if score in _SCORES else "unknown",
        read=functools.partial(_read, kept, experts_choose),
        bias=functools.partial(_buffer, module, "e_score_correction_bias"),
        experts_choose=experts_choose,
        grouped=getattr(config, "num_groups", 1) > 1,
    )


def _returned(module: nn.Module) -> Any:
    """The NamedTuple class that `forward` is annotated to return, or None."""
    try:
        kind = typing.get_type_hints(type(module).forward).get("return")
    except Exception:  # annotations of a stranger's code may name what cannot be imported here
        return None
    return kind if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields") else None


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    """An attribute that is most likely a buffer; asked for twice a step, in a quarter of the time of `getattr`."""
    found = module._buffers.get(name)
    return getattr(module, name, None) if found is None else found


def _read(
    kept: int | None,
    experts_choose: bool,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Reading:
    reading = Reading(output[0].detach(), output[1].detach(), output[2].detach())
    if kept is None or output[kept] is None:
        return reading
    left_TK = ~output[kept].detach()
    return reading._replace(unused_TK=left_TK) if experts_choose else reading._replace(dropped_TK=left_TK)


def find_core(name: str, module: nn.Module, parent: nn.Module | None) -> CoreSite | None:
    if not isinstance(getattr(module, "softmax_scale", None), float) or not hasattr(module, "num_kv_groups"):
        return None
    return CoreSite(
        name=name,
        module=module,
        num_heads=_num_heads(module, parent),
        attach=functools.partial(_attach, module),
    )


def _num_heads(module: nn.Module, parent: nn.Module | None) -> int:
    """Query heads; 0 when only a call can tell."""
    for owner in (module, parent):
        heads = getattr(owner, "num_heads", None)
        if isinstance(heads, int):
            return heads
    projection, width = getattr(parent, "q_proj", None), getattr(parent, "head_width", None)
    if isinstance(projection, nn.Linear) and isinstance(width, int):
        return projection.out_features // width
    return 0


def _attach(module: nn.Module, observe: Observe, wanted: Callable[[], bool] = always) -> Handle:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if wanted():
            observe(_call(module, args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _call(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    q_BHSD, k_BGCD = args[:2]
    mask = args[3] if len(args) > 3 else kwargs.get("mask")
    sinks_H = kwargs.get("sinks_H")
    call = AttentionCall(q_BHSD, k_BGCD, core.softmax_scale, mask, sinks_H=sinks_H)
    if not hasattr(core, "visible_keys"):
        causal = getattr(core, "causal", True) and (mask is None or mask.dim() == 2)
        return call._replace(causal=causal, window=getattr(core, "window", None))
    visible = core.visible_keys(q_BHSD.shape[2], k_BGCD.shape[2], mask, q_BHSD.device)
    return call._replace(mask=visible, causal=False)
