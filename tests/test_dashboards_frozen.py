"""A frozen page shows the run as it was: loads, histories, scalars and alerts of the chosen step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dashboards_run import SyntheticRun

from dashboards.frozen import frozen
from moeviz.live import Snapshot
from moeviz.store import open_run, queries
from moeviz.store.feed import RunFeed
from moeviz.store.reader import Store

STEPS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "fox"
    writer = SyntheticRun(path, planned_steps=STEPS)
    writer.write_all(STEPS)
    writer.finish(STEPS - 1)
    return path


@pytest.fixture(scope="module")
def store(run: Path) -> Store:
    return open_run(run)


@pytest.fixture(scope="module")
def latest(run: Path) -> Snapshot:
    feed = RunFeed(run)
    snapshot = feed.poll()
    feed.stop()
    return snapshot


def test_loads_are_those_of_the_step(store: Store, latest: Snapshot) -> None:
    then = frozen(store, latest, 23)
    asked = queries.load_matrix(store, 23)
    loads = asked.pivot(index="layer", columns="expert", values="load_rel").to_numpy()
    assert then.step == 23
    assert np.abs(then.load_rel_LE - loads).max() < 1e-5


def test_history_ends_at_the_step(store: Store, latest: Snapshot) -> None:
    then = frozen(store, latest, 23)
    assert then.history_steps_T.tolist() == list(range(24))
    assert np.allclose(then.load_entropy_TL, latest.load_entropy_TL[:24])
    assert all((series.steps <= 23).all() for series in then.scalars.values())


def test_the_newest_step_frozen_is_the_live_snapshot(store: Store, latest: Snapshot) -> None:
    then = frozen(store, latest, STEPS - 1)
    assert np.allclose(then.load_rel_LE, latest.load_rel_LE)
    assert np.allclose(then.load_rel_ema_LE, latest.load_rel_ema_LE, atol=1e-5)
    assert then.alerts == latest.alerts


def test_alerts_of_later_steps_are_not_there_yet(store: Store, latest: Snapshot) -> None:
    assert latest.alerts
    raised = latest.alerts[0].raised_step
    assert frozen(store, latest, raised - 1).alerts == ()
    assert len(frozen(store, latest, raised).alerts) == 1


def test_an_alert_that_was_cleared_later_is_open_then(store: Store, latest: Snapshot) -> None:
    from dataclasses import replace

    cleared = replace(latest, alerts=(replace(latest.alerts[0], raised_step=10, cleared_step=40),))
    assert frozen(store, cleared, 30).alerts[0].cleared_step is None
    assert frozen(store, cleared, 50).alerts[0].cleared_step == 40
