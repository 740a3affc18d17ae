"""DeepSpeed with ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054), on one rank or many.

Its own C++ optimizers and its shared-memory collective are avoided: they are compiled at first use, for minutes, and
a build that is killed half way leaves a lock on which later runs hang.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from model.lm import ModelOutput, MoELanguageModel
from model.prune import Sources
from moeviz.errors import MoevizError, require
from trainer.config import TrainConfig
from trainer.engine import Pass, Update, choose_device, one_by_one
from trainer.engine_deepspeed_config import deepspeed_config
from trainer.flat_shares import flat_shares
from trainer.muon import Muon
from trainer.optim import build_optimizer, forget_rows, set_learning_rate
from trainer.process_group import join_ranks, local_rank
from trainer.universal import load_universal, ranks_of

if TYPE_CHECKING:
    from trainer.expert_parallel import ExpertShares
    from trainer.zero_pruning import ZeroState

_TAG = "deepspeed"


class DeepSpeedEngine:
    """One rank of a DeepSpeed run.

    In bf16 DeepSpeed keeps fp32 masters, but rounds the stored router weights too; their product is taken in
    fp32.
    """

    def __init__(self, model: MoELanguageModel, config: TrainConfig) -> None:
        join_ranks(config.engine.rank_timeout)
        deepspeed = _import_deepspeed()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.replica, self.num_replicas = self.rank, self.world_size
        self.device = choose_device(config.engine.device, local_rank())
        settings = deepspeed_config(config, self.world_size)
        self._shares = _share_experts(model, config, self.world_size, settings)
        self.module = model.to(self.device)
        self._stage = config.engine.zero_stage
        self._max_norm = config.optim.grad_clip
        self._fp16 = config.engine.dtype == "fp16"
        if self._fp16 and self.device.type == "cpu":
            raise MoevizError(
                "dtype=fp16 with engine=deepspeed needs a GPU; use --dtype bf16 or --engine torch"
            )
        if config.engine.gradient_checkpointing:
            self.module.gradient_checkpointing_enable()
        optimizer = build_optimizer(self.module.named_parameters(), config.optim)
        self._plain_optimizer, self._averages = optimizer, config.optim.optimizer == "schedulefree"
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=settings
        )
        if isinstance(optimizer, Muon) and self._stage:
            optimizer.shares = flat_shares(self._engine.optimizer, self._stage)
        self._loss = torch.zeros((), device=self.device)

    def forward(self, input_ids_BS: Tensor, labels_BS: Tensor, **more: Any) -> ModelOutput:
        return self._engine(input_ids_BS, labels_BS, **more)

    def backward(self, loss: Tensor, *, share: float = 1.0, last: bool = True) -> None:
        # How many micro-batches a step has may change between steps, so its end is told, not counted.
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * share, scale_wrt_gas=False)
        self._loss += loss.detach() * share
        if not last:
            self._engine.step()

    def accumulate(self, passes: Sequence[Pass]) -> None:
        one_by_one(self, passes)

    def step(self, learning_rate: float) -> Update:
        set_learning_rate(self._optimizer, learning_rate)
        norm = float(self._plain_gradient_norm()) if self._stage == 0 and not self._fp16 else None
        if norm is not None and not math.isfinite(norm):
            self.discard()
            return Update(norm, False)
        if norm is not None and self._shares is not None and self._max_norm:
            torch.nn.utils.clip_grads_with_norm_(
                self.module.parameters(), self._max_norm, torch.tensor(norm, device=self.device)
            )
        before = self._loss_scale
        self._engine.step()
        self._tell_monitors()
        taken = not getattr(self._engine.optimizer, "overflow", False)
        told = float(self._engine.get_global_grad_norm() if norm is None else norm)
        return Update(told if taken else math.nan, taken, self._loss_scale < before)

    def _tell_monitors(self) -> None:
        """The loss of the step, to the monitors of the user's DeepSpeed file; DeepSpeed tells them the rate alone."""
        if self._engine.monitor.enabled:
            loss = float(self.sum_ranks(self._loss)) / self.world_size
            self._engine.monitor.write_events(
                [("Train/Samples/train_loss", loss, self._engine.global_samples)]
            )
        self._loss.zero_()

    @property
    def _loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale) if self._fp16 else 1.0

    def discard(self) -> None:
        self._loss.zero_()
        optimizer = self._engine.optimizer
        optimizer.zero_grad()
        self.module.zero_grad()
        if self._stage in (1, 2):
            # What DeepSpeed clears after a step, and after one that overflowed.
            optimizer.micro_step_id = -1
            optimizer.overflow = False
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.step()

    def gradient(self, name: str) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        weight = self.module.get_parameter(name)
        gradient = weight.grad if self._stage == 0 else safe_get_full_grad(weight)
        if gradient is None:
            return None
        gradient = gradient.detach().float()
        return gradient if self._shares is None else self._shares.whole(name, gradient)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        if not self._averages:
            yield
            return
        trained = [(weight, weight.detach().clone()) for weight in self._stepped()]
        self._plain_optimizer.eval()  # type: ignore[attr-defined]
        self._publish()
        try:
            yield
        finally:
            self._plain_optimizer.train()  # type: ignore[attr-defined]
            with torch.no_grad():
                for weight, value in trained:
                    weight.copy_(value)
            self._publish()

    def _stepped(self) -> list[Tensor]:
        """What the optimizer works on: weights, or in stages 1 and 2 this rank's shares of their masters."""
        return [weight for group in self._plain_optimizer.param_groups for weight in group["params"]]

    def _publish(self) -> None:
        """Make the model's weights those of the shares. Every rank must call it."""
        if self._stage:
            self._engine.optimizer.update_lp_params()

    def _plain_gradient_norm(self) -> Tensor:
        """In stage 0 DeepSpeed reports no norm; gradients are whole and already averaged over the ranks."""
        named = self.module.named_parameters()
        gradients = {name: weight.grad for name, weight in named if weight.grad is not None}
        if self._shares is not None:
            return self._shares.norm(gradients)
        return torch.nn.utils.get_total_norm(gradients.values())

    @torch.no_grad()
    def replace_rows(self, name: str, rows: list[int], values: Tensor) -> None:
        from deepspeed import utils

        weight = self.module.get_parameter(name)
        weight[rows] = values.to(weight)
        if self._stage == 0:
            forget_rows(self._engine.optimizer.state[weight], weight, rows)
            return
        master = utils.safe_get_full_fp32_param(weight)
        master[rows] = values.to(master)
        utils.safe_set_full_fp32_param(weight, master)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = utils.safe_get_full_optimizer_state(weight, key)
            if moment is not None:
                moment[rows] = 0
                utils.safe_set_full_optimizer_state(weight, moment, key)

    def sum_ranks(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def sum_replicas(self, values: Tensor) -> Tensor:
        return self.sum_ranks(values)

    def weights(self) -> dict[str, Tensor]:
        parameters = list(self.module.parameters())
        with self.evaluating(), _gathered(parameters) if self._stage == 3 else nullcontext():
            state = self.module.state_dict()
            named = state.items() if self._shares is None else self._shares.whole_weights(state)
            return {name: value.detach().cpu().clone() for name, value in named}

    def save_state(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load_state(self, weights: dict[str, Tensor], folder: Path) -> None:
        # DeepSpeed's files hold the weights too, and the buffers; `weights` are the copy for everyone else.
        self._engine.checkpoint_engine.load = _load_without_code
        if self._shares is not None or ranks_of(folder / _TAG) in (0, self.world_size):
            self._engine.load_checkpoint(str(folder), tag=_TAG)
        else:
            load_universal(self._engine, folder, _TAG, _load_without_code)
            with torch.no_grad():  # parameters are all that DeepSpeed converts
                for name, buffer in self.module.named_buffers():
                    if name in weights:
                        buffer.copy_(weights[name])

    def with_experts(self, sources: Sources, config: TrainConfig) -> DeepSpeedEngine:
        """An engine whose experts are copies of these of this one's, with their optimizer state; not in stage 3.

        Every rank must call it.

        Raises:
            ValueError: see `model.prune.with_experts`.
        """
        from trainer.zero_pruning import smaller_model

        frozen = (config.freeze, config.train_only)
        small, masters, states = smaller_model(self.module, self._state(), sources, frozen)
        engine = DeepSpeedEngine(small, config)
        with torch.no_grad():
            engine._state().fill(masters, states)
        engine._publish()
        groups = zip(self._plain_optimizer.param_groups, engine._plain_optimizer.param_groups, strict=True)
        for mine, theirs in groups:
            theirs.update({key: value for key, value in mine.items() if key != "params"})
        for counter in ("global_steps", "global_samples", "micro_steps"):
            setattr(engine._engine, counter, getattr(self._engine, counter))
        if self._fp16:
            engine._engine.optimizer.loss_scaler = self._engine.optimizer.loss_scaler
        return engine

    def _state(self) -> ZeroState:
        from trainer.zero_pruning import ZeroState

        return ZeroState(self.module, self._engine.optimizer, self._plain_optimizer, self._stage)

    def destroy(self) -> None:
        self._engine.destroy()


def _share_experts(
    model: MoELanguageModel, config: TrainConfig, ranks: int, settings: Mapping[str, Any]
) -> ExpertShares | None:
    """Divide the experts of every layer among ranks, and give them DeepSpeed's gate, where the run asks for it."""
    sharing = config.engine.expert_parallel
    if not config.engine.has_deepspeed_experts:
        return None
    if ranks % sharing:
        raise MoevizError(
            f"expert_parallel={sharing} does not divide {ranks} ranks; give --num-ranks a multiple of it"
        )
    import deepspeed

    from trainer.expert_gate import take_gate
    from trainer.expert_parallel import share_experts

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    divide = take_gate if config.engine.expert_gate == "deepspeed" else share_experts
    return divide(model, sharing, data_first=bool(settings.get("use_data_before_expert_parallelism")))


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without the collective that it would compile."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    deepspeed = require("deepspeed", "deepspeed", "--engine deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        compatible = getattr(
            require("deepspeed.ops", "deepspeed", "--engine deepspeed"), "__compatible_ops__", {}
        )
        compatible["deepspeed_shm_comm"] = False
    return deepspeed


def _load_without_code(path: str, map_location: Any = None) -> Any:
    """Read one of DeepSpeed's files without running what a pickle may hide; DeepSpeed itself would run it."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # Python 3.11.0 to 3.11.3 pickle a member of an enumeration as a call of getattr.
    member = [(_enum_member, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address, *member]):
        return torch.load(path, map_location=map_location, weights_only=True)


def _enum_member(kind: Any, name: str) -> Enum:
    """What stands in for getattr while reading: it finds members of enumerations and nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise UnpicklingError(f"{name} of {kind!r} is asked for, which is no member of an enumeration")
    return kind[name]


def _gathered(parameters: list[torch.nn.Parameter]) -> Any:
    """ZeRO-3 keeps a share of every weight on each rank: whole ones exist inside this context only."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
