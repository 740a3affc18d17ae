"""Our models inside of lm-evaluation-harness say what transformers' say there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("accelerate", reason="lm-eval's transformers models need accelerate")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.harness import tiny_folder
from trainer.harness import HarnessModel

CONTEXT = 96


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[HarnessModel, Any]:
    folder: Path = tiny_folder(tmp_path_factory.mktemp("models") / "tiny", CONTEXT)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=CONTEXT)
    return HarnessModel.open(folder, device="cpu", batch_size=3), theirs


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def test_likelihoods(models: tuple[HarnessModel, Any]) -> None:
    ours, theirs = models
    asked = instances("loglikelihood", ("A", " b"), ("A long line " * 9, " and an end"), ("", "start"))
    for a, b in zip(ours.loglikelihood(asked, True), theirs.loglikelihood(asked, True), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-2)
        assert a[1] == b[1]


def test_whole_texts(models: tuple[HarnessModel, Any]) -> None:
    """Of one window, where there is one way to cut; longer texts are cut alike up to the last window."""
    ours, theirs = models
    asked = instances("loglikelihood_rolling", ("One line.",), ("word " * 19,), ("x" * (2 * CONTEXT),))
    for a, b in zip(
        ours.loglikelihood_rolling(asked, True), theirs.loglikelihood_rolling(asked, True), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-2)


def test_answers(models: tuple[HarnessModel, Any]) -> None:
    ours, theirs = models
    options = {"until": ["\n\n", "zzz"], "max_gen_toks": 12, "do_sample": False}
    asked = instances("generate_until", ("Question: 1 + 1 =", options), ("a", options))
    assert ours.generate_until(asked, True) == theirs.generate_until(asked, True)
