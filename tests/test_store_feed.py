"""The feed: one incremental look per poll, the right word for how a run fares, and a thread that survives."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from store_runs import EXPERTS, L, Step, alert, event, new_run, write_steps

from moeviz.errors import RunNotFoundError
from moeviz.live import Feed
from moeviz.records import ModelInfo, ScalarRecord
from moeviz.store.feed import RunFeed
from moeviz.store.load_ring import EMA_STEPS
from moeviz.store.pack import pack_run
from moeviz.store.run import resume_run
from moeviz.store.writer import SegmentWriter

T0 = 1_700_000_000.0


class Clock:
    """A clock that a test turns; steps of `store_runs` finish one a second from T0."""

    def __init__(self) -> None:
        self.now = T0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def relative(step: Step) -> np.ndarray:
    rel = np.full((L, max(EXPERTS)), np.nan)
    for layer, size in enumerate(EXPERTS):
        counts = step.counts_LE[layer, :size]
        rel[layer, :size] = counts / counts.sum() * size
    return rel


def test_it_is_a_feed(tmp_path: Path) -> None:
    feed: Feed = RunFeed(new_run(tmp_path / "run"))
    assert feed.latest is None
    feed.stop()


def test_a_run_that_has_no_step_yet_is_waiting(tmp_path: Path, clock: Clock) -> None:
    feed = RunFeed(new_run(tmp_path / "run"), clock=clock)
    snapshot = feed.poll()
    assert (snapshot.state, snapshot.step, snapshot.tokens, snapshot.planned_steps) == ("waiting", -1, 0, 100)
    assert snapshot.load_rel_LE.shape == (L, max(EXPERTS))
    assert len(snapshot.history_steps_T) == 0
    feed.stop()


def test_a_snapshot_is_the_newest_step_with_its_history(tmp_path: Path, clock: Clock) -> None:
    path = new_run(tmp_path / "run")
    steps = write_steps(SegmentWriter(path, flush_seconds=1e9), range(12), flush_every=5)
    clock.now = T0 + 11.5
    feed = RunFeed(path, history=8, clock=clock)
    snapshot = feed.poll()
    assert (snapshot.state, snapshot.step, snapshot.tokens) == ("live", 11, steps[-1].tokens)
    assert snapshot.behind_seconds == pytest.approx(0.5)
    assert snapshot.history_steps_T.tolist() == list(range(4, 12))
    np.testing.assert_allclose(snapshot.load_rel_LE, relative(steps[-1]), rtol=1e-6)
    np.testing.assert_allclose(
        snapshot.max_load_TL, [np.nanmax(relative(step), axis=1) for step in steps[4:]], rtol=1e-6
    )
    entropy = [step.entropy_L / step.tokens / np.log(EXPERTS) for step in steps[4:]]
    np.testing.assert_allclose(snapshot.route_entropy_TL, entropy, rtol=1e-5)
    share = relative(steps[-1]) / np.array(EXPERTS)[:, None]
    nats = -np.nansum(share * np.log(np.where(share > 0, share, 1)), axis=1)
    np.testing.assert_allclose(snapshot.load_entropy_TL[-1], nats / np.log(EXPERTS), rtol=1e-5)
    np.testing.assert_allclose(snapshot.n_eff_L, np.exp(nats), rtol=1e-5)
    assert snapshot.drop_rate_L.tolist() == [0.0] * L
    assert snapshot.scalars["loss"].values[-1] == pytest.approx(np.mean([s.loss for s in steps[10:]]))
    feed.stop()


def test_polling_step_by_step_gives_what_one_look_gives(tmp_path: Path, clock: Clock) -> None:
    path = new_run(tmp_path / "run")
    writer = SegmentWriter(path, flush_seconds=1e9)
    one_by_one = RunFeed(path, clock=clock)
    for at in range(9):
        steps = write_steps(writer, range(at, at + 1))
        growing = one_by_one.poll()
        assert (growing.step, growing.revision) == (at, at)
        assert growing.scalars["loss"].values[-1] == pytest.approx(steps[0].loss)
    at_once = RunFeed(path, clock=clock).poll()
    for name in (
        "load_rel_LE",
        "load_rel_ema_LE",
        "load_entropy_TL",
        "route_entropy_TL",
        "max_load_TL",
        "n_eff_L",
    ):
        np.testing.assert_allclose(getattr(growing, name), getattr(at_once, name), rtol=1e-5)
    assert growing.scalars["lr"].steps.tolist() == at_once.scalars["lr"].steps.tolist()
    one_by_one.stop()


def test_the_moving_average_follows_its_formula(tmp_path: Path, clock: Clock) -> None:
    path = new_run(tmp_path / "run")
    steps = write_steps(SegmentWriter(path), range(6))
    expected = relative(steps[0])
    for step in steps[1:]:
        expected += 2 / (EMA_STEPS + 1) * (relative(step) - expected)
    feed = RunFeed(path, clock=clock)
    np.testing.assert_allclose(feed.poll().load_rel_ema_LE, expected, rtol=1e-5)
    feed.stop()


def test_the_revision_moves_only_when_something_changed(tmp_path: Path, clock: Clock) -> None:
    path = new_run(tmp_path / "run")
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(3))
    feed = RunFeed(path, clock=clock)
    clock.now = T0 + 2.1
    first = feed.poll()
    clock.now += 0.2
    again = feed.poll()
    assert (again.revision, again.behind_seconds) == (first.revision, pytest.approx(0.3))
    assert again.load_rel_LE is first.load_rel_LE
    clock.now += 1.0
    assert feed.poll().revision == first.revision + 1, "a whole second more behind is news"
    writer.write(alert("COLLAPSE/1/2", 2))
    writer.flush()
    news = feed.poll()
    assert news.revision == first.revision + 2
    assert [one.episode for one in news.open_alerts] == ["COLLAPSE/1/2"]
    feed.stop()


def test_the_state_follows_the_clock_and_the_last_word(tmp_path: Path, clock: Clock) -> None:
    path = new_run(tmp_path / "run")
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(4))
    feed = RunFeed(path, clock=clock)
    states = []
    for later in (3.5, 32.0, 34.0, 200.0):
        clock.now = T0 + later
        states.append(feed.poll().state)
    assert states == ["live", "live", "stale", "dead"]
    writer.write(event(4, "ended"))
    writer.write(event(4, "dropped_samples", samples=5))
    writer.close()
    assert (feed.poll().state, feed.poll().dropped_samples) == ("ended", 5)
    pack_run(path)
    packed = feed.poll()
    assert (packed.state, packed.step) == ("ended", 3)
    feed.stop()


def test_a_resumed_run_starts_its_history_anew(tmp_path: Path, clock: Clock) -> None:
    path = new_run(tmp_path / "run")
    write_steps(SegmentWriter(path), range(8))
    feed = RunFeed(path, clock=clock)
    assert feed.poll().step == 7
    resume_run(path, 5)
    write_steps(SegmentWriter(path), range(5, 6), seed=1)
    snapshot = feed.poll()
    assert snapshot.step == 5
    assert snapshot.history_steps_T.tolist() == list(range(6))
    assert snapshot.scalars["loss"].steps.tolist() == list(range(6))
    feed.stop()


def test_long_series_stay_short_enough_to_draw(tmp_path: Path, clock: Clock) -> None:
    path = new_run(tmp_path / "run")
    writer = SegmentWriter(path, flush_seconds=1e9)
    feed = RunFeed(path, history=10, clock=clock)
    for step in range(36):
        writer.write(ScalarRecord(step=step, rank=0, ts=T0, values={"loss": float(step)}))
        writer.flush()
        series = feed.poll().scalars["loss"]
        assert len(series.steps) <= 21
        assert series.steps[0] == 0
        assert (np.diff(series.steps) > 0).all()
        assert series.values[-1] > step - 6
    feed.stop()


def test_a_run_without_routing_is_followed_by_its_scalars(tmp_path: Path, clock: Clock) -> None:
    path = new_run(tmp_path / "run", model=ModelInfo(family="dense", layers=()))
    writer = SegmentWriter(path, flush_seconds=1e9)
    for step in range(3):
        writer.write(ScalarRecord(step=step, rank=0, ts=T0 + step, values={"loss": 3.0 - step}))
    writer.close()
    clock.now = T0 + 2.5
    feed = RunFeed(path, clock=clock)
    snapshot = feed.poll()
    assert (snapshot.state, snapshot.step, snapshot.load_rel_LE.shape) == ("live", 2, (0, 0))
    assert snapshot.scalars["loss"].values.tolist() == [3.0, 2.0, 1.0]
    feed.stop()


def test_the_thread_polls_until_it_is_stopped(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    feed = RunFeed(path, poll_seconds=0.01)
    feed.start()
    feed.start()
    write_steps(SegmentWriter(path), range(2))
    deadline = time.monotonic() + 120
    while (feed.latest is None or feed.latest.step < 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    feed.stop()
    assert feed.latest is not None
    assert feed.latest.step == 1
    assert np.nanmean(feed.latest.load_rel_LE, axis=1) == pytest.approx([1.0] * L)


def test_the_thread_outlives_a_run_that_is_moved_away_and_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = new_run(tmp_path / "run")
    writer = SegmentWriter(path, flush_seconds=1e9)
    write_steps(writer, range(2))
    feed = RunFeed(path, poll_seconds=0.01)
    with caplog.at_level(logging.WARNING, logger="moeviz.store"):
        feed.start()
        _wait(lambda: feed.latest is not None)
        shutil.move(path, tmp_path / "away")
        _wait(lambda: "trying again" in caplog.text)
        time.sleep(0.1)
        shutil.move(tmp_path / "away", path)
        write_steps(writer, range(2, 3))
        _wait(lambda: feed.latest is not None and feed.latest.step == 2)
    feed.stop()
    assert caplog.text.count("trying again") == 1


def _wait(done: object) -> None:
    assert callable(done)
    deadline = time.monotonic() + 120
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert done()


def test_no_run_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError):
        RunFeed(tmp_path / "nothing")
