"""What runs a step: the few verbs that the training loop knows, the same for plain torch and for DeepSpeed.

    engine.accumulate(passes)                      forward and backward of every micro-batch
    gradient norm, taken = engine.step(learning rate)

Most engines take one micro-batch after the other, by `one_by_one`; a pipeline has several under way. An engine owns
the model's placement and precision, the gradients and the optimizer. It knows nothing of data, schedules, balancing or
logging.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.lm import ModelOutput, MoELanguageModel
from moeviz.errors import MoevizError
from trainer.config import TrainConfig


class Update(NamedTuple):
    """What became of a step."""

    grad_norm: float
    """Norm of the whole gradient before clipping."""
    taken: bool
    """Whether the weights moved: not where that norm is not a number."""
    scale_lowered: bool = False
    """fp16: the gradient outgrew the loss scale, which is lower now; nothing is wrong with the run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One micro-batch of a step, and who wants to know of it."""

    input_ids_BS: Tensor
    labels_BS: Tensor
    share: float
    """Its part of the step; those of a step's micro-batches sum to 1."""
    begin: Callable[[], Mapping[str, Tensor]]
    """Called right before its forward: what else the model is handed."""
    loss_of: Callable[[ModelOutput], Tensor]
    """Mean over the micro-batch."""
    end: Callable[[ModelOutput], None]
    """Called once behind its forward."""


class Engine(Protocol):
    """One model being trained, on one rank."""

    module: MoELanguageModel
    """The bare model: what probes attach to, and what evaluation and checkpoints read."""
    device: torch.device
    rank: int
    world_size: int
    """Processes of the run."""
    replica: int
    """Which part of each step's sequences this rank reads."""
    num_replicas: int
    """Parts of a step; as many as ranks, unless several ranks hold a model together."""

    def forward(self, input_ids_BS: Tensor, labels_BS: Tensor, **more: Any) -> ModelOutput:
        """Run one micro-batch with gradients on; `more` is handed to the model."""

    def backward(self, loss: Tensor, *, share: float = 1.0, last: bool = True) -> None:
        """Add one micro-batch's gradients.

        Args:
            loss: mean over the micro-batch.
            share: its part of the step; those of a step's micro-batches sum to 1.
            last: whether `step` comes next.
        """

    def accumulate(self, passes: Sequence[Pass]) -> None:
        """Forward and backward of all micro-batches of a step, in order; `step` comes next."""

    def step(self, learning_rate: float) -> Update:
        """Clip, update the weights, clear the gradients. Without an update where the gradient is not finite."""

    def discard(self) -> None:
        """Forget the gradients of the step in progress: it begins anew, or is not taken."""

    def gradient(self, name: str) -> Tensor | None:
        """The step's gradient of a parameter, whole, in fp32, before clipping. Every rank must call it."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, the module has the weights that are evaluated and exported, where training uses others."""

    def replace_rows(self, name: str, rows: list[int], values: Tensor) -> None:
        """Set rows of a parameter between two steps and forget their momentum. Every rank must call it."""

    def sum_ranks(self, values: Tensor) -> Tensor:
        """The element-wise sum of a tensor over all ranks; the tensor itself on a single rank."""

    def sum_replicas(self, values: Tensor) -> Tensor:
        """The same over the ranks that compute what this one computes, of other sequences: in the middle of a pass."""

    def weights(self) -> dict[str, Tensor]:
        """Whole weights and persistent buffers by name, on the CPU, as they are evaluated. Every rank must call it.

        Where several ranks hold a model together, only the first one is told all of it.
        """

    def save_state(self, folder: Path) -> None:
        """Write what resuming needs beside `weights()`, each rank its own files. Every rank must call it."""

    def load_state(self, weights: dict[str, Tensor], folder: Path) -> None:
        """The inverse of `weights` and `save_state`."""

    def destroy(self) -> None:
        """Release what outlives the object; the module stays usable."""


def one_by_one(engine: Engine, passes: Sequence[Pass]) -> None:
    """Each micro-batch forward and backward before the next one."""
    for index, each in enumerate(passes):
        output = engine.forward(each.input_ids_BS, each.labels_BS, **each.begin())
        engine.backward(each.loss_of(output), share=each.share, last=index == len(passes) - 1)
        each.end(output)


def build_engine(model: MoELanguageModel, config: TrainConfig) -> Engine:
    """The engine that `config.engine` names, with the model placed on its device in its precision."""
    if config.engine.engine == "deepspeed":
        from trainer.engine_deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config)
    if config.engine.pipeline_stages > 1:
        from trainer.engine_pipeline import PipelineEngine

        return PipelineEngine(model, config)
    from trainer.engine_torch import TorchEngine

    return TorchEngine(model, config)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, or a torch device name -> a device that exists; without a number, the one of this rank.

    Raises:
        MoevizError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MoevizError(f"device={name} is no device torch knows; give cpu, cuda or cuda:N") from error
    if name == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MoevizError(
            f"device={name} means {device} on rank {local_rank}, but torch sees {torch.cuda.device_count()} CUDA "
            "devices; use cpu or auto, or as many ranks as devices"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives of objects go through the current one
    return device


def set_threads(threads: int | None) -> int:
    """Choose the number of CPU threads of one operation, and return it.

    Without a value OMP_NUM_THREADS decides, else one thread for each physical core this process may use (two
    hyper-threads of one core compete for the same multipliers), or fewer where a container grants less time. Ranks of
    one machine share its cores.
    """
    if threads is None and "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(min(physical_cores(), cpu_quota()) // sharing, 1))
    return torch.get_num_threads()


def physical_cores() -> int:
    """Physical cores among the CPUs this process may run on, at least 1."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores: set[str] = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return max(len(cores), 1)


def cpu_quota(group: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that a container is granted in time (`docker run --cpus`), at least 1; a large number without a limit."""
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us"):
        file = group / name
        if file.is_file():
            quota, *rest = file.read_text().split()
            period = rest[0] if rest else file.with_name("cpu.cfs_period_us").read_text()
            return max(int(quota) // int(period), 1) if quota.isdecimal() else 1 << 16
    return 1 << 16
