"""Alerts of a training run: thresholds that are kept, hooks that are told, episodes that survive a stop."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from trainer_runs import StopAfter, corpus_cache, no_packing, toy

from moeviz.alerts import AlertConfig
from moeviz.records import AlertRecord
from moeviz.store.queries import alert_records
from moeviz.store.reader import open_run
from moeviz.store.run import read_info
from trainer.config import AlertingConfig, TrainConfig
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]

ALWAYS = AlertingConfig(
    circulating_rules=True, alert_thresholds=("circulating_grad_norm=0", "raise_after=1", "clear_after=1")
)
"""Any gradient is an alert from the first step on."""
NEVER = replace(ALWAYS, alert_thresholds=(*ALWAYS.alert_thresholds, "circulating_grad_norm=1e9"))


def norm_alerts(run: Path) -> list[AlertRecord]:
    with open_run(run) as store:
        return [alert for alert in alert_records(store) if alert.rule == "GRAD_NORM_LINE"]


@pytest.mark.parametrize("log_routing", [True, False])
def test_an_alert_open_at_a_stop_is_cleared_by_the_resumed_run(
    log_routing: bool, tmp_path: Path, no_packing: None
) -> None:
    config = toy(tmp_path / "run", log_routing=log_routing)
    config = replace(config, alerting=ALWAYS)
    watcher = StopAfter(3)
    train(config, progress=watcher, interrupt=watcher.interrupt)
    (before,) = norm_alerts(tmp_path / "run")
    assert (before.raised_step, before.cleared_step) == (0, None)
    assert any("GRAD_NORM_LINE" in note for note in watcher.notes)
    assert read_info(tmp_path / "run").config["alert_rules"] == asdict(ALWAYS.rules)
    second = StopAfter()
    train(replace(config, run=None, resume=str(tmp_path / "run"), alerting=NEVER), progress=second)
    (after,) = norm_alerts(tmp_path / "run")
    assert (after.episode, after.raised_step, after.cleared_step) == (before.episode, 0, 3)
    assert [note for note in second.notes if "GRAD_NORM_LINE" in note] == ["step 3  cleared: GRAD_NORM_LINE"]
    assert AlertConfig.from_dict(read_info(tmp_path / "run").config["alert_rules"]) == NEVER.rules


def test_a_command_hears_of_the_alerts_of_a_run(tmp_path: Path, no_packing: None) -> None:
    script, out = tmp_path / "hook.py", tmp_path / "heard.json"
    script.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')\n")
    told = replace(ALWAYS, on_alert_command=f"{sys.executable} {script} {out}")
    train(replace(toy(tmp_path / "run", max_steps=2), alerting=told))
    heard = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["rule"], one["run"]) for one in heard] == [("GRAD_NORM_LINE", str(tmp_path / "run"))]


def test_a_hook_that_fails_costs_nothing_but_a_warning(
    tmp_path: Path, no_packing: None, caplog: pytest.LogCaptureFixture
) -> None:
    told = replace(ALWAYS, on_alert_command=str(tmp_path / "no-such-program"))
    config: TrainConfig = replace(toy(tmp_path / "run", max_steps=2), alerting=told)
    assert train(config).steps_done == 2
    assert "telling about GRAD_NORM_LINE/run/0 failed" in caplog.text
