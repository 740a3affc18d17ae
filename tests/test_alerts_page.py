"""The page about alerts says what the code does: every rule, every threshold, every flag that it names."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from store_runs import new_run

from moeviz.alerts import RULES, AlertConfig, Command
from moeviz.alerts.conditions import CONDITIONS, GENERAL, condition_of, thresholds_of
from moeviz.alerts.page import markdown_page
from moeviz.cli import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "alerts.md"


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alerts", "--rules", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert PAGE.read_text() == page, "run: moeviz alerts --rules --markdown > docs/alerts.md"
    for rule in RULES:
        assert rule.id in page
        assert all(part in page for part in re.split(r"\{[^}]*\}", rule.remedy))


def test_every_rule_has_a_condition_and_every_threshold_a_place() -> None:
    assert set(CONDITIONS) == {rule.id for rule in RULES}
    told = {name for rule in RULES for name in thresholds_of(rule.id)} | set(GENERAL)
    assert told == {item.name for item in fields(AlertConfig)} - {"circulating"}


def test_conditions_state_the_thresholds_in_force() -> None:
    usual, mine = AlertConfig(), AlertConfig(skew_util=0.123, circulating=True)
    assert "0.6" in condition_of("LOAD_SKEW", usual).raises
    assert "0.123" in condition_of("LOAD_SKEW", mine).raises
    assert "0.123" in markdown_page(mine)


def test_a_run_states_its_own_thresholds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path / "mine", config={"alert_rules": {"dead_line": 0.0625, "circulating": True}})
    assert main(["alerts", str(run), "--rules", "--json"]) == 0
    rows = {row["rule"]: row for row in json.loads(capsys.readouterr().out)}
    assert "0.0625" in rows["EXPERT_DEAD"]["raises"]
    assert "FIVE_PERCENT" in rows
    assert main(["alerts", "--rules"]) == 0
    text = capsys.readouterr().out
    assert "FIVE_PERCENT" not in text
    assert "EXPERT_DEAD" in text
    assert main(["alerts", "--markdown"]) == 1
    assert "--rules" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["alerts", "check", "snapshot", "train"])
def test_flags_that_the_page_names_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(rf"^moeviz {command} ([^#\n]*)", PAGE.read_text(), re.MULTILINE)
    flags = {flag for line in lines for flag in re.findall(r"--[a-z-]+", line)}
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert lines
    assert all(flag in shown for flag in flags)


def test_settings_that_the_page_names_are_accepted() -> None:
    (settings,) = re.findall(r"--alert-thresholds ([^\n]+)", PAGE.read_text())
    changed = AlertConfig().with_thresholds(settings.split())
    assert changed != AlertConfig()
    (command,) = re.findall(r"--on-alert-command '([^']+)'", PAGE.read_text())
    Command(command)
