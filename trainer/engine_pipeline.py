"""Plain torch with the layers divided among processes that stand behind each other.

The same numbers as one process: micro-batches add up in the same order, norms are taken over all parameters in theirs,
and checkpoints are those of the whole model, written by the first rank. Only a matrix that two stages use, a tied
embedding, adds its two gradients in another order. Replicas of the whole chain average their gradients as plain torch
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from model.lm import ModelOutput, MoELanguageModel
from trainer.config import TrainConfig
from trainer.engine import Pass, choose_device
from trainer.engine_torch import STATE_FILE, TorchEngine
from trainer.optim import parameter_groups
from trainer.pipeline_layout import Layout, check_stages, is_here, keep_stage, shares_embedding, stages_of
from trainer.pipeline_schedule import Schedule, hand_on, receive
from trainer.pipeline_state import (
    Names,
    joined,
    merged,
    on_cpu,
    optimizer_part,
    part_of_optimizer,
    whole_optimizer,
)
from trainer.process_group import average_gradients, join_ranks, launched_ranks, local_rank

_EMBEDDING = "model.embed_tokens.weight"


class PipelineEngine(TorchEngine):
    """One stage of one replica."""

    def __init__(self, model: MoELanguageModel, config: TrainConfig) -> None:
        """
        Raises:
            MoevizError: the ranks or the layers cannot be shared out among the stages.
        """
        ranks = launched_ranks()
        Layout.of(0, ranks, config.engine.pipeline_stages)
        join_ranks(config.engine.rank_timeout)
        self.layout = Layout.of(dist.get_rank(), ranks, config.engine.pipeline_stages)
        check_stages(model, self.layout.num_stages)
        self._groups = _Groups(self.layout, shares_embedding(model.config), config.engine.rank_timeout)
        keep_stage(model, self.layout, choose_device(config.engine.device, local_rank()))
        super().__init__(model, config)
        self.replica, self.num_replicas = self.layout.replica, self.layout.num_replicas
        self._muon, self._decay = config.optim.optimizer == "muon", config.optim.weight_decay
        self._schedules: dict[tuple[int, ...], Schedule] = {}
        self._in_schedule = False
        moe = [layer for layer in range(model.config.num_layers) if model.config.is_moe(layer)]
        self._own_rows = [row for row, layer in enumerate(moe) if layer in model.model.span]
        self.module.register_forward_pre_hook(self._from_before, with_kwargs=True)
        self.module.register_forward_hook(self._to_behind)

    def _placed(self, model: MoELanguageModel) -> MoELanguageModel:
        return model  # what is held here is on its device already

    def forward(self, input_ids_BS: Tensor, labels_BS: Tensor, **more: Any) -> ModelOutput:
        """Without gradients: through all stages; losses of tokens are told to every rank of the replica."""
        assert not torch.is_grad_enabled(), "a pipeline trains by `accumulate`"
        output = self.module(input_ids_BS, labels_BS, **more)
        shape = labels_BS.shape
        token_loss_BS = (
            output.token_loss_BS if self.layout.is_last else torch.empty(shape, device=self.device)
        )
        right_BS = (
            output.correct_BS.to(torch.uint8)
            if self.layout.is_last
            else torch.empty(shape, dtype=torch.uint8, device=self.device)
        )
        last = self.layout.chain(self.replica)[-1]
        for told in (token_loss_BS, right_BS):
            dist.broadcast(told, src=last, group=self._groups.chain)
        return output._replace(token_loss_BS=token_loss_BS, correct_BS=right_BS.bool())

    def accumulate(self, passes: Sequence[Pass]) -> None:
        key = (len(passes), *passes[0].input_ids_BS.shape)
        if key not in self._schedules:
            like_BSD = self._hidden_like(passes[0].input_ids_BS)
            self._schedules[key] = Schedule(
                self._run,
                self._masters.collect_gradients,
                self.layout,
                like_BSD,
                len(passes),
                self._groups.chain,
            )
        self._in_schedule = True
        try:
            self._schedules[key](passes)
        finally:
            self._in_schedule = False
        weights = [weight for _, weight in self._masters.named()]
        if self.num_replicas > 1:
            average_gradients(weights, self._groups.alike)
        self._add_shared_gradients()

    def _run(self, each: Pass, passed_on_BSD: Tensor | None) -> tuple[ModelOutput, Tensor]:
        """One micro-batch through the blocks of this stage, told as if it were that of the whole model."""
        more = dict(each.begin())
        if "counts_so_far_LE" in more:
            more["counts_so_far_LE"] = more["counts_so_far_LE"][self._own_rows]
        output = self.module(each.input_ids_BS, each.labels_BS, passed_on_BSD=passed_on_BSD, **more)
        output = self._as_of_all_layers(output)
        each.end(output)
        return output, each.loss_of(output) * (each.share * self._scale.value)

    def _as_of_all_layers(self, output: ModelOutput) -> ModelOutput:
        """Zero for what other stages know: sums over the ranks of a replica are then those of the model."""
        zero = torch.zeros((), device=self.device)
        config = self.module.config
        aux = {name: self._spread(value) for name, value in output.aux.items() if value.ndim}
        for name, there in (("contrastive", config.heads.contrastive_width), ("mtp", config.heads.mtp_depth)):
            if there:
                aux[name] = output.aux.get(name, zero)
        return output._replace(
            ce=zero if output.ce is None else output.ce,
            aux=aux,
            expert_counts_LE=self._spread(output.expert_counts_LE),
        )

    def _spread(self, own: Tensor) -> Tensor:
        """Rows of this stage's MoE layers among those of all."""
        rows = torch.tensor(self._own_rows, dtype=torch.int64, device=own.device)
        whole = own.new_zeros(self.module.config.num_moe_layers, *own.shape[1:])
        return whole.index_copy(0, rows, own)

    def _hidden_like(self, input_ids_BS: Tensor) -> Tensor:
        """A tensor like those that travel between stages."""
        width = self.module.config.dim
        return torch.empty(*input_ids_BS.shape, width, dtype=self.module.dtype, device=self.device)

    def _from_before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluation: a later stage begins with what the one before sends."""
        if self._in_schedule or self.layout.is_first:
            return None
        ids_BS = args[0] if args else kwargs["input_ids_BS"]
        received = receive(self._hidden_like(ids_BS), self.layout, self._groups.chain)
        return args, {**kwargs, "passed_on_BSD": received}

    def _to_behind(self, module: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> None:
        if not self._in_schedule and not self.layout.is_last:
            assert output.passed_on_BSD is not None
            hand_on(output.passed_on_BSD, self.layout, self._groups.chain)

    def _add_shared_gradients(self) -> None:
        """The embedding that the last stage uses too: both go on with the sum."""
        if self._groups.ends is None:
            return
        weight = dict(self._masters.named())[_EMBEDDING]
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad, group=self._groups.ends)

    def _clip(self, weights: Sequence[nn.Parameter]) -> float:
        own = {name: weight.grad for name, weight in self._masters.named() if weight.grad is not None}
        names = [name for name, _ in self.module.named_parameters()]
        told = torch.zeros(2, len(names), device=self.device)
        for number, name in enumerate(names):
            if name in own and self._counts(name):
                told[:, number] = torch.stack([torch.ones((), device=self.device), own[name].norm()])
        dist.all_reduce(told, group=self._groups.chain)
        norm = torch.linalg.vector_norm(told[1][told[0] > 0])
        torch.nn.utils.clip_grads_with_norm_(weights, self._max_norm, norm)
        return float(norm)

    def _counts(self, name: str) -> bool:
        """Whether a parameter is told of by this stage, where two hold it."""
        return self._holder(name) == self.layout.stage

    def _holder(self, name: str) -> int:
        return stages_of(name, self.module.config, self.layout.num_stages)[0]

    def gradient(self, name: str) -> Tensor | None:
        source = self.layout.chain(self.replica)[self._holder(name)]
        mine = super().gradient(name) if self.rank == source else None
        there = torch.tensor(float(mine is not None), device=self.device)
        dist.broadcast(there, src=source, group=self._groups.chain)
        if not there:
            return None
        if mine is None:
            mine = torch.empty(self.module.get_parameter(name).shape, device=self.device)
        dist.broadcast(mine, src=source, group=self._groups.chain)
        return mine

    def sum_replicas(self, values: Tensor) -> Tensor:
        if self.num_replicas == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self._groups.alike)
        return total

    def weights(self) -> dict[str, Tensor]:
        mine = super().weights()
        return merged(joined(mine, self.layout)) or mine

    def save_state(self, folder: Path) -> None:
        state = self._state()
        part = {**on_cpu(state), "optimizer": optimizer_part(state["optimizer"], self._group_names(True))}
        parts = joined(part, self.layout)
        if not parts:
            return
        whole = {
            "optimizer": whole_optimizer([each["optimizer"] for each in parts], self._group_names(False)),
            "masters": merged([each["masters"] for each in parts]),
            "scale": part["scale"],
            "trained": merged([each["trained"] for each in parts]),
        }
        torch.save(whole, folder / STATE_FILE)

    def load_state(self, weights: dict[str, Tensor], folder: Path) -> None:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
        optimizer = part_of_optimizer(state["optimizer"], self._group_names(False), self._group_names(True))
        here = {name: value for name, value in self.module.state_dict().items() if is_here(value)}
        self.module.load_state_dict({name: weights[name] for name in here}, strict=False)
        self._load({**state, "optimizer": optimizer})

    def _group_names(self, own: bool) -> Names:
        """Names in the groups of this stage's optimizer, or of that of the whole model."""
        named = dict(self._masters.named() if own else self.module.named_parameters())
        names = {id(weight): name for name, weight in named.items()}
        groups = parameter_groups(named.items(), self._decay, muon=self._muon)
        return [[names[id(weight)] for weight in group["params"]] for group in groups]


class _Groups:
    """Process groups; every rank makes all of them, in the same order."""

    def __init__(self, layout: Layout, ends: bool, timeout_minutes: float) -> None:
        """`ends`: whether the first and the last stage have a parameter in common."""
        timeout = timedelta(minutes=timeout_minutes)
        self.chain: Any = None
        """This replica."""
        self.alike: Any = None
        """This stage in all replicas."""
        self.ends: Any = None
        for replica in range(layout.num_replicas):
            chain = layout.chain(replica)
            made = dist.new_group(chain, timeout=timeout)
            pair = dist.new_group([chain[0], chain[-1]], timeout=timeout) if ends else None
            if replica == layout.replica:
                self.chain = made
                self.ends = pair if layout.is_first or layout.is_last else None
        for stage in range(layout.num_stages):
            made = dist.new_group(layout.alike(stage), timeout=timeout)
            if stage == layout.stage:
                self.alike = made
