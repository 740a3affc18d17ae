"""An error in any stage of recording leaves training as it is, bit by bit, and is said, counted and survived."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from capture_models import Kept, Trained, batches, small_model, train

from moeviz.capture.failures import PATIENCE
from moeviz.capture.probe import Probe, attach
from moeviz.policy import SamplingPolicy
from moeviz.records import EventRecord, LoadRecord, Record, ScalarRecord

EVERYTHING_OFTEN = SamplingPolicy(route_every=1, attention_every=1)
STEPS = PATIENCE + 4

STAGES = {
    "opening a micro-batch": "moeviz.capture.tap.read_call",
    "choosing rows": "moeviz.capture.samples.choose_rows",
    "reducing": "moeviz.capture.collect.sum_on_host",
    "stacking": "moeviz.capture.collect.stack",
    "cutting rows": "moeviz.capture.collect.cut_rows",
    "selecting attention": "moeviz.capture.tap.select",
    "drawing maps": "moeviz.capture.tap.block_maps",
    "copying loads to the host": "moeviz.capture.load_batch.HostCopy",
    "copying samples to the host": "moeviz.capture.samples.HostCopy",
    "building the load": "moeviz.capture.load_batch.LoadRecord",
    "building samples": "moeviz.capture.sample_batch.TokenRoutingRecord",
}


class Broken(RuntimeError):
    """What the stages raise."""


class Fuse:
    """Raises in place of a function while it is lit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
        module, _, name = target.rpartition(".")
        import importlib

        original = getattr(importlib.import_module(module), name)
        self.lit = False

        def either(*args: Any, **kwargs: Any) -> Any:
            if self.lit:
                raise Broken(target)
            return original(*args, **kwargs)

        monkeypatch.setattr(target, either)


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are taken in the step, as on an accelerator: the stages fail where they are named."""
    monkeypatch.setattr("moeviz.capture.backlog.ROOM_BYTES", 0)


def unwatched() -> Trained:
    return train(small_model(), list(batches(STEPS, 2)))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_keeps_failing_costs_training_nothing(
    stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fuse, model, sink = Fuse(monkeypatch, STAGES[stage]), small_model(), Kept()
    probe = attach(model, sink, policy=EVERYTHING_OFTEN)

    def after(loss: float) -> None:
        probe.step(loss=loss)
        fuse.lit = True

    with caplog.at_level(logging.WARNING):
        watched = train(model, list(batches(STEPS, 2)), after)
    assert watched.same_bits(unwatched())
    assert probe.failures.count >= PATIENCE
    assert not probe.attached, "after so many failing steps the probe detaches itself"
    kinds = [event.kind for event in sink.of(EventRecord)]
    assert kinds == ["recording_failed", "detached"]
    assert len(caplog.records) == 2, "said once, and once more at the end"
    assert 0 in [load.step for load in sink.of(LoadRecord)]


@pytest.mark.parametrize("stage", ["reducing", "opening a micro-batch"])
def test_a_step_that_failed_once_is_left_out_and_the_next_is_whole(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse, model, sink = Fuse(monkeypatch, STAGES[stage]), small_model(), Kept()
    probe = attach(model, sink, policy=EVERYTHING_OFTEN)

    def after(loss: float) -> None:
        fuse.lit = probe.next_step == 1
        probe.step()

    train(model, list(batches(4, 2)), after)
    loads = sink.of(LoadRecord)
    assert [load.step for load in loads] == [0, 1, 3]
    assert {load.tokens for load in loads} == {54}
    assert probe.attached


@pytest.mark.parametrize(
    "stage", ["choosing rows", "selecting attention", "drawing maps", "building samples"]
)
def test_failing_samples_cost_no_load(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse, model, sink = Fuse(monkeypatch, STAGES[stage]), small_model(), Kept()
    probe = attach(model, sink, policy=EVERYTHING_OFTEN)

    def after(loss: float) -> None:
        probe.step()
        fuse.lit = True

    train(model, list(batches(3, 2)), after)
    assert [(load.step, load.tokens) for load in sink.of(LoadRecord)] == [(0, 54), (1, 54), (2, 54)]
    assert probe.failures.count > 0


class Full(Kept):
    """A sink whose disk is full after the first step."""

    def write(self, record: Record) -> None:
        if getattr(record, "step", 0) > 0:
            raise OSError(28, "No space left on device")
        super().write(record)

    def flush(self) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_sink_that_fails_at_every_call_costs_training_nothing() -> None:
    model = small_model()
    probe = attach(model, Full(), policy=EVERYTHING_OFTEN)

    def after(loss: float) -> None:
        probe.step(loss=loss)
        probe.event("checkpoint", path="x")
        probe.scalars(3, {"val_loss": 1.0})
        probe.flush()

    watched = train(model, list(batches(STEPS, 2)), after)
    probe.close()
    assert watched.same_bits(unwatched())


def test_a_closing_callback_that_fails_still_closes_the_sink() -> None:
    sink = Kept()
    probe = attach(small_model(), sink)

    def fail(error: BaseException | None) -> None:
        raise Broken("no")

    probe.on_close = fail
    probe.close()
    assert sink.closed


def test_wrong_arguments_of_later_calls_never_reach_training(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    model, sink = small_model(), Kept()
    probe: Probe = attach(model, sink, policy=EVERYTHING_OFTEN)

    def after(loss: float) -> None:
        if probe.next_step > 0:
            probe.token_loss(torch.zeros(2, 2))
            probe.scalars(1, {"bad": "text"})  # type: ignore[dict-item]
        probe.step(loss="nonsense" if probe.next_step > 0 else loss)  # type: ignore[arg-type]

    train(model, list(batches(3, 1)), after)
    assert [load.step for load in sink.of(LoadRecord)] == [0]
    assert probe.failures.count == 6


def test_an_error_of_the_training_loop_passes_through_the_probe() -> None:
    sink = Kept()
    with pytest.raises(KeyError), attach(small_model(), sink):
        raise KeyError("theirs")
    assert sink.closed


@pytest.mark.parametrize("cause", ["an error", "a tensor written to"])
def test_sums_that_fail_while_they_wait_cost_one_step_and_nothing_waits_from_then_on(
    cause: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("moeviz.capture.backlog.ROOM_BYTES", 1e6)
    fuse, model, sink = Fuse(monkeypatch, "moeviz.capture.backlog.sum_on_host"), small_model(), Kept()
    probe = attach(model, sink)

    def after(loss: float) -> None:
        piles = probe._tap.collector.step.piles
        if probe.next_step == 2:
            assert piles, "readings wait from the second step on"
            if cause == "an error":
                fuse.lit = True
            else:
                piles[0].readings[0].weights_TK.add_(0.0)
        if probe.next_step > 2:
            assert not piles
        probe.step(loss=loss)

    with caplog.at_level(logging.WARNING):
        watched = train(model, list(batches(STEPS, 2)), after)
    assert watched.same_bits(unwatched())
    assert [load.step for load in sink.of(LoadRecord)] == [0, 1, *range(3, STEPS)]
    assert [scalars.step for scalars in sink.of(ScalarRecord)] == [*range(STEPS)]
    assert [event.kind for event in sink.of(EventRecord)] == ["recording_failed"]
    assert len(caplog.records) == 1
    assert probe.attached
