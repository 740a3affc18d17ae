"""Micro-batches on their way through the stages, by torch's own pipeline (`torch.distributed.pipelining`).

1F1B (PipeDream, Harlap et al. 2018, https://arxiv.org/abs/1806.03377): once a stage is filled it takes one micro-batch
forward and one backward in turn, so that it keeps activations of as many as there are stages, not of all. With fewer
micro-batches than stages, all go forward first (GPipe, Huang et al. 2019, https://arxiv.org/abs/1811.06965). Both add
gradients in the order of the micro-batches, as a single process does: the same bits.

A stage in the middle has losses of its own, those of its routers. They enter backward where the stage hands its result
on: their gradient is added there, and nothing but activations travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from model.lm import ModelOutput
from trainer.engine import Pass
from trainer.pipeline_layout import Layout

Run = Callable[[Pass, Tensor | None], tuple[ModelOutput, Tensor]]
"""(micro-batch, what the stage before made of it) -> what the model says, and the loss as it enters backward."""


class Stage(nn.Module):
    """What torch's pipeline calls: one micro-batch through this process's blocks."""

    def __init__(self, run: Run, layout: Layout) -> None:
        super().__init__()
        self._run, self._layout = run, layout
        self.passes: Sequence[Pass] = ()

    def forward(self, *passed_on: Tensor, number: Tensor) -> Tensor:
        """`number`: which of `passes`, [1]."""
        output, loss = self._run(self.passes[int(number)], passed_on[0] if passed_on else None)
        if self._layout.is_last:
            return loss
        assert output.passed_on_BSD is not None
        return _WithLoss.apply(output.passed_on_BSD, loss) if loss.requires_grad else output.passed_on_BSD


class _WithLoss(torch.autograd.Function):
    """The identity of its first argument; in backward the second one is a loss of its own."""

    @staticmethod
    def forward(ctx: Any, hidden_BSD: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden_BSD.view_as(hidden_BSD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


class _HeldStage(PipelineStage):
    """Tells when the gradients of a micro-batch are there, before the next one's are added."""

    collect: Callable[[], None]

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        result = super().backward_one_chunk(*args, **kwargs)
        self.collect()
        return result


class Schedule:
    """One order of forwards and backwards for a number of micro-batches of one shape."""

    def __init__(
        self,
        run: Run,
        collect: Callable[[], None],
        layout: Layout,
        like_BSD: Tensor,
        num_passes: int,
        group: Any,
    ) -> None:
        """
        Args:
            run: computes one micro-batch.
            collect: called behind every backward.
            like_BSD: shape, type and device of what travels.
            num_passes: micro-batches of a step.
            group: the process group of the replica.
        """
        self._stage = Stage(run, layout)
        # Gradients travel for what needs them: the model decides, not the shapes told here.
        travels = torch.empty_like(like_BSD, device="meta", requires_grad=True)
        scalar = torch.empty((), device="meta", requires_grad=True)
        held = _HeldStage(
            self._stage,
            layout.stage,
            layout.num_stages,
            like_BSD.device,
            input_args=() if layout.is_first else (travels,),
            output_args=(scalar if layout.is_last else travels,),
            group=group,
        )
        held.collect = collect
        order = Schedule1F1B if num_passes >= layout.num_stages else ScheduleGPipe
        self._schedule = order(held, num_passes, loss_fn=lambda loss, number: loss, scale_grads=False)
        self._numbers = torch.arange(num_passes)
        self._layout = layout

    def __call__(self, passes: Sequence[Pass]) -> None:
        """All micro-batches forward and backward. Every rank of the replica must call it.

        Raises whatever `run` raises; torch's pipeline would tell it as text of its own.
        """
        self._stage.passes = passes
        target = self._numbers if self._layout.is_last else None
        try:
            self._schedule.step(number=self._numbers, target=target, return_outputs=False)
        except RuntimeError as error:
            if "failed to run forward" in str(error) and error.__cause__ is not None:
                raise error.__cause__ from None
            raise
        finally:
            self._stage.passes = ()


def hand_on(value_BSD: Tensor, layout: Layout, group: Any) -> None:
    """Send to the next stage, outside of a schedule."""
    dist.send(value_BSD.contiguous(), dst=layout.rank + 1, group=group)


def receive(like_BSD: Tensor, layout: Layout, group: Any) -> Tensor:
    """What the stage before sends, as large as `like_BSD`."""
    value_BSD = torch.empty_like(like_BSD)
    dist.recv(value_BSD, src=layout.rank - 1, group=group)
    return value_BSD
