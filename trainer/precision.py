"""Low-precision weights with fp32 masters: 8 bits of a number are too few to add a small update to it.

The model computes with bf16 or fp16 weights, gradients are summed and the optimizer works in fp32, and after each
step the result is rounded back. Routers stay in fp32 all through: in bf16 one token in forty changes an
expert at 64 experts (Switch Transformer's selective precision, Fedus et al. 2021,
https://arxiv.org/abs/2101.03961). With fp32 weights there is nothing to keep, and every method does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from model.router import routers

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cast_weights(model: nn.Module, dtype: str) -> None:
    """Turn the matrices of a model into `dtype` in place; routers, vectors and buffers stay in fp32."""
    if dtype == "fp32":
        return
    exempt = {id(weight) for router in routers(model) for weight in router.parameters()}
    for weight in model.parameters():
        if weight.ndim >= 2 and id(weight) not in exempt:
            weight.data = weight.data.to(_DTYPES[dtype])


class MasterWeights:
    """The fp32 side of a model's parameters: the parameter, or a master copy of a low-precision one."""

    def __init__(self, model: nn.Module) -> None:
        # What a stage of a pipeline does not hold is on `meta`.
        self._weights = {name: weight for name, weight in model.named_parameters() if not weight.is_meta}
        self._masters = {
            name: nn.Parameter(weight.detach().float(), requires_grad=weight.requires_grad)
            for name, weight in self._weights.items()
            if weight.dtype != torch.float32
        }

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer works on, under the model's names."""
        for name, weight in self._weights.items():
            yield name, self._masters.get(name, weight)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Move the gradients of one micro-batch to the masters, adding in fp32."""
        for name, master in self._masters.items():
            gradient = self._weights[name].grad
            if gradient is None:
                continue
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
            self._weights[name].grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters back into the model."""
        for name, master in self._masters.items():
            self._weights[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Masters by name; empty with fp32 weights."""
        return {name: master.detach() for name, master in self._masters.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, master in self._masters.items():
            master.copy_(state[name])
