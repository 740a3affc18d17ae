"""Layers that are reduced together: the same experts, top-k, scores, kind of bias, reader and device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from torch import Tensor

from moeviz.capture.bias import BiasCopier, CopiedBias
from moeviz.capture.reading import RouterSite
from moeviz.capture.reduce import Decisions
from moeviz.capture.scoring import is_ordered, is_ranked, score_of
from moeviz.records import ScoreFunction


@dataclass(eq=False)
class LayerGroup:
    """MoE layers that are reduced together."""

    layers: tuple[int, ...]
    sites: tuple[RouterSite, ...]
    score: ScoreFunction
    ranked: bool
    has_bias: bool
    ordered: bool = False
    """Whether slots come by falling selection score."""
    checked: bool = False

    @property
    def num_experts(self) -> int:
        return self.sites[0].num_experts

    @property
    def top_k(self) -> int:
        return self.sites[0].top_k

    @property
    def device(self) -> str:
        """Where the parameters of its routers are, or "" where they have none."""
        return device_of(self.sites[0])

    @property
    def sums_squares(self) -> bool:
        """Whether the bias is added to logits: then their size says how much it weighs."""
        return self.has_bias and self.score == "softmax_topk"

    def check(self, decisions: Decisions, bias_LE: Tensor | None) -> None:
        """Learn from the first decisions how experts are scored and ranked, and whether slots are in order."""
        if not self.checked:
            self.score = score_of(decisions, self.score)
            self.ranked = self.ranked and is_ranked(decisions, self.score, bias_LE)
            self.ordered = is_ordered(decisions, self.score, bias_LE)
            self.checked = True

    def bias(self) -> Tensor | None:
        """Selection biases as they are now, float32 [L, E], or None where the routers have none."""
        copied = self.copy_bias()
        return None if copied is None else copied.tensor()

    def copy_bias(self, first: int = 0, stop: int | None = None) -> CopiedBias | None:
        """The same of some of the layers, for later."""
        if not self.has_bias:
            return None
        return self._copier.copy(
            [bias_E for site in self.sites[first:stop] if (bias_E := site.bias()) is not None]
        )

    @cached_property
    def _copier(self) -> BiasCopier:
        return BiasCopier(self.num_experts)


def device_of(site: RouterSite) -> str:
    """Where the parameters of a router are, or "" where it has none."""
    return next((str(p.device) for p in site.module.parameters()), "")


def group_layers(routers: Sequence[RouterSite]) -> list[LayerGroup]:
    """Layers with the same experts, top-k, scores, kind of bias, reader and device."""

    def key(layer: int) -> tuple[object, ...]:
        site = routers[layer]
        drops = getattr(site.read, "func", site.read)
        return (
            site.num_experts,
            site.top_k,
            site.score,
            site.bias() is not None,
            site.grouped,
            str(drops),
            device_of(site),
        )

    groups = []
    for _, members in groupby(sorted(range(len(routers)), key=lambda n: (str(key(n)), n)), key=key):
        layers = tuple(members)
        sites = tuple(routers[layer] for layer in layers)
        groups.append(
            LayerGroup(
                layers=layers,
                sites=sites,
                score=sites[0].score,
                ranked=not sites[0].grouped,
                has_bias=sites[0].bias() is not None,
            )
        )
    return groups
