"""What runs a step, as plain data: the engine, its precision, its processes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeviz.errors import MoevizError
from trainer.optim_config import require_rule


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What runs a step."""

    engine: Literal["torch", "deepspeed"] = "torch"
    """Plain torch, or DeepSpeed with the ZeRO stage below."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed divides among ranks: nothing, optimizer state, gradients too, weights too."""
    deepspeed_config: Path | None = None
    """A JSON file of DeepSpeed's, for what has no flag here (monitors, offloading ...); what both decide must agree."""
    num_ranks: int | None = None
    """Processes that share each step, on one machine: one for each GPU, or any number on CPUs. Each takes a step of
    batch_size x gradient_accumulation_steps sequences. None: one, or as many as torchrun or deepspeed started."""
    expert_parallel: int = 1
    """Ranks that share the experts of each layer, through DeepSpeed: each holds num_experts / expert_parallel of them,
    and tokens travel there and back. A divisor of num_experts and of num_ranks. 1: each rank holds them all."""
    expert_gate: Literal["model", "deepspeed"] = "model"
    """Who decides where tokens go: the model's router, or the gate of DeepSpeed's MoE layer: softmax, and a capacity of
    a rank's whole micro-batch that ends with training. Checkpoints are of the model's router."""
    pipeline_stages: int = 1
    """Ranks that divide the layers among them, one behind the other, so that a model needs to fit into none of them. A
    step's micro-batches pass through in turn: accumulate as many as stages, or more. 1: each rank has all layers."""
    rank_timeout: float = 10.0
    """Minutes that a rank waits for another one before the run ends."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations; bf16 and fp16 keep fp32 master weights and an fp32 router."""
    auto_batch: bool = False
    """Choose the largest micro-batch that memory holds, at first and whenever it runs out. A step stays
    batch_size x gradient_accumulation_steps sequences."""
    gradient_checkpointing: bool = False
    """Keep one activation of each block and recompute the rest: less memory, about a third more time."""
    compile: bool = False
    """Let torch.compile make one program of the training step: faster after a minute or so of compiling. Evaluation
    stays as it is. On a CPU it needs a C++ compiler."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a CUDA device where there is one."""
    threads: int | None = None
    """CPU threads of one operation; another number rounds differently. None: OMP_NUM_THREADS, or physical cores."""
    keep_freed_memory: bool = True
    """On a CPU: tell glibc to keep the memory that a step frees for the next one, instead of giving it back to the
    system and taking it again, page by page. The same numbers, sooner. Without effect with another allocator or C
    library, or where MALLOC_... or GLIBC_TUNABLES already tell glibc what to do."""

    def __post_init__(self) -> None:
        threads, ranks, minutes = self.threads, self.num_ranks, self.rank_timeout
        require_rule(
            threads is None or threads >= 1, f"threads={threads}", "is below 1; leave it out for all cores"
        )
        require_rule(ranks is None or ranks >= 1, f"num_ranks={ranks}", "is below 1; leave it out for one")
        require_rule(minutes > 0, f"rank_timeout={minutes}", "is not positive; 10 minutes are usual")
        if self.deepspeed_config is not None and self.engine != "deepspeed":
            raise MoevizError(
                f"deepspeed_config={self.deepspeed_config} with engine={self.engine} would be read by nobody; add "
                "--engine deepspeed"
            )
        self._check_experts()
        self._check_stages()
        if self.auto_batch and self.engine == "deepspeed" and self.zero_stage == 3:
            raise MoevizError(
                "auto_batch cannot try a micro-batch on divided weights; use --zero-stage 2 or less, or a "
                "smaller --batch-size"
            )
        if self.compile and self.engine == "deepspeed":
            raise MoevizError(
                "compile needs a model that nobody takes apart, and DeepSpeed gathers weights and gradients by hooks; "
                "use --engine torch, or leave --compile out"
            )
        if self.engine == "deepspeed" and self.dtype == "bf16" and self.zero_stage == 0:
            raise MoevizError(
                "dtype=bf16 with zero_stage=0 starts Adam one step late in DeepSpeed 0.19; use zero_stage=1"
            )

    @property
    def has_deepspeed_experts(self) -> bool:
        """Whether the MoE layers that are trained are DeepSpeed's."""
        return self.expert_parallel > 1 or self.expert_gate == "deepspeed"

    def _check_experts(self) -> None:
        shared, told = self.expert_parallel, f"expert_parallel={self.expert_parallel}"
        require_rule(shared >= 1, told, "is below 1; leave it out for experts that every rank holds")
        if not self.has_deepspeed_experts:
            return
        if shared == 1:
            told = f"expert_gate={self.expert_gate}"
        if self.engine != "deepspeed":
            raise MoevizError(
                f"{told} with engine={self.engine}: only DeepSpeed has it; add --engine deepspeed"
            )
        if self.zero_stage == 3:
            raise MoevizError(
                f"{told} with zero_stage=3 would divide experts twice, which DeepSpeed refuses; use --zero-stage 2 "
                "or less"
            )
        if self.num_ranks is not None and self.num_ranks % shared:
            raise MoevizError(
                f"{told} does not divide num_ranks={self.num_ranks}; give --num-ranks a multiple of it"
            )
        if self.auto_batch:
            raise MoevizError(
                f"{told} with auto_batch: a rank cannot try sizes alone; leave --auto-batch out"
            )
        if self.dtype == "fp16" and self.zero_stage == 0:
            raise MoevizError(f"{told} with dtype=fp16 needs the loss scale of ZeRO; use --zero-stage 1 or 2")

    def _check_stages(self) -> None:
        stages, told = self.pipeline_stages, f"pipeline_stages={self.pipeline_stages}"
        require_rule(stages >= 1, told, "is below 1; leave it out for ranks that have all layers each")
        if stages == 1:
            return
        if self.engine != "torch":
            raise MoevizError(
                f"{told} with engine={self.engine}: only torch's pipeline is built in; use --engine torch"
            )
        if self.num_ranks is not None and self.num_ranks % stages:
            raise MoevizError(
                f"{told} does not divide num_ranks={self.num_ranks}; give --num-ranks a multiple of it"
            )
        if self.auto_batch:
            raise MoevizError(
                f"{told} with auto_batch: the stages must agree on the size; leave --auto-batch out, and lower "
                "--batch-size if it does not fit"
            )
        if self.compile:
            raise MoevizError(f"{told} with compile: a stage is no program of its own; leave --compile out")
