"""A model without experts trains, evaluates and leaves a run that readers open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from model.presets import PRESETS
from moeviz.store import queries
from moeviz.store.reader import open_run
from trainer.config import EvaluationConfig, InputConfig, TrainConfig
from trainer.train import train


def test_a_dense_model_records_its_losses_where_routing_was_asked_for(tmp_path: Path) -> None:
    model = replace(PRESETS["gpt2-tiny"](), dim=32, num_layers=2, first_dense_layers=2, dense_ffn_dim=64)
    config = TrainConfig(
        run=tmp_path / "run",
        max_steps=3,
        log_routing=True,
        model=model,
        data=InputConfig(train_data="generated", bytes_per_domain=20_000, seq_len=32, batch_size=2),
        evaluation=EvaluationConfig(eval_every=2, eval_sequences=1),
    )
    result = train(config)
    assert result.steps_done == 3
    with open_run(result.run) as store:
        losses = queries.scalars(store, ["loss"])
        assert losses["value"].tolist() == list(result.losses)
