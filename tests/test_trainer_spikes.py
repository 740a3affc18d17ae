"""After a spike the run goes back to its last checkpoint and reads on behind the data of the spike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import StopAfter, corpus_cache, no_packing, toy

from moeviz.store import queries_series as queries
from moeviz.store.reader import open_run
from trainer import step as step_module
from trainer.config import TrainConfig
from trainer.spikes import is_spike
from trainer.standing import Standing
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]

pytestmark = pytest.mark.usefixtures("no_packing")

SPIKE = 5
"""Step's worth of data that spikes."""


def test_a_loss_six_deviations_up_is_a_spike_and_noise_is_not() -> None:
    recent = [3.0, 3.1, 2.9, 3.05, 2.95] * 4
    deviation = torch.tensor(recent).std(correction=0).item()
    assert is_spike(3.0 + 6.1 * deviation, recent, 6.0)
    assert not is_spike(3.0 + 5.9 * deviation, recent, 6.0)
    assert not is_spike(3.01, [3.0] * 20, 6.0), "a third of a percent above a flat loss"
    assert not is_spike(1.0, recent, 6.0), "down is no spike"


def spiking_at(monkeypatch: pytest.MonkeyPatch, places: set[int]) -> list[int]:
    """Make the loss of these steps' data 100 nats higher; returns where in the data each step read."""
    read: list[int] = []
    honest = step_module._forward_backward

    def forward_backward(parts: Any, step: int) -> Any:
        sums = honest(parts, step)
        place = step + parts.standing.data_offset
        read.append(place)
        if place in places:
            sums.loss = sums.loss + 100.0
        return sums

    monkeypatch.setattr(step_module, "_forward_backward", forward_backward)
    return read


def config_of(run: Path, **changes: Any) -> TrainConfig:
    guard = {"spike_rewind": True, "spike_window": 3, "spike_sd": 20.0, **changes.pop("guard", {})}
    return toy(
        run,
        max_steps=8,
        guard=guard,
        checkpoint={"save_every": 2, "keep_checkpoints": 9},
        evaluation={"eval_every": 0},
        **changes,
    )


@pytest.mark.parametrize("log_routing", [False, True])
def test_a_spike_is_passed_over_and_recorded(
    log_routing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = spiking_at(monkeypatch, {SPIKE})
    watcher = StopAfter()
    result = train(
        config_of(tmp_path / "run", log_routing=log_routing), progress=watcher, interrupt=watcher.interrupt
    )
    # Checkpoint 4, the spike at 5: steps 4, 5 ... go on with the data behind it.
    assert read == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert result.steps_done == 8
    assert len(result.losses) == 8
    assert max(result.losses) < 50
    assert any("going back to step-00000004" in note for note in watcher.notes)
    with open_run(tmp_path / "run") as store:
        losses = queries.scalars(store, ["loss"])
        events = queries.events(store)
    assert losses["step"].tolist() == list(range(8)), "each step once"
    assert losses["value"].tolist() == pytest.approx(list(result.losses))
    (rewind,) = events[events["kind"] == "rewind"]["detail"].tolist()
    assert (
        json.loads(rewind)["spike_step"] == SPIKE
        if isinstance(rewind, str)
        else rewind["spike_step"] == SPIKE
    )


def test_a_run_resumed_after_a_rewind_reads_on_where_the_other_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read = spiking_at(monkeypatch, {SPIKE})
    whole = train(config_of(tmp_path / "whole"))
    expected = list(read)
    read.clear()
    config = config_of(tmp_path / "run")
    stopper = StopAfter(7)
    first = train(config, progress=stopper, interrupt=stopper.interrupt)
    second = train(replace(config, run=None, resume=str(config.run)))
    assert first.losses + second.losses == whole.losses
    assert read == expected
    assert_same_weights(whole, second)


def assert_same_weights(one: TrainResult, other: TrainResult) -> None:
    assert one.checkpoint is not None
    assert other.checkpoint is not None
    first, second = (load_file(path / "model.safetensors") for path in (one.checkpoint, other.checkpoint))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_number_of_rewinds_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spiking_at(monkeypatch, {5, 6, 7})
    watcher = StopAfter()
    result = train(
        config_of(tmp_path / "run", guard={"max_rewinds": 1}), progress=watcher, interrupt=watcher.interrupt
    )
    assert result.steps_done == 8
    assert any("the run went back 1 times already, so it goes on" in note for note in watcher.notes)


def test_without_a_checkpoint_it_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spiking_at(monkeypatch, {SPIKE})
    config = replace(config_of(tmp_path / "run"), checkpoint=toy(tmp_path).checkpoint)
    watcher = StopAfter()
    assert train(config, progress=watcher, interrupt=watcher.interrupt).steps_done == 8
    assert any("there is no checkpoint yet" in note for note in watcher.notes)


def test_what_a_run_remembers_comes_back_to_the_bit(tmp_path: Path) -> None:
    standing = Standing(data_offset=3, micro_batch=2, recent_losses=[0.1 + 0.2, 1e-300, 3.0], best_loss=1 / 3)
    standing.save(tmp_path)
    assert Standing.load(tmp_path) == standing
    assert Standing.load(tmp_path / "nowhere") == Standing()
