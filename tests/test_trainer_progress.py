"""What a person reads while training, and how Ctrl-C is heard."""

from __future__ import annotations

import io
import math
import os
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from moeviz.alerts import alert_line
from moeviz.records import AlertRecord
from trainer.evaluate import DomainLoss, evaluation_scalars
from trainer.interrupt import Interrupt
from trainer.progress import LiveBar, PlainLines, StepReport, open_progress

REPORT = StepReport(
    step=9,
    max_steps=40,
    loss=2.5,
    learning_rate=1e-3,
    grad_norm=0.75,
    tokens_per_second=12_345.6,
    seconds_left=61,
    worst_load=1.5,
    worst_expert=(3, 7),
)
LOSSES = {"code": DomainLoss(2.0, 1.0, 30), "prose": DomainLoss(4.0, math.nan, 10)}


def test_plain_lines_come_every_so_often_and_hold_the_numbers() -> None:
    text = io.StringIO()
    lines = PlainLines(Console(file=text, width=200), every=5)
    for step in range(12):
        lines.step(replace(REPORT, step=step))
    told = text.getvalue().splitlines()
    assert [line.split("  ")[0] for line in told] == ["step 1/40", "step 5/40", "step 10/40"]
    for part in (
        "loss 2.500",
        "left 0:01:01",
        "12,346 tok/s",
        "max load 1.50x (layer 3, expert 7)",
        "lr 1.00e-03",
    ):
        assert part in told[-1]


def test_a_dense_model_has_no_load_to_tell() -> None:
    assert "load" not in str(replace(REPORT, worst_load=math.nan))


def test_brackets_in_notes_are_text() -> None:
    text = io.StringIO()
    PlainLines(Console(file=text), every=1).note("[bold]x[/bold] [1, 2]")
    assert text.getvalue() == "[bold]x[/bold] [1, 2]\n"


def test_a_terminal_gets_a_bar_whose_narrow_form_keeps_the_time_left() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80)
    progress = open_progress(console, every=10)
    assert isinstance(progress, LiveBar)
    progress.step(REPORT)
    progress.evaluation(10, LOSSES)
    progress.close()
    assert "left 0:01:01" in text.getvalue()
    assert "step 10  validation loss 2.500 (code 2.000, prose 4.000)" in text.getvalue()


def test_evaluation_scalars_weigh_domains_by_their_tokens() -> None:
    assert evaluation_scalars(LOSSES) == {
        "val_loss": pytest.approx((2.0 * 30 + 4.0 * 10) / 40),
        "val_loss/code": 2.0,
        "val_bits_per_byte/code": 1.0,
        "val_loss/prose": 4.0,
    }
    assert evaluation_scalars({}) == {}


def test_an_alert_is_a_line_when_it_opens_and_when_it_clears() -> None:
    alert = AlertRecord(
        episode="LOAD_SKEW/2/58",
        rule="LOAD_SKEW",
        rule_version=1,
        layer=2,
        experts=(1,),
        severity="warning",
        raised_step=58,
        updated_step=60,
        cleared_step=None,
        value=1.0,
        peak=2.0,
        threshold=0.5,
        message="Expert 1 serves most tokens.",
        remedy="Balance.",
    )
    assert alert_line(alert) == "step 60  ▲ warning: LOAD_SKEW layer 2: Expert 1 serves most tokens."
    assert (
        alert_line(replace(alert, updated_step=90, cleared_step=90)) == "step 90  cleared: LOAD_SKEW layer 2"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_and_a_second_one_an_order(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
