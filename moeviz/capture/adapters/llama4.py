"""Llama 4: the router returns (scores, logits) [T,E]; scores are sigmoid(logit) where selected, else 0."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moeviz.capture.reading import CoreSite, Reading, RouterSite


def _no_bias() -> Tensor | None:
    return None


def find_router(name: str, module: nn.Module, parent: nn.Module | None) -> RouterSite | None:
    if type(module).__name__ != "Llama4Router":
        return None
    router: Any = module
    return RouterSite(
        name=name,
        module=module,
        num_experts=router.num_experts,
        top_k=router.top_k,
        score="sigmoid",
        read=_read,
        bias=_no_bias,
    )


def find_core(name: str, module: nn.Module, parent: nn.Module | None) -> CoreSite | None:
    return None


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Reading:
    scores_TE, logits_TE = output[0].detach(), output[1].detach()
    weights_TK, ids_TK = scores_TE.topk(module.top_k, dim=-1)
    return Reading(logits_TE, weights_TK, ids_TK)
