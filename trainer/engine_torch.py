"""Plain torch, a device for each rank: autograd, clip_grad_norm_, an optimizer, and nothing between them.

The reference that every other engine is compared with. Many ranks hold the same weights and optimizer state, and
average their gradients after the last micro-batch of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from model.lm import ModelOutput, MoELanguageModel
from model.prune import COPY_NOISE, Sources, carry_optimizer_state, with_experts
from moeviz.errors import MoevizError
from trainer.checkpoint import with_tied
from trainer.config import TrainConfig
from trainer.engine import Pass, Update, choose_device, one_by_one
from trainer.frozen import freeze
from trainer.loss_scale import LossScale
from trainer.optim import build_optimizer, forget_rows, set_learning_rate
from trainer.precision import MasterWeights, cast_weights
from trainer.process_group import average_gradients, join_ranks, launched_ranks, local_rank

STATE_FILE = "optimizer.pt"


class TorchEngine:
    """One process, one device."""

    def __init__(self, model: MoELanguageModel, config: TrainConfig) -> None:
        self.rank, self.world_size = 0, launched_ranks()
        if self.world_size > 1:
            join_ranks(config.engine.rank_timeout)
            self.rank = dist.get_rank()
        self.replica, self.num_replicas = self.rank, self.world_size
        self.device = choose_device(config.engine.device, local_rank())
        self.module = self._placed(model)
        cast_weights(self.module, config.engine.dtype)
        if config.engine.gradient_checkpointing:
            self.module.gradient_checkpointing_enable()
        self._forward = _compiled(self.module) if config.engine.compile else self.module
        self._masters = MasterWeights(self.module)
        self._optimizer = build_optimizer(self._masters.named(), config.optim)
        self._averages = config.optim.optimizer == "schedulefree"
        self._scale = LossScale(config.engine.dtype)
        self._max_norm = config.optim.grad_clip or float("inf")

    def _placed(self, model: MoELanguageModel) -> MoELanguageModel:
        return model.to(self.device)

    def forward(self, input_ids_BS: Tensor, labels_BS: Tensor, **more: Any) -> ModelOutput:
        forward = self._forward if torch.is_grad_enabled() else self.module
        return forward(input_ids_BS, labels_BS, **more)

    def backward(self, loss: Tensor, *, share: float = 1.0, last: bool = True) -> None:
        (loss * (share * self._scale.value)).backward()
        self._masters.collect_gradients()
        if last and self.world_size > 1:
            average_gradients([weight for _, weight in self._masters.named()])

    def accumulate(self, passes: Sequence[Pass]) -> None:
        one_by_one(self, passes)

    def step(self, learning_rate: float) -> Update:
        weights = [weight for _, weight in self._masters.named()]
        self._scale.unscale(weights)
        norm = self._clip(weights)
        finite = math.isfinite(norm)
        if finite:
            set_learning_rate(self._optimizer, learning_rate)
            self._optimizer.step()
            self._masters.publish()
        self.discard()
        return Update(norm, finite, self._scale.update(finite))

    def _clip(self, weights: Sequence[nn.Parameter]) -> float:
        """Shorten the gradient to the longest that is allowed. Returns its norm before."""
        return float(torch.nn.utils.clip_grad_norm_(weights, self._max_norm))

    def discard(self) -> None:
        self._optimizer.zero_grad()
        self.module.zero_grad()

    def gradient(self, name: str) -> Tensor | None:
        gradient = dict(self._masters.named())[name].grad
        return None if gradient is None else gradient / self._scale.value

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        if not self._averages:
            yield
            return
        trained = self._trained_weights()
        self._optimizer.eval()  # type: ignore[attr-defined]
        self._masters.publish()
        try:
            yield
        finally:
            self._optimizer.train()  # type: ignore[attr-defined]
            self._put_back(trained)

    def _trained_weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self._masters.named()}

    @torch.no_grad()
    def _put_back(self, trained: Mapping[str, Tensor]) -> None:
        """To the bit: what the optimizer computes back from its average is rounded."""
        for name, weight in self._masters.named():
            weight.copy_(trained[name])
        self._masters.publish()

    @torch.no_grad()
    def replace_rows(self, name: str, rows: list[int], values: Tensor) -> None:
        weight = dict(self._masters.named())[name]
        weight[rows] = values.to(weight)
        forget_rows(self._optimizer.state[weight], weight, rows)
        self._masters.publish()

    def sum_ranks(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def sum_replicas(self, values: Tensor) -> Tensor:
        return self.sum_ranks(values)

    def weights(self) -> dict[str, Tensor]:
        with self.evaluating():
            # On the CPU `cpu()` copies nothing, and after this block the averages are gone.
            state = self.module.state_dict().items()
            values = {name: value.detach() for name, value in state if not value.is_meta}
            return {
                name: value.cpu().clone() if self._averages else value.cpu() for name, value in values.items()
            }

    def save_state(self, folder: Path) -> None:
        if self.rank == 0:
            torch.save(self._state(), folder / STATE_FILE)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "masters": self._masters.state(),
            "scale": self._scale.state(),
            "trained": self._trained_weights() if self._averages else {},
        }

    def load_state(self, weights: dict[str, Tensor], folder: Path) -> None:
        self.module.load_state_dict(weights)
        self._load(torch.load(folder / STATE_FILE, map_location=self.device, weights_only=True))

    def _load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `_state`."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._masters.load(state["masters"])
        if "scale" in state:
            self._scale.load(state["scale"])
        if self._averages:
            self._put_back(state["trained"])

    def with_experts(self, sources: Sources, config: TrainConfig) -> TorchEngine:
        """An engine whose experts are copies of these of this one's, with their optimizer state.

        Raises:
            ValueError: see `model.prune.with_experts`.
        """
        exact = MoELanguageModel(self.module.config)
        exact.load_state_dict(with_tied({**self.module.state_dict(), **self._masters.state()}, exact.config))
        small = with_experts(exact, sources, router_noise=COPY_NOISE)
        weights = {name: weight.detach().clone() for name, weight in small.named_parameters()}
        freeze(small, config.freeze, config.train_only)
        engine = TorchEngine(small, config)
        engine._masters.load(weights)
        engine._masters.publish()
        named = dict(self._masters.named()), dict(engine._masters.named())
        carry_optimizer_state(exact, sources, (named[0], self._optimizer), (named[1], engine._optimizer))
        for mine, theirs in zip(self._optimizer.param_groups, engine._optimizer.param_groups, strict=True):
            theirs.update({key: value for key, value in mine.items() if key != "params"})
        engine._scale.load(self._scale.state())
        return engine

    def destroy(self) -> None:
        self.discard()


def _compiled(module: MoELanguageModel) -> Callable[..., ModelOutput]:
    """The training forward of `module` through torch.compile; the module itself stays as it is.

    Nothing is compiled before the first call, by when the hooks of a probe are in place. Shapes are fixed: a
    micro-batch of another size is another program.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # takes seconds, and is seldom needed

    torch.compiler.reset()  # programs of models trained earlier in this process count against a limit
    program = torch.compile(module, dynamic=False)

    def forward(*args: Any, **more: Any) -> ModelOutput:
        try:
            return program(*args, **more)
        except BackendCompilerFailed as error:
            raise MoevizError(
                f"torch.compile cannot build this model here ({error.inner_exception}); on a CPU it needs a C++ "
                "compiler such as g++, else leave --compile out"
            ) from error

    return forward
