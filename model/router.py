"""Top-k routing: one router whose few stages cover Mixtral, OLMoE, Qwen, DeepSeek and GLM by configuration.

    logits = x W^T (+ b)                           always in float32 or wider
    scores = softmax(logits) or sigmoid(logits)    (or the logits, normalised over the chosen K afterwards)
    choice = scores + selection bias, restricted to the best groups
    expert_ids = top-k of choice;  weights = scores of the chosen, normalised and scaled

The selection bias (Wang et al. 2024, arXiv:2408.15664) steers who is chosen and is invisible to gate
weights and gradients. It moves only through `update_selection_bias`, once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.expert_config import RouterConfig
from model.precision import at_least_float32, no_autocast

# A denominator of sigmoid scores may underflow to 0; DeepSeek's value, too small to change any other sum.
_TINY = 1e-20


class Routing(NamedTuple):
    """What a router decided, in the order of Hugging Face routers (logits, weights, indices)."""

    logits_TE: Tensor
    """Raw logits, float32: without selection bias and before any mask."""
    weights_TK: Tensor
    """Gate weights, float32, 0 or more."""
    expert_ids_TK: Tensor
    """int64. Slots by falling selection score."""


def expert_scores(router: RouterConfig, logits_TE: Tensor) -> Tensor:
    """Scores that rank the experts of a token; for softmax_topk the logits themselves."""
    if router.score == "softmax":
        return logits_TE.softmax(dim=-1)
    return logits_TE.sigmoid() if router.score == "sigmoid" else logits_TE


def keep_top_groups(router: RouterConfig, choice_TE: Tensor) -> Tensor:
    """Set the choice scores outside a token's best groups to -inf."""
    if router.num_groups == 1:
        return choice_TE
    groups_TGM = choice_TE.unflatten(-1, (router.num_groups, -1))
    members = 1 if router.group_score == "max" else 2
    rank_TG = groups_TGM.topk(members, dim=-1).values.sum(dim=-1)
    best = rank_TG.topk(router.top_groups, dim=-1).indices
    dropped_TG = torch.ones_like(rank_TG, dtype=torch.bool).scatter(-1, best, False)
    return groups_TGM.masked_fill(dropped_TG[..., None], float("-inf")).flatten(-2)


def gate_weights(router: RouterConfig, scores_TK: Tensor) -> Tensor:
    """Gate weights from the scores of the chosen experts."""
    if router.score == "softmax_topk":
        scores_TK = scores_TK.softmax(dim=-1)
    elif router.norm_topk:
        scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + _TINY)
    return scores_TK if router.scale == 1.0 else scores_TK * router.scale


class TopKRouter(nn.Module):
    """Chooses `top_k` of `num_experts` experts for every token."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.router
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))
        learned = config.router.router_bias
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if learned else None
        bias_E = torch.zeros(config.num_experts) if config.router.selection_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_TD: Tensor) -> Routing:
        """`x_TD` may also be [B, S, D]; the routing is flat, T = B * S."""
        x_TD = at_least_float32(x_TD.reshape(-1, x_TD.shape[-1]))
        with no_autocast(x_TD):
            bias_E = None if self.bias is None else self.bias.to(x_TD.dtype)
            logits_TE = F.linear(x_TD, self.weight.to(x_TD.dtype), bias_E)
        scores_TE = expert_scores(self.config, logits_TE)
        choice_TE = scores_TE.detach()
        if self.e_score_correction_bias is not None:
            choice_TE = choice_TE + self.e_score_correction_bias
        choice_TE = keep_top_groups(self.config, choice_TE)
        expert_ids_TK = choice_TE.topk(self.top_k, dim=-1).indices
        weights_TK = gate_weights(self.config, scores_TE.gather(-1, expert_ids_TK))
        return Routing(logits_TE, weights_TK, expert_ids_TK)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        """Move with the model but stay float32: bfloat16 would round most bias updates away."""
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved_E = self.e_score_correction_bias
        if bias_E is not None and moved_E is not None and moved_E.dtype != bias_E.dtype:
            self.e_score_correction_bias = bias_E.to(moved_E.device)
        return self

    def extra_repr(self) -> str:
        return f"top {self.top_k} of {self.num_experts}, {self.config.score}"


def routers(model: nn.Module) -> list[TopKRouter]:
    """The routers of `model`, first layer first."""
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


@torch.no_grad()
def update_selection_bias(
    model: nn.Module, counts_LE: Tensor, step_size: float, *, recenter: bool = False
) -> None:
    """Make overloaded experts less and underloaded ones more likely: b += step_size * sign(mean(n) - n).

    Called once per optimizer step, after it. `counts_LE` holds the assignments of the whole step, summed over
    micro-batches and ranks. The paper (arXiv:2408.15664) does not recenter; `recenter` subtracts the mean
    bias of each layer, which changes no selection without groups and keeps the values from drifting.

    Raises ValueError if the model has no selection bias or `counts_LE` does not fit it.
    """
    found = [router for router in routers(model) if router.e_score_correction_bias is not None]
    if not found:
        raise ValueError("the model has no selection bias; build it with router.selection_bias=True")
    if counts_LE.shape != (len(found), found[0].num_experts):
        raise ValueError(
            f"counts_LE has shape {tuple(counts_LE.shape)}; the model has {len(found)} MoE layers of "
            f"{found[0].num_experts} experts"
        )
    loads_LE = counts_LE.float()
    steps_LE = step_size * torch.sign(loads_LE.mean(dim=-1, keepdim=True) - loads_LE)
    for router, step_E in zip(found, steps_LE, strict=True):
        bias_E = router.e_score_correction_bias
        assert bias_E is not None
        bias_E += step_E.to(bias_E.device)
        if recenter:
            bias_E -= bias_E.mean()
