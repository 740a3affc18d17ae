"""Routers of transformers 5: nearly all return (logits [T,E], weights [T,K], ids [T,K]).

The logits are raw (no bias, no group mask); the ids are the model's own choice, which for DeepSeek-V3 and
its relatives is not the top-k of the logits. Inputs may be [T, D] or [B, S, D]; outputs are flat. What
differs between families is how logits become scores and where the selection bias lives.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from torch import Tensor, nn

from moeviz.capture.adapters.huggingface_attention import find_core
from moeviz.capture.reading import Reading, RouterSite
from moeviz.records import ScoreFunction

__all__ = ["find_core", "find_router"]

_ROUTER = re.compile(r"(Router|Gate|Gating)$")
_NOT_A_TRIPLE = re.compile(
    r"^(AXK2Topk|DiffusionGemmaText|Dbrx|Gemma4Text|LongcatFlashTopk|NllbMoeTop2|SwitchTransformersTop1|Zaya)Router$"
)
"""These return something else (Zaya counts a skipped token as expert 0): a model with one is refused."""

_SIGMOID = re.compile(r"^(Afmoe|Cohere2Moe|Dots3NoteVision|Flint|HYV3|Lfm2Moe|MiniMaxM2)")
"""Sigmoid gates whose bias is not an attribute of the router."""
_SOFTMAX_DESPITE_BIAS = re.compile(r"^Ernie4_5_")
_SOFTMAX_AFTER_TOPK = re.compile(r"^(GptOss|Granite|OpenAIPrivacyFilter)")

_BIAS_NAMES = ("e_score_correction_bias", "expert_bias")


def find_router(name: str, module: nn.Module, parent: nn.Module | None) -> RouterSite | None:
    kind = type(module).__name__
    if not from_transformers(module) or not _ROUTER.search(kind) or _NOT_A_TRIPLE.search(kind):
        return None
    num_experts, top_k = getattr(module, "num_experts", None), getattr(module, "top_k", None)
    if not isinstance(num_experts, int) or not isinstance(top_k, int):
        return None
    bias = functools.partial(selection_bias, module, parent, num_experts)
    return RouterSite(
        name=name,
        module=module,
        num_experts=num_experts,
        top_k=top_k,
        score=_score(kind, has_bias=bias() is not None),
        read=_read,
        bias=bias,
        grouped=max(getattr(module, "num_group", None) or 1, getattr(module, "n_group", None) or 1) > 1,
    )


def from_transformers(module: nn.Module) -> bool:
    """Whether the module's class is the library's own or a model file loaded from a repository."""
    return type(module).__module__.startswith(("transformers.models.", "transformers_modules."))


def _score(kind: str, has_bias: bool) -> ScoreFunction:
    if _SOFTMAX_AFTER_TOPK.match(kind):
        return "softmax_topk"
    if _SIGMOID.match(kind) or (has_bias and not _SOFTMAX_DESPITE_BIAS.match(kind)):
        return "sigmoid"
    return "softmax"


def selection_bias(module: nn.Module, parent: nn.Module | None, num_experts: int) -> Tensor | None:
    """The bias [E] that steers selection: on the router, its `moe_statics` (Ernie) or its block (MiniMax)."""
    for owner in (module, getattr(module, "moe_statics", None), parent):
        for name in _BIAS_NAMES:
            bias = getattr(owner, name, None)
            if isinstance(bias, Tensor) and bias.numel() == num_experts:
                return bias.detach().flatten()
    return None


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Reading:
    return Reading(output[0].detach(), output[1].detach(), output[2].detach())
