"""Queries and keys of transformers models, whose attention is a function looked up at every call.

Every attention layer asks `AttentionInterface.get_interface(name, default)` for the function and calls it
with (module, q, k, v, mask, scaling=..., ...). While a probe is attached that lookup returns the same
function with an observer in front; a hook on the layer says which observer. Without a probe nothing is
replaced.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moeviz.capture.reading import AttentionCall, CoreSite, Handle, Observe, always


def find_core(name: str, module: nn.Module, parent: nn.Module | None) -> CoreSite | None:
    kind = type(module)
    if not kind.__module__.startswith("transformers.models.") or not kind.__name__.endswith("Attention"):
        return None
    looks_up = hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS")
    if not looks_up or not isinstance(getattr(module, "layer_idx", None), int):
        return None
    heads: Any = getattr(module, "num_heads", None) or getattr(
        getattr(module, "config", None), "num_attention_heads", 0
    )
    return CoreSite(name=name, module=module, num_heads=heads, attach=functools.partial(_attach, module))


class _Current:
    """The observer of the attention layer that runs now; None outside of watched layers."""

    observe: Observe | None = None


_current = _Current()


def _attach(module: nn.Module, observe: Observe, wanted: Callable[[], bool] = always) -> Handle:
    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        _current.observe = observe if wanted() else None

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _current.observe = None

    hooks: list[Handle] = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    _Lookup.acquire()
    return _Attachment(hooks)


class _Attachment:
    def __init__(self, hooks: list[Handle]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            self._hooks = []
            _Lookup.release()


class _Lookup:
    """Replaces `AttentionInterface.get_interface` while at least one layer is watched."""

    users = 0
    original: Callable[..., Any] | None = None

    @classmethod
    def acquire(cls) -> None:
        interface = sys.modules["transformers.modeling_utils"].AttentionInterface
        if cls.users == 0:
            original = cls.original = interface.get_interface

            def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
                function = original(self, name, default)
                return function if _current.observe is None else functools.partial(_observed, function)

            interface.get_interface = get_interface
        cls.users += 1

    @classmethod
    def release(cls) -> None:
        cls.users -= 1
        if cls.users == 0:
            sys.modules["transformers.modeling_utils"].AttentionInterface.get_interface = cls.original
            cls.original = None


def _observed(
    function: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    observe = _current.observe
    if observe is not None:
        observe(_call(module, query, key, attention_mask, kwargs))
    return function(module, query, key, value, attention_mask, **kwargs)


def _call(module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> AttentionCall:
    scale = kwargs.get("scaling")
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask = mask if isinstance(mask, Tensor) else None
    return AttentionCall(
        q_BHSD=query,
        k_BGCD=key,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask,
        # A mask [B, 1, S, C] already says everything; one over the keys only, or none, leaves causality to
        # the kernel.
        causal=is_causal and (mask is None or mask.dim() == 2),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks_H=kwargs.get("s_aux"),
    )
