"""Tiny models to watch, a sink that keeps what it gets, and a training loop to hold probes against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.expert_config import RouterConfig
from model.lm import MoELanguageModel
from moeviz.records import Record

VOCAB = 61
torch.set_num_threads(1)  # threads of a tiny product only wait for each other
_R = TypeVar("_R")


class Kept:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.closed = False

    def write(self, record: Record) -> None:
        self.records.append(record)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def of(self, kind: type[_R]) -> list[_R]:
        return [record for record in self.records if isinstance(record, kind)]


def small_model(**changes: Any) -> MoELanguageModel:
    """Three blocks (the first one dense), E=6, K=2, four heads on two key heads; weights large enough to tell apart."""
    config: dict[str, Any] = {
        "vocab_size": VOCAB,
        "dim": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 64,
        "num_experts": 6,
        "top_k": 2,
        "expert_dim": 16,
        "first_dense_layers": 1,
        "init_std": 0.2,
    }
    torch.manual_seed(3)
    model = MoELanguageModel(ModelConfig(**{**config, **changes})).train()
    for buffer in model.buffers():
        buffer.normal_(std=0.1)
    return model


BIASED = RouterConfig(score="sigmoid", selection_bias=True)


def mixtral(**changes: Any) -> nn.Module:
    """A Hugging Face Mixtral: three MoE blocks, E=6, K=2."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(4)
    return MixtralForCausalLM(MixtralConfig(**{**sizes, **changes})).train()


class Batch(NamedTuple):
    ids_BS: Tensor
    mask_BS: Tensor | None


def batches(steps: int, micro_batches: int, *, padded: bool = False, seed: int = 7) -> Iterator[list[Batch]]:
    """Steps of micro-batches [3, 9]; with `padded`, rows of different lengths, padding left and right."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        step = []
        for _ in range(micro_batches):
            mask_BS = torch.ones(3, 9, dtype=torch.long) if padded else None
            if mask_BS is not None:
                mask_BS[0, 5:] = 0
                mask_BS[1, :2] = 0
            step.append(Batch(torch.randint(1, VOCAB, (3, 9), generator=generator), mask_BS))
        yield step


class Trained(NamedTuple):
    """What a short training left behind, to compare bit by bit."""

    losses: list[float]
    weights: list[Tensor]
    gradients: list[Tensor]

    def same_bits(self, other: Trained) -> bool:
        return self.losses == other.losses and all(
            torch.equal(mine, its)
            for mine, its in zip(self.weights + self.gradients, other.weights + other.gradients, strict=True)
        )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Next-token loss of moeviz's own or of a Hugging Face model, with an auxiliary loss for the router."""
    if isinstance(model, MoELanguageModel):
        labels_BS = batch.ids_BS.roll(-1, dims=1)
        output = model(batch.ids_BS, labels_BS, attention_mask_BS=batch.mask_BS)
        return output.ce + 0.1 * output.aux["balance"].sum()
    output = model(input_ids=batch.ids_BS, attention_mask=batch.mask_BS, labels=batch.ids_BS, use_cache=False)
    return output.loss


def train(
    model: nn.Module,
    steps: Sequence[list[Batch]],
    after_step: Callable[[float], None] = lambda loss: None,
    run: Callable[..., Any] | None = None,
) -> Trained:
    """A plain training loop; `run(model, batch)` gives the loss of a micro-batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for batch in step:
            loss = (run or loss_of)(model, batch)
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        after_step(losses[-1])
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return Trained(losses, weights, [p.grad.clone() for p in model.parameters() if p.grad is not None])
