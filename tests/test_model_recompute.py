"""Recomputed blocks keep the experts that were chosen: a tie that falls the other way cannot change gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model.recompute
from model.config import ModelConfig
from model.lm import MoELanguageModel


class TopK(TorchDispatchMode):
    """Counts choices; with `flips`, a tie falls the other way each further time."""

    def __init__(self, flips: bool) -> None:
        super().__init__()
        self.calls, self._flips = 0, flips

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.topk.default:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        values, ids = func(*args, **(kwargs or {}))
        return (values, (ids + self._flips * (self.calls - 1)) % args[0].shape[-1])


def _gradients(recompute: bool, flips: bool) -> tuple[dict[str, Tensor], int]:
    torch.manual_seed(0)
    lm = MoELanguageModel(
        ModelConfig(vocab_size=19, dim=16, num_layers=1, num_heads=2, num_experts=4, expert_dim=8)
    )
    lm.train()
    if recompute:
        lm.gradient_checkpointing_enable()
    torch.nn.init.zeros_(lm.model.layers[0].mlp.gate.weight)  # type: ignore[union-attr, arg-type]
    ids_BS = torch.randint(19, (2, 7))
    with TopK(flips) as choices:
        lm(ids_BS, ids_BS.roll(-1, 1)).ce.backward()
    return {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}, choices.calls


def test_ties_cannot_flip_between_a_pass_and_its_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, calls = _gradients(recompute=False, flips=True)
    assert calls == 1
    kept, calls = _gradients(recompute=True, flips=True)
    assert calls == 1, "experts are not chosen again"
    assert all(torch.equal(grad, kept[name]) for name, grad in expected.items())
    forgets = torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
    monkeypatch.setattr(model.recompute, "_keep_choice", lambda *args, **kwargs: forgets)
    other, calls = _gradients(recompute=True, flips=True)
    assert calls == 2
    assert not all(torch.equal(grad, other[name]) for name, grad in expected.items())
