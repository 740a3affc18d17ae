"""Top-k routing: one router whose few stages cover Mixtral, OLMoE, Qwen, DeepSeek and GLM by configuration.

    logits = x W^T (+ b)                           always in float32 or wider
    scores = softmax(logits) or sigmoid(logits)    (or the logits, normalised over the chosen K afterwards)
    choice = scores + selection bias, restricted to the best groups
    expert_ids = top-k of choice;  weights = scores of the chosen, normalised and scaled

The selection bias (Wang et al. 2024, arXiv:2408.15664) steers who is chosen and is invisible to gate
weights and gradients. It moves only through `update_selection_bias`, once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.capacity import capacity_of, experts_choose, keep_within_capacity
from model.config import ModelConfig
from model.expert_config import RouterConfig
from model.linear import linear
from model.precision import at_least_float32, no_autocast
from model.router_draws import RouterDraws

# A denominator of sigmoid scores may underflow to 0; DeepSeek's value, too small to change any other sum.
_TINY = 1e-20


class Routing(NamedTuple):
    """What a router decided, in the order of Hugging Face routers (logits, weights, indices)."""

    logits_TE: Tensor
    """Logits as they decided, float32: with noise in training, without selection bias, before any mask."""
    weights_TK: Tensor
    """Gate weights, float32, 0 or more."""
    expert_ids_TK: Tensor
    """int64. Slots by falling selection score; with chooser=expert slot e is expert e, K = E."""
    kept_TK: Tensor | None = None
    """bool. Slots that count; the others have weight 0. None: all do."""
    taken_BCE: Tensor | None = None
    """int64. With chooser=expert: the positions of each sequence that each expert takes."""
    orthogonality: Tensor | None = None
    """Scalar, with orthogonality=True: SimBal's loss of this router's weights."""


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


def balanced_ids(num_tokens: int, num_experts: int, top_k: int, device: torch.device) -> Tensor:
    """int64 [T, K]: experts dealt out in turn; loads differ by one at most."""
    slots_N = torch.arange(num_tokens * top_k, device=device)
    return (slots_N % num_experts).view(num_tokens, top_k)


def orthogonality_loss(weight_ED: Tensor) -> Tensor:
    """SimBal (arXiv:2506.14038): sum of |W W^T - I|, 0 where the rows of a router are orthonormal."""
    weight_ED = at_least_float32(weight_ED)
    identity_EE = torch.eye(len(weight_ED), dtype=weight_ED.dtype, device=weight_ED.device)
    return (weight_ED @ weight_ED.t() - identity_EE).abs().sum()


class TopKRouter(nn.Module):
    """Chooses `top_k` of `num_experts` experts for every token, or tokens for every expert."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.router
        self.num_experts, self.num_chosen = config.num_experts, config.top_k
        self.top_k = config.num_experts if config.router.chooser == "expert" else config.top_k
        """Slots of a token in the routing."""
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))
        noisy = config.router.router_noise == "shazeer"
        self.noise_weight = nn.Parameter(torch.empty(config.num_experts, config.dim)) if noisy else None
        learned = config.router.router_bias
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if learned else None
        bias_E = torch.zeros(config.num_experts) if config.router.selection_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)
        self.forced_ids_TK: Tensor | None = None
        """Experts to use instead of choosing; see `forced_routing`."""

    def forward(
        self, x_BSD: Tensor, draws: RouterDraws | None = None, valid_BS: Tensor | None = None
    ) -> Routing:
        """Route tokens; the routing is flat, T = B * S.

        Args:
            x_BSD: or [T, D], one sequence; sequences matter only where experts have a capacity.
            draws: this layer's random numbers, in training.
            valid_BS: False for padding, which takes no place in an expert's capacity.
        """
        shape = x_BSD.shape[:-1] if x_BSD.ndim == 3 else (1, len(x_BSD))
        logits_TE = self._logits(at_least_float32(x_BSD.reshape(-1, x_BSD.shape[-1])), draws)
        scores_TE = expert_scores(self.config, logits_TE)
        orthogonal = orthogonality_loss(self.weight) if self.config.orthogonality else None
        if self.config.chooser == "expert":
            return self._experts_choose(logits_TE, scores_TE, shape, valid_BS)._replace(
                orthogonality=orthogonal
            )
        expert_ids_TK = self._choose(scores_TE, draws)
        weights_TK = gate_weights(self.config, scores_TE.gather(-1, expert_ids_TK))
        kept_TK = None
        if self.config.capacity_factor and self.training:
            kept_TK = self._kept(expert_ids_TK, weights_TK, shape, valid_BS)
            weights_TK = weights_TK * kept_TK
        return Routing(logits_TE, weights_TK, expert_ids_TK, kept_TK, orthogonality=orthogonal)

    def _logits(self, x_TD: Tensor, draws: RouterDraws | None) -> Tensor:
        if draws is not None and draws.jitter_TD is not None:
            x_TD = x_TD * draws.jitter_TD
        with no_autocast(x_TD):
            bias_E = None if self.bias is None else self.bias.to(x_TD.dtype)
            logits_TE = linear(x_TD, self.weight.to(x_TD.dtype), bias_E)
            if draws is None or draws.noise_TE is None:
                return logits_TE
            noise_TE = self.config.noise_scale * draws.noise_TE
            if self.noise_weight is not None:
                noise_TE = noise_TE * F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype)))
        return logits_TE + noise_TE

    def _choose(self, scores_TE: Tensor, draws: RouterDraws | None) -> Tensor:
        if self.forced_ids_TK is not None:
            return self.forced_ids_TK
        if self.config.force_balanced:
            return balanced_ids(len(scores_TE), self.num_experts, self.top_k, scores_TE.device)
        choice_TE = scores_TE.detach()
        if self.e_score_correction_bias is not None:
            choice_TE = choice_TE + self.e_score_correction_bias
        choice_TE = keep_top_groups(self.config, choice_TE)
        if draws is not None and draws.off_E is not None:
            choice_TE = choice_TE.masked_fill(draws.off_E, float("-inf"))
        return choice_TE.topk(self.top_k, dim=-1).indices

    def _kept(
        self, expert_ids_TK: Tensor, weights_TK: Tensor, shape: Sequence[int], valid_BS: Tensor | None
    ) -> Tensor:
        capacity = capacity_of(shape[1], self.top_k, self.num_experts, self.config.capacity_factor)
        kept_BSK = keep_within_capacity(
            expert_ids_TK.view(*shape, -1),
            weights_TK.view(*shape, -1),
            self.num_experts,
            capacity,
            self.config.drop_order,
            valid_BS,
        )
        return kept_BSK.flatten(0, 1)

    def _experts_choose(
        self, logits_TE: Tensor, scores_TE: Tensor, shape: Sequence[int], valid_BS: Tensor | None
    ) -> Routing:
        factor = self.config.capacity_factor or 1.0
        capacity = capacity_of(shape[1], self.num_chosen, self.num_experts, factor)
        scores_BSE = scores_TE.view(*shape, -1)
        taken_BCE = experts_choose(scores_BSE.detach(), capacity, valid_BS)
        kept_BSE = torch.zeros_like(scores_BSE, dtype=torch.bool).scatter(1, taken_BCE, True)
        if valid_BS is not None:
            kept_BSE = kept_BSE & valid_BS[..., None]
        kept_TE = kept_BSE.flatten(0, 1)
        ids_TE = torch.arange(self.num_experts, device=logits_TE.device).expand_as(logits_TE)
        weights_TE = scores_TE * kept_TE * self.config.scale
        return Routing(logits_TE, weights_TE, ids_TE, kept_TE, taken_BCE)

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


@contextmanager
def forced_routing(model: nn.Module, expert_ids_LTK: Sequence[Tensor]) -> Iterator[None]:
    """Inside, every layer uses these experts, weighed by their scores: replay of a recorded routing.

    Stay inside until after `backward` where blocks are recomputed. Raises ValueError if the number of layers
    does not fit.
    """
    found = routers(model)
    if len(found) != len(expert_ids_LTK):
        raise ValueError(
            f"{len(expert_ids_LTK)} layers of expert ids for {len(found)} MoE layers; give one for each"
        )
    for router, ids_TK in zip(found, expert_ids_LTK, strict=True):
        router.forced_ids_TK = ids_TK
    try:
        yield
    finally:
        for router in found:
            router.forced_ids_TK = None


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
