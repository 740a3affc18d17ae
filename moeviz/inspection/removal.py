"""Take one expert out of a layer for a while, through a forward hook on its router. Weights stay as they are.

`zero` drops what the expert adds and leaves the other gate weights. `reroute` lets the router decide again, by its own
rule (groups, normalisation, selection bias), with the expert's logit at minus infinity: the next expert takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moeviz.capture.reading import RouterSite
from moeviz.errors import MoevizError
from moeviz.metrics.importance import Removal

_WEIGHTS, _IDS = 1, 2
"""Places of gate weights and expert ids in what a router returns."""


@contextmanager
def without_expert(site: RouterSite, expert: int, mode: Removal) -> Iterator[None]:
    """Inside, `expert` of this router's layer does nothing.

    Raises:
        MoevizError: no such expert; on the first forward, a router whose decision cannot be changed from outside, or
            one that has no other expert to choose.
    """
    if not 0 <= expert < site.num_experts:
        raise MoevizError(f"expert={expert} is not one of {site.name}'s experts, 0 to {site.num_experts - 1}")
    if mode == "reroute" and site.top_k >= site.num_experts:
        raise MoevizError(
            f"{site.name} uses all {site.num_experts} experts for every token, so none can take over; use zero"
        )
    change = _zeroed if mode == "zero" else _rerouted

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, tuple) or len(output) <= _IDS:
            raise MoevizError(
                f"{site.name} does not return (logits, weights, ids); its experts cannot be removed"
            )
        return change(site, expert, lambda: module.forward(*args, **kwargs), output)

    handle = site.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _zeroed(site: RouterSite, expert: int, again: Callable[[], Any], output: Any) -> Any:
    weights_TK, ids_TK = output[_WEIGHTS], output[_IDS]
    fields = list(output)
    fields[_WEIGHTS] = weights_TK.masked_fill(ids_TK == expert, 0.0)
    return output._make(fields) if hasattr(output, "_make") else tuple(fields)


def _rerouted(site: RouterSite, expert: int, again: Callable[[], Any], output: Any) -> Any:
    bias_E = site.bias()
    kept = 0.0 if bias_E is None else float(bias_E[expert])
    try:
        if bias_E is not None:
            with torch.no_grad():
                bias_E[expert] = float("-inf")  # else a large bias chooses it although its score is 0
        with _Masked(site.num_experts, expert):
            changed = again()
    finally:
        if bias_E is not None:
            with torch.no_grad():
                bias_E[expert] = kept
    if bool((changed[_IDS] == expert).any()):
        raise MoevizError(f"{site.name} makes its logits in a way that cannot be masked; use --modes zero")
    return changed


_PRODUCTS = {
    F.linear,
    torch._C._nn.linear,
    torch.matmul,
    torch.addmm,
    torch.mm,
    Tensor.matmul,
    Tensor.__matmul__,
}
"""What a router may make its logits with. Other libraries replace F.linear (DeepSpeed's ZeRO-3 does) by a product."""


class _Masked(TorchFunctionMode):
    """The linear map that gives the logits answers minus infinity for one expert."""

    def __init__(self, num_experts: int, expert: int) -> None:
        super().__init__()
        self._num_experts, self._expert = num_experts, expert

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and isinstance(result, Tensor) and result.shape[-1] == self._num_experts:
            off_E = torch.arange(self._num_experts, device=result.device) == self._expert
            return result.masked_fill(off_E, float("-inf"))
        return result
