"""`moeviz export` writes a folder that transformers opens as the same function, or says why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from trainer_runs import toy

from model.config import RouterConfig
from moeviz.cli import main
from trainer.checkpoint import load_checkpoint
from trainer.progress import Silent
from trainer.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEVIZ_CACHE", str(folder / "cache"))
        sigmoid = {"router": RouterConfig(score="sigmoid"), "num_shared_experts": 1}
        train(toy(folder / "sigmoid", max_steps=2, model=sigmoid), progress=Silent())
        train(toy(folder / "softmax", max_steps=1), progress=Silent())
    return folder


def test_transformers_computes_the_same(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs / "sigmoid"), str(tmp_path / "out")]) == 0
    assert "step 2 of" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = load_checkpoint(next((runs / "sigmoid" / "checkpoints").glob("step-*"))).model
    ids_BS = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_BS).logits, ours(ids_BS).logits_BSV, rtol=1e-4, atol=1e-4)


def test_a_model_of_no_family_is_refused_in_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs / "softmax"), str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert "was not exported: no family of transformers computes this model" in line
    assert "router.selection_bias=True" in line
    assert main(["export", str(runs / "nowhere"), str(tmp_path / "out")]) == 1
    assert "no run at" in capsys.readouterr().err
