"""Looking back is an ordinary snapshot of that step; holding, stepping and replaying move along the history."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tui_fakes import FakeArchive, SyntheticRun

from tui.playhead import Playhead, rewind
from tui.scene import Eye


@pytest.fixture
def run() -> SyntheticRun:
    return SyntheticRun(5, 7, 2, steps=60)


@pytest.fixture
def playhead(run: SyntheticRun) -> Playhead:
    """At step 59 of a run whose older loads are known."""
    playhead = Playhead()
    playhead.offer(run.snapshot())
    playhead.fill(FakeArchive(run).loads(0, 59))
    return playhead


@pytest.mark.parametrize("step", [0, 19, 47])
def test_a_look_back_equals_the_snapshot_of_that_step(
    run: SyntheticRun, playhead: Playhead, step: int
) -> None:
    playhead.move(step - 59)
    back, then = playhead.frame(), run.snapshot(step)
    assert back is not None
    assert back.step == step
    for name in ("load_rel_LE", "history_steps_T", "load_entropy_TL", "route_entropy_TL", "max_load_TL"):
        np.testing.assert_array_equal(getattr(back, name), getattr(then, name), err_msg=name)
    np.testing.assert_allclose(back.load_rel_ema_LE, then.load_rel_ema_LE, rtol=1e-5)
    np.testing.assert_allclose(back.n_eff_L, then.n_eff_L, rtol=1e-5)
    for name, series in then.scalars.items():
        np.testing.assert_array_equal(back.scalars[name].values, series.values)


def test_what_was_not_kept_is_unknown_and_not_zero(run: SyntheticRun) -> None:
    back = rewind(run.snapshot(), 10, {})
    assert np.isnan(back.load_rel_LE).all()
    assert np.isnan(back.drop_rate_L).all()


def test_alerts_of_the_past_are_those_that_were_open_then(run: SyntheticRun) -> None:
    shot = run.snapshot()
    raised = shot.alerts[0].raised_step
    cleared = replace(shot, alerts=tuple(replace(alert, cleared_step=raised + 5) for alert in shot.alerts))
    assert rewind(cleared, raised - 1, {}).alerts == ()
    assert len(rewind(cleared, raised + 4, {}).open_alerts) == 2
    assert rewind(cleared, raised + 5, {}).open_alerts == ()


def test_a_held_picture_stays_while_the_run_goes_on(run: SyntheticRun) -> None:
    playhead = Playhead()
    playhead.offer(run.snapshot(20))
    playhead.pause()
    held = playhead.version
    playhead.offer(run.snapshot(21))
    assert playhead.frame() is not playhead.latest
    assert (playhead.frame() or run.snapshot()).step == 20
    assert playhead.version == held
    playhead.pause()
    assert (playhead.frame() or run.snapshot(0)).step == 21


def test_stepping_stops_at_the_oldest_and_runs_on_at_the_newest(playhead: Playhead) -> None:
    playhead.move(1)
    assert playhead.held_step is None
    playhead.move(-1)
    assert playhead.held_step == 58
    playhead.move(-1000)
    assert playhead.held_step == 0
    playhead.move(1000)
    assert playhead.held_step is None


def test_stepping_forward_from_a_held_step_reaches_newer_ones(run: SyntheticRun) -> None:
    playhead = Playhead()
    playhead.offer(run.snapshot(20))
    playhead.pause()
    playhead.offer(run.snapshot(30))
    playhead.move(1)
    assert playhead.held_step == 21


def test_replay_cycles_its_speeds_and_ends_at_the_newest_step(playhead: Playhead) -> None:
    playhead.replay()
    assert (playhead.held_step, playhead.replay_speed) == (0, 1)
    playhead.tick()
    assert playhead.held_step == 1
    playhead.replay()
    playhead.replay()
    assert playhead.replay_speed == 16
    for _ in range(4):
        playhead.tick()
    assert (playhead.held_step, playhead.replay_speed) == (None, 0)


def test_only_steps_that_were_never_seen_are_asked_for(run: SyntheticRun) -> None:
    playhead = Playhead()
    for step in (40, 41, 43):
        playhead.offer(run.snapshot(step))
    assert playhead.missing() == (0, 42)
    playhead.fill(FakeArchive(run).loads(0, 42))
    assert playhead.missing() is None
    history = playhead.history(3)
    assert history is not None
    np.testing.assert_array_equal(history.load_rel_TE, run.loads_TLE[:44, 3])


def test_a_snapshot_that_only_aged_does_not_count_as_new(run: SyntheticRun) -> None:
    playhead = Playhead()
    shot = run.snapshot()
    playhead.offer(shot)
    version = playhead.version
    playhead.offer(replace(shot, behind_seconds=9.0, revision=shot.revision + 1))
    assert playhead.version == version
    playhead.offer(replace(shot, alerts=()))
    assert playhead.version != version


def test_another_run_starts_afresh(playhead: Playhead) -> None:
    other = SyntheticRun(3, 4, 2, steps=5)
    playhead.move(-3)
    playhead.offer(replace(other.snapshot(), run_path="runs/other"))
    assert playhead.held_step is None
    assert playhead.frame() is playhead.latest


def test_the_reference_is_close_to_the_step_that_was_meant(playhead: Playhead) -> None:
    found = playhead.loads_at(9)
    assert found is not None
    assert found[0] == 9
    assert playhead.loads_at(59) is None


def test_the_eye_stays_inside_the_model() -> None:
    info = SyntheticRun(3, 4, 2, steps=2).info
    assert Eye(layer=9, expert=9).inside(info) == Eye(layer=2, expert=3)
    assert Eye(layer=-1, expert=-4).inside(info) == Eye()
