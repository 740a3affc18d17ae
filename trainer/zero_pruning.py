"""A smaller model from a DeepSpeed engine: masters and optimizer state gathered whole, cut, and divided anew.

`model.prune` knows weights and optimizers that are whole. In ZeRO's stages 1 and 2 each rank has flat shares of both,
so every rank gathers all of it once, on its CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from model.lm import MoELanguageModel
from model.prune import COPY_NOISE, Sources, carry_optimizer_state, with_experts
from trainer.checkpoint import with_tied
from trainer.frozen import freeze

State = dict[str, Any]
"""What an optimizer keeps of one weight."""


class ZeroState:
    """The masters and the optimizer state of a model under DeepSpeed, by weight."""

    def __init__(
        self, module: MoELanguageModel, outer: Any, plain: torch.optim.Optimizer, stage: int
    ) -> None:
        """
        Args:
            module: the model.
            outer: `engine.optimizer`.
            plain: the optimizer beneath it, in stage 0 the same.
            stage: of ZeRO, 0 to 2.
        """
        self._named = dict(module.named_parameters())
        self._outer, self._plain, self._stage = outer, plain, stage

    def masters(self) -> dict[str, Tensor]:
        """Every weight in fp32, whole, on the CPU. Every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole = {name: self._whole(weight, safe_get_full_fp32_param) for name, weight in self._named.items()}
        return {name: value.detach().float().cpu().clone() for name, value in whole.items()}

    def states(self) -> dict[str, State]:
        """What the optimizer keeps of each weight that it has stepped, whole, on the CPU. Every rank must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        found = {}
        for name, weight, flat in self._trained():
            held = self._plain.state.get(flat, {})
            found[name] = {
                key: self._whole_or_same(weight, flat, key, value, safe_get_full_optimizer_state)
                for key, value in held.items()
            }
        return found

    def fill(self, masters: Mapping[str, Tensor], states: Mapping[str, State]) -> None:
        """Take these over into an engine that has not taken a step. Every rank must call it."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, _, flat in self._trained():
            held = self._plain.state[flat]
            for key, value in states[name].items():
                held.setdefault(key, torch.zeros_like(flat) if _is_like(value, masters[name]) else value)
        self._link()
        for name, weight, flat in self._trained():
            if not self._stage:
                weight.copy_(masters[name])
                self._plain.state[flat].update(_on(weight.device, states[name]))
                continue
            safe_set_full_fp32_param(weight, masters[name].to(flat.device))
            for key, value in states[name].items():
                if _is_like(value, masters[name]):
                    safe_set_full_optimizer_state(weight, value.to(flat.device), key)

    def _link(self) -> None:
        """Tell DeepSpeed where the state of each weight is: it looks once, after the first group's first step."""
        if self._stage:
            self._outer._hp_optimizer_states_linked = False
            self._outer._lazy_init_hp_params_optimizer_state()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Name, weight, and what the optimizer steps in its place."""
        if not self._stage:
            yield from (
                (name, weight, weight) for name, weight in self._named.items() if weight.requires_grad
            )
            return
        names = {id(weight): name for name, weight in self._named.items()}
        for group, flat in zip(
            self._outer.bit16_groups, self._outer.single_partition_of_fp32_groups, strict=True
        ):
            yield from ((names[id(weight)], weight, flat) for weight in group)

    def _whole(self, weight: Tensor, get: Callable[[Tensor], Tensor | None]) -> Tensor:
        if not (self._stage and weight.requires_grad):
            return weight
        whole = get(weight)
        assert whole is not None
        return whole

    def _whole_or_same(
        self, weight: Tensor, flat: Tensor, key: str, value: Any, get: Callable[[Tensor, str], Tensor | None]
    ) -> Any:
        """Of a weight's own size: whole. A count of steps stays what it is."""
        if not _is_like(value, flat):
            return value.clone() if isinstance(value, Tensor) else value
        whole = get(weight, key) if self._stage else value
        assert whole is not None
        return whole.detach().cpu().clone()


@torch.no_grad()
def smaller_model(
    module: MoELanguageModel,
    state: ZeroState,
    sources: Sources,
    freezing: tuple[tuple[str, ...], tuple[str, ...]],
) -> tuple[MoELanguageModel, dict[str, Tensor], dict[str, State]]:
    """The model with these experts, its masters and its optimizer state. Every rank must call it.

    Args:
        freezing: frozen parts, and parts that alone are trained.

    Raises:
        ValueError: see `model.prune.with_experts`.
    """
    exact = MoELanguageModel(module.config)
    exact.load_state_dict(with_tied({**module.state_dict(), **state.masters()}, module.config))
    small = with_experts(exact, sources, router_noise=COPY_NOISE)
    freeze(small, *freezing)
    named = dict(exact.named_parameters()), dict(small.named_parameters())
    states = state.states()
    before: Any = SimpleNamespace(state={named[0][name]: states[name] for name in states})
    after: Any = SimpleNamespace(state={})
    carry_optimizer_state(exact, sources, (named[0], before), (named[1], after))
    carried = {name: after.state.get(weight, {}) for name, weight in named[1].items() if name in states}
    return small, {name: weight.detach().clone() for name, weight in named[1].items()}, carried


def _is_like(value: object, other: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == other.shape


def _on(device: torch.device, state: State) -> State:
    return {
        key: value.to(device) if isinstance(value, Tensor) and value.ndim else value
        for key, value in state.items()
    }
