"""`moeviz presets` prints what the configs say, beside what was published."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from model.flops import training_flops
from model.presets import PRESETS
from model.published import CLAIMS, PUBLISHED
from moeviz.cli import main


def test_json_has_every_model_with_its_own_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json", "--seq-len", "64"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    configs = {name: make() for name, make in PRESETS.items()} | dict(PUBLISHED)
    assert list(rows) == list(configs)
    for name, config in configs.items():
        assert rows[name]["parameters"] == config.num_parameters()
        assert rows[name]["active_parameters"] == config.num_active_parameters()
        assert rows[name]["training_flops_per_token"] == training_flops(config, 64)
        claimed = CLAIMS[name].parameters if name in CLAIMS else None
        assert rows[name]["claimed_parameters"] == claimed


def test_the_table_shows_counts_beside_claims(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.strip().startswith("optimal"))
    assert "47.2M" in line
    assert "18.9M" in line
    assert "13M" in line


def test_counting_needs_no_torch() -> None:
    code = "import sys; from moeviz.cli import main; main(['presets']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
