"""One optimizer step: its micro-batches, the update, then the balance bias.

Everything random or accumulated in it begins anew where memory runs out, so a step that succeeded at the second
try is the step that a smaller micro-batch would have taken at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.lm import ModelOutput
from trainer.assembly import Assembly
from trainer.balance import move_bias, training_loss
from trainer.data_batches import Batch
from trainer.engine import Pass, Update
from trainer.gradients import expert_grad_norms
from trainer.micro_batches import chance_kept, cut, is_out_of_memory, smaller


@dataclass(frozen=True, kw_only=True)
class StepTaken:
    """The outcome of one optimizer step."""

    loss: float
    """Cross-entropy, nats per token, mean over micro-batches and ranks."""
    update: Update
    learning_rate: float
    counts_LE: Tensor
    """Assignments of all micro-batches and ranks."""
    z_L: Tensor
    """Mean squared logsumexp of the router's logits; of this rank alone unless the run acts on alerts."""
    expert_grads: dict[str, float]
    """Gradient norm of each expert, in the steps that record them."""
    side_losses: dict[str, float]
    """contrastive_loss and mtp_loss, nats, of a model with such heads; mean over micro-batches and ranks."""
    seconds: float


@dataclass(kw_only=True)
class StepSums:
    """What the micro-batches of a step add up to, on one rank; of a part of the model the rest is zero."""

    loss: Tensor
    counts_LE: Tensor
    z_L: Tensor
    side_losses: dict[str, Tensor] = field(default_factory=dict)

    def add(self, output: ModelOutput, share: float) -> None:
        """Add a micro-batch that is this part of the step."""
        assert output.ce is not None
        self.loss = self.loss + output.ce.detach() * share
        self.counts_LE = self.counts_LE + output.expert_counts_LE
        self.z_L = self.z_L + output.aux["z"].detach() * share
        for name in sorted(output.aux.keys() & {"contrastive", "mtp"}):
            before = self.side_losses.get(f"{name}_loss", 0.0)
            self.side_losses[f"{name}_loss"] = before + output.aux[name].detach() * share


def take_step(parts: Assembly, step: int) -> StepTaken:
    """Take step number `step`. Nothing but the loss scale moves where loss or gradient is not a number."""
    begin = time.perf_counter()
    engine, config = parts.engine, parts.config
    sums = _forward_backward(parts, step)
    loss = float(engine.sum_ranks(sums.loss)) / engine.num_replicas
    counts_LE = engine.sum_ranks(sums.counts_LE)
    learning_rate = parts.learning_rate((step + 1) * parts.tokens_per_step) * parts.standing.rate_factor
    every = config.optim.expert_grad_every
    expert_grads = expert_grad_norms(engine) if every and step % every == 0 else {}
    if math.isfinite(loss):
        update = engine.step(learning_rate)
    else:
        engine.discard()
        update = Update(math.nan, False)
    if update.taken:
        move_bias(engine.module, counts_LE, parts.standing.balance(config.balance))
    return StepTaken(
        loss=loss,
        update=update,
        learning_rate=learning_rate,
        counts_LE=counts_LE,
        z_L=engine.sum_ranks(sums.z_L) / engine.num_replicas if parts.judge else sums.z_L,
        expert_grads=expert_grads,
        side_losses={
            name: float(engine.sum_ranks(value)) / engine.num_replicas
            for name, value in sums.side_losses.items()
        },
        seconds=time.perf_counter() - begin,
    )


def _forward_backward(parts: Assembly, step: int) -> StepSums:
    """All micro-batches of a step, again from the first one with a smaller size where memory runs out."""
    while True:
        size = parts.standing.micro_batch or parts.config.data.batch_size
        try:
            with chance_kept(parts.engine):
                return _accumulate(parts, step, size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            size = smaller(size, parts.config, parts.engine, step)
        # Behind the handler: until then its traceback holds the tensors that did not fit.
        parts.engine.discard()
        if parts.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        parts.recorder.discard()
        parts.standing.micro_batch = size
        parts.recorder.event("micro_batch", step=step, sequences=size, reason="out of memory")


def _accumulate(parts: Assembly, step: int, size: int) -> StepSums:
    engine, data = parts.engine, parts.text.batches
    micro_batches = cut(
        (
            data.batch(step + parts.standing.data_offset, micro, engine.replica, engine.num_replicas)
            for micro in range(parts.config.data.gradient_accumulation_steps)
        ),
        size,
    )
    sums = StepSums(
        loss=torch.zeros((), device=engine.device),
        counts_LE=torch.zeros((), dtype=torch.int64, device=engine.device),
        z_L=torch.zeros((), device=engine.device),
    )
    rows = sum(len(batch.domains) for batch in micro_batches)
    engine.accumulate([_pass(parts, batch, sums, len(batch.domains) / rows) for batch in micro_batches])
    return sums


def _pass(parts: Assembly, batch: Batch, sums: StepSums, share: float) -> Pass:
    """One micro-batch, which adds to `sums` and tells the recorder of itself."""

    def begin() -> Mapping[str, Tensor]:
        parts.recorder.label(batch.domains)
        return _losses_of_a_step(parts, batch, sums)

    def loss_of(output: ModelOutput) -> Tensor:
        return training_loss(output, parts.standing.balance(parts.config.balance))

    def end(output: ModelOutput) -> None:
        assert output.ce is not None
        if output.token_loss_BS is not None:
            parts.recorder.token_loss(output.token_loss_BS)
        sums.add(output, share)

    return Pass(
        input_ids_BS=torch.from_numpy(batch.input_ids_BS).to(parts.engine.device),
        labels_BS=torch.from_numpy(batch.labels_BS).to(parts.engine.device),
        share=share,
        begin=begin,
        loss_of=loss_of,
        end=end,
    )


def _losses_of_a_step(parts: Assembly, batch: Batch, sums: StepSums) -> dict[str, Tensor]:
    """What the model needs for losses that look beyond a micro-batch, or at domains."""
    more: dict[str, Tensor] = {}
    model, engine = parts.engine.module.config, parts.engine
    if model.router.balance_scope == "global" and sums.counts_LE.ndim:
        more["counts_so_far_LE"] = engine.sum_replicas(sums.counts_LE)
    if model.heads.contrastive_width:
        names = parts.text.batches.domains
        labels = [names.index(domain) for domain in batch.domains]
        more["sequence_labels_B"] = torch.tensor(labels, device=engine.device)
    return more
