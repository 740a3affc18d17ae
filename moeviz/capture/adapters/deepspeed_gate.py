"""DeepSpeed's expert-parallel layer: the hook sits on `TopKGate`, whose output is

    (l_aux, capacity, E, ids [K,T], -1 where capacity dropped, locations, weights [K,T], counts [E] before drops)

The logits are not returned; they are computed again from the gate's input (float32, as the gate does,
without the optional jitter). A dropped slot has lost its expert's number: it gets the best expert that the
token does not keep, which is the one dropped whenever selection is the top-k of the logits. Where the gate draws
(RSample, sampling of the second expert) that is a guess in a token's row; assignments and drops of each expert are
exact all the same, from the gate's own counts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeviz.capture.reading import CoreSite, Reading, RouterSite

_FIELDS = 7


def _no_bias() -> Tensor | None:
    return None


def find_router(name: str, module: nn.Module, parent: nn.Module | None) -> RouterSite | None:
    if type(module).__name__ != "TopKGate" or not type(module).__module__.startswith("deepspeed."):
        return None
    gate: Any = module
    return RouterSite(
        name=name,
        module=module,
        num_experts=gate.wg.out_features,
        top_k=gate.k,
        score="softmax",
        read=_read,
        bias=_no_bias,
    )


def find_core(name: str, module: nn.Module, parent: nn.Module | None) -> CoreSite | None:
    return None


def _read(gate: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Reading:
    if len(output) != _FIELDS:
        raise ValueError(
            f"the gate returned {len(output)} values, not {_FIELDS}; moeviz reads the sparse routes of "
            "deepspeed 0.19: call the gate with sparse_routes=True, as deepspeed.moe.layer.MoE does"
        )
    with torch.no_grad():
        logits_TE = F.linear(args[0].float(), gate.wg.weight.float())
    ids_TK, weights_TK = output[3].detach().T.long(), output[5].detach().T
    dropped_TK = ids_TK < 0
    ids_TK = torch.where(dropped_TK, _best_not_kept(logits_TE, ids_TK), ids_TK)
    return Reading(
        logits_TE, weights_TK.masked_fill(dropped_TK, 0.0), ids_TK, dropped_TK, counts_E=output[6].detach()
    )


def _best_not_kept(logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """For the j-th dropped slot of a token, its j-th best expert among those it does not keep, [T, K]."""
    num_experts = logits_TE.shape[-1]
    dropped_TK = ids_TK < 0
    one_more = F.pad(logits_TE, (0, 1))  # a column for the dropped slots to fall into
    kept = ids_TK.masked_fill(dropped_TK, num_experts)
    free_TE = one_more.scatter(-1, kept, float("-inf"))[:, :num_experts]
    best_TK = free_TE.topk(ids_TK.shape[-1], dim=-1).indices
    return best_TK.gather(-1, (dropped_TK.cumsum(-1) - 1).clamp(min=0))
