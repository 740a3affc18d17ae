"""A budget thins samples until they fit, says so, comes back with room, and never touches loads or training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_models import VOCAB, Kept, batches, small_model, train

import moeviz
from moeviz.capture.budget import Budget, Volume, volume
from moeviz.capture.probe import attach
from moeviz.commands import show
from moeviz.errors import MoevizError
from moeviz.policy import EVERYTHING, SamplingPolicy
from moeviz.records import EventRecord, LoadRecord, TokenRoutingRecord
from moeviz.store.queries import events, sampling_level

SEQUENCES, PER_SEQUENCE = 16, 1000
"""Of a step; decisions of one of them."""


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Training:
    """Steps of a given length under a budget, with the volume that its sampling records."""

    def __init__(self, policy: SamplingPolicy, spent_bytes: float = 0.0) -> None:
        self.clock = Clock()
        self.budget = Budget(policy, spent_bytes, self.clock)
        self.policy = policy
        self.step = 0
        self.decisions: list[int] = []
        self.levels = [0]

    def run(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            sequences = 0
            if self.policy.routes_at(self.step):
                wanted = self.policy.route_sequences
                sequences = SEQUENCES if wanted == "all" else min(wanted, SEQUENCES)
            self.clock.now += seconds
            self.step += 1
            self.decisions.append(sequences * PER_SEQUENCE)
            recorded = Volume(sequences, self.decisions[-1], 2.0 * self.decisions[-1], 0.0)
            change = self.budget.end_step(SEQUENCES, recorded if sequences else None)
            if change is not None:
                self.policy = change.policy
                self.levels.append(change.level)


def limited(**limits: float) -> SamplingPolicy:
    return replace(EVERYTHING, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0.01, 0.3, 7.0])
@pytest.mark.parametrize("limit", [300.0, 2500.0, 40_000.0])
def test_the_rate_comes_within_its_limit_and_uses_more_than_a_quarter_of_it(
    seconds: float, limit: float
) -> None:
    training = Training(limited(max_decisions_per_second=limit))
    training.run(int(60 / seconds) + 10, seconds)
    settled = len(training.decisions)
    steps = max(int(600 / seconds), 300)
    training.run(steps, seconds)
    rate = sum(training.decisions[settled:]) / (steps * seconds)
    wanted = SEQUENCES * PER_SEQUENCE / seconds
    assert rate <= 1.05 * limit
    assert rate >= 0.25 * min(limit, wanted)
    assert len(training.levels) <= 2, "one change to the level that fits, and no swinging"


def test_a_limit_in_bytes_is_one_in_decisions_times_their_size() -> None:
    by_count, by_size = (
        Training(limited(**limit))
        for limit in ({"max_decisions_per_second": 5500.0}, {"max_megabytes_per_second": 0.011})
    )
    for training in (by_count, by_size):
        training.run(400, 0.1)
    assert by_count.levels == by_size.levels == [0, 5]


def test_slower_steps_bring_the_sampling_back_once_it_is_sure() -> None:
    training = Training(limited(max_decisions_per_second=20_000.0))
    training.run(100, 0.1)
    assert training.levels == [0, 3]
    training.run(100, 0.11)
    assert training.levels == [0, 3], "a tenth more room is none"
    training.run(300, 0.6)
    assert training.levels[1:] == [3, 2, 1]
    training.run(300, 4.0)
    assert training.levels[-1] == 0
    assert training.policy == limited(max_decisions_per_second=20_000.0)


def test_a_rate_about_the_limit_does_not_swing() -> None:
    training = Training(limited(max_decisions_per_second=80_000.0))
    for seconds in (0.19, 0.21) * 50:
        training.run(60, seconds)
    assert training.levels == [0, 1]


def test_the_budget_of_a_run_is_approached_in_halves_and_never_overrun_by_much() -> None:
    training = Training(limited(max_run_megabytes=1.0))
    training.run(20_000, 0.1)
    assert training.levels == sorted(set(training.levels))
    assert training.policy.route_every == 0, "spent: nothing more is recorded"
    assert 0.9e6 < 2 * sum(training.decisions) < 1.05e6
    half = training.decisions.index(SEQUENCES * PER_SEQUENCE // 2) * 2.0 * SEQUENCES * PER_SEQUENCE
    assert half == pytest.approx(0.5e6, rel=0.1), "the first half at the full rate"


def test_a_resumed_run_goes_on_with_what_is_left() -> None:
    training = Training(limited(max_run_megabytes=1.0), spent_bytes=0.8e6)
    training.run(1, 0.1)
    assert training.levels == [0, 2]


@pytest.mark.parametrize("sequences", [1, 5, 16])
@pytest.mark.parametrize("asked", [EVERYTHING, SamplingPolicy(route_every=3, route_sequences=4)])
def test_a_level_halves_the_volume(sequences: int, asked: SamplingPolicy) -> None:
    def rate(policy: SamplingPolicy) -> float:
        wanted = sequences if policy.route_sequences == "all" else policy.route_sequences
        return wanted / policy.route_every

    for level in range(8):
        share = rate(asked.thinned(level, sequences)) / rate(asked)
        assert 0.5 < share * 2**level <= 1
        assert asked.thinned(level, sequences).attention_every == asked.attention_every * 2**level
    assert asked.thinned(0, sequences) == asked


def test_nothing_is_thinned_without_a_limit() -> None:
    training = Training(EVERYTHING)
    training.run(1000, 1e-6)
    assert training.levels == [0]
    assert not training.budget.limited


@pytest.mark.parametrize(
    "name", ["max_decisions_per_second", "max_megabytes_per_second", "max_run_megabytes"]
)
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_limit_below_zero_is_refused(name: str, value: float) -> None:
    with pytest.raises(MoevizError, match=f"{name}=.*no limit; give 0 for none"):
        SamplingPolicy(**{name: value})  # type: ignore[arg-type]


def test_volume_is_counted_from_shapes() -> None:
    experts = torch.zeros(3, 2, 9, 4, dtype=torch.int16)
    tensors = {"ids/0": torch.zeros(2, 9), "maps/0": torch.zeros(2, 1, 5, 5), "latent/0/grid": torch.zeros(7)}
    found = volume(2, [experts, experts], tensors)
    assert found.decisions == 2 * 3 * 2 * 9 * 4
    assert found.route_bytes == pytest.approx(1.6 * found.decisions + 4 * 18)
    assert found.picture_bytes == pytest.approx(0.3 * 50 + 28)


def tight(**changes: Any) -> SamplingPolicy:
    """A limit that the first step exceeds; by bytes of the run, so that no clock decides."""
    return replace(EVERYTHING, max_run_megabytes=0.002, **changes)


def test_thinning_leaves_loads_complete_and_training_the_same_bits() -> None:
    steps, model, sink = list(batches(8, 2, padded=True)), small_model(), Kept()
    with attach(model, sink, policy=tight()) as probe:
        watched = train(model, steps, lambda loss: probe.step(loss=loss))
    assert watched.same_bits(train(small_model(), steps))
    loads, rows = sink.of(LoadRecord), sink.of(TokenRoutingRecord)
    assert [load.step for load in loads] == list(range(8))
    assert {load.tokens for load in loads} == {42}
    assert len(rows) < 8
    assert len(rows[0].seqs) == 6
    changes = [event for event in sink.of(EventRecord) if event.kind == "sampling"]
    assert changes
    levels = [change.detail["level"] for change in changes]
    assert levels == sorted(set(levels))
    assert {change.detail["cause"] for change in changes} == {"max_run_megabytes"}
    for row in rows[1:]:
        before = [change for change in changes if change.step < row.step]
        asked = before[-1].detail if before else {"route_sequences": 6, "route_every": 1}
        wanted = asked["route_sequences"]
        assert len(row.seqs) <= (6 if wanted == "all" else wanted)
        assert row.step % asked["route_every"] == 0


def test_the_run_tells_how_far_its_sampling_is_thinned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tmp_path / "run", small_model()
    with moeviz.watch(model, path, policy=tight(), pack=False) as probe:
        for _ in range(3):
            model(torch.ones(3, 9, dtype=torch.long) % VOCAB)
            probe.step(loss=1.0)
    with moeviz.open_run(path) as store:
        level = sampling_level(store)
        kinds = events(store)["kind"].tolist()
    assert level > 0
    assert "sampling" in kinds
    assert show.main([str(path)]) == 0
    assert f"sampling thinned to 1/{2**level:,}" in " ".join(capsys.readouterr().out.split())
    with moeviz.watch(model, path, policy=tight(), resume_from=3, pack=False) as probe:
        assert probe._budget.spent_bytes > 0
        probe.flush()
        with moeviz.open_run(path) as store:
            assert sampling_level(store) == 0, "a resumed run begins with what its policy asks for"
