"""LATENT_DEAD is told once when a block leaves its latents unused, and cleared when all blocks are well below."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from capture_models import Kept
from latent_runs import model_info, records_of

from moeviz.alerts import RULES, AlertConfig, LatentDetector, RouterDetector, ScalarDetector
from moeviz.derive import DeriveSink
from moeviz.records import AlertRecord, LatentRecord


def seen(detector: LatentDetector, *steps: dict[int, float], slots: bool = False) -> list[tuple[str, int]]:
    """(raised or cleared, step) for the share that each block leaves unused."""
    told = []
    for step, blocks in enumerate(steps):
        for block, unused in blocks.items():
            for alert in detector.observe(record(step, block, unused, slots)):
                assert (alert.rule, alert.layer, alert.severity) == ("LATENT_DEAD", None, "info")
                told.append(("raised" if alert.cleared_step is None else "cleared", step))
    return told


def record(step: int, block: int, unused: float, slots: bool = False) -> LatentRecord:
    made = replace(records_of(0)[3 if slots else 0], step=step, layer=block)
    size = made.profile_XC.shape[1]
    values = {"slot_dead": unused * size} if slots else {"latent_util": 1 - unused}
    return replace(made, values=values)


def test_an_unused_latent_is_told_once_and_cleared_with_a_margin() -> None:
    steps = [{0: 0.5, 3: 0.6}, {0: 0.5, 3: 0.95}, {0: 0.5, 3: 0.97}, {0: 0.5, 3: 0.89}, {0: 0.5, 3: 0.5}]
    assert seen(LatentDetector(), *steps) == [("raised", 1), ("cleared", 4)]


def test_one_block_that_recovers_does_not_clear_another() -> None:
    assert seen(LatentDetector(), {0: 0.95, 1: 0.95}, {0: 0.5, 1: 0.95}, {0: 0.5, 1: 0.5}) == [
        ("raised", 0), ("cleared", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("dead", "told"), [(0.2, False), (0.25, False), (0.4, True)])
def test_a_quarter_of_the_slots_may_be_dead(dead: float, told: bool) -> None:
    assert bool(seen(LatentDetector(), {3: dead}, slots=True)) == told


def test_thresholds_are_those_of_the_configuration() -> None:
    config = AlertConfig(latent_unused=0.4, latent_unused_clear=0.3)
    assert seen(LatentDetector(config), {0: 0.45}) == [("raised", 0)]


def test_parts_that_say_nothing_are_not_judged() -> None:
    detector = LatentDetector()
    assert [alert for each in records_of(0)[1:3] for alert in detector.observe(each)] == []


def test_the_words_name_the_blocks() -> None:
    (alert,) = LatentDetector().observe(record(5, 2, 0.93))
    assert "block 2 leaves 93% of its latents unused" in alert.message
    assert "--latent-tokens" in alert.remedy
    assert {rule.id for rule in RULES} >= {"LATENT_DEAD"}


def test_it_is_derived_restored_and_rewound() -> None:
    sink = Kept()
    derived = DeriveSink(sink, model_info())
    derived.write(record(5, 2, 0.93))
    (alert,) = sink.of(AlertRecord)
    assert derived.open_alerts == (alert,)
    again = DeriveSink(Kept(), model_info())
    again.replay([], [alert])
    assert [each.episode for each in again.open_alerts] == [alert.episode]  # by one detector alone
    derived.write(record(3, 2, 0.5))  # training went back behind the alert
    assert len(derived.open_alerts) == 0
    for other in (ScalarDetector(), RouterDetector(model_info())):
        other.restore([alert])
        assert other.episodes.open_alerts == ()
    assert np.isfinite(alert.value)
