"""Plain torch on one device: autograd, clip_grad_norm_, AdamW, and nothing between them.

The reference that every other engine is compared with.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from model.lm import ModelOutput, MoELanguageModel
from moeviz.errors import MoevizError
from trainer.config import TrainConfig
from trainer.engine import choose_device
from trainer.optim import build_optimizer, set_learning_rate
from trainer.precision import MasterWeights, cast_weights

_STATE_FILE = "optimizer.pt"


class TorchEngine:
    """One process, one device."""

    rank = 0
    world_size = 1

    def __init__(self, model: MoELanguageModel, config: TrainConfig) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise MoevizError(
                f"engine=torch runs one process, but WORLD_SIZE={os.environ['WORLD_SIZE']}; "
                "use --engine deepspeed"
            )
        self.device = choose_device(config.engine.device)
        self.module = model.to(self.device)
        cast_weights(self.module, config.engine.dtype)
        self._masters = MasterWeights(self.module)
        self._optimizer = build_optimizer(self._masters.named(), config.optim)
        self._micro_batches = config.data.gradient_accumulation_steps
        self._max_norm = config.optim.grad_clip or float("inf")

    def forward(self, input_ids_BS: Tensor, labels_BS: Tensor) -> ModelOutput:
        return self.module(input_ids_BS, labels_BS)

    def backward(self, loss: Tensor) -> None:
        (loss / self._micro_batches).backward()
        self._masters.collect_gradients()

    def step(self, learning_rate: float) -> float:
        weights = [weight for _, weight in self._masters.named()]
        norm = torch.nn.utils.clip_grad_norm_(weights, self._max_norm)
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._masters.publish()
        return float(norm)

    def sum_ranks(self, values: Tensor) -> Tensor:
        return values

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}

    def save_state(self, folder: Path) -> None:
        state = {"optimizer": self._optimizer.state_dict(), "masters": self._masters.state()}
        torch.save(state, folder / _STATE_FILE)

    def load_state(self, weights: dict[str, Tensor], folder: Path) -> None:
        self.module.load_state_dict(weights)
        state = torch.load(folder / _STATE_FILE, map_location=self.device, weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self._masters.load(state["masters"])

    def destroy(self) -> None:
        self._optimizer.zero_grad()
