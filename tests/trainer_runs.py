"""A run that takes a second: a toy on generated text, and ways to stop it at a chosen step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from trainer.config import (
    BalanceConfig,
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    InputConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.interrupt import Interrupt
from trainer.progress import Silent, StepReport

TOY = TrainConfig(
    preset="toy",
    max_steps=6,
    model=ModelConfig(
        vocab_size=280,
        dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=16,
        num_experts=4,
        top_k=2,
        expert_dim=16,
    ),
    data=InputConfig(
        train_data="generated",
        bytes_per_domain=12_000,
        seq_len=16,
        batch_size=2,
        gradient_accumulation_steps=2,
    ),
    optim=OptimConfig(learning_rate=1e-2),
    schedule=ScheduleConfig(warmup_steps=2),
    balance=BalanceConfig(balance="bias", bias_step=1e-2),
    evaluation=EvaluationConfig(eval_every=3, eval_sequences=2),
    checkpoint=CheckpointConfig(save_every=0),
    engine=EngineConfig(device="cpu", threads=1),
)


def toy(run: Path, **changes: Any) -> TrainConfig:
    """TOY in a folder; a change named like a part (`engine`, `data`...) is a dict of that part's changes."""
    for name, change in changes.items():
        if isinstance(change, dict):
            changes[name] = replace(getattr(TOY, name), **change)
    return replace(TOY, run=run, **changes)


class StopAfter(Silent):
    """Asks to stop once `steps` steps of the run are done, as Ctrl-C would; keeps what it is told."""

    def __init__(self, steps: int = 10**9) -> None:
        self.interrupt = Interrupt()
        self.reports: list[StepReport] = []
        self.notes: list[str] = []
        self._steps = steps

    def step(self, report: StepReport) -> None:
        self.reports.append(report)
        self.interrupt.requested = report.step + 1 >= self._steps

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module", autouse=True)
def corpus_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache of corpus and tokens for a test file, and one thread."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("MOEVIZ_CACHE", str(cache))
        yield cache
    torch.set_num_threads(threads)


@pytest.fixture
def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the short processes that write views and pack: their subject is tested with the store."""
    monkeypatch.setattr("moeviz.store.run._in_process", lambda module, *args: True)
