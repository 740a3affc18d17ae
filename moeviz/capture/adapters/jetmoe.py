"""JetMoE: gates, of feed-forward and of attention experts, return assignments sorted by expert.

(order [T*K], token of each, gate weight of each, list of group sizes, logits [T,E]): undone here into (T, K).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeviz.capture.reading import CoreSite, Reading, RouterSite


def _no_bias() -> Tensor | None:
    return None


def find_router(name: str, module: nn.Module, parent: nn.Module | None) -> RouterSite | None:
    if type(module).__name__ != "JetMoeTopKGating":
        return None
    gate: Any = module
    return RouterSite(
        name=name,
        module=module,
        num_experts=gate.num_experts,
        top_k=gate.top_k,
        score="softmax_topk",
        read=_read,
        bias=_no_bias,
    )


def find_core(name: str, module: nn.Module, parent: nn.Module | None) -> CoreSite | None:
    return None


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Reading:
    order, _, gates, sizes, logits_TE = output
    experts = torch.arange(len(sizes), device=order.device)
    sorted_ids = experts.repeat_interleave(torch.tensor(sizes, device=order.device), output_size=len(order))
    ids = torch.empty_like(order).scatter(0, order, sorted_ids)
    weights = torch.empty_like(gates.detach()).scatter(0, order, gates.detach())
    num_tokens = logits_TE.shape[0]
    return Reading(logits_TE.detach(), weights.view(num_tokens, -1), ids.view(num_tokens, -1))
