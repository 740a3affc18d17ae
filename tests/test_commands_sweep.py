"""`moeviz sweep` and `moeviz study`: real child processes, told failures, early ends, and going on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from trainer_runs import corpus_cache

from moeviz.cli import main
from moeviz.commands.study import StudyArguments, study_of
from moeviz.commands.train import parse
from moeviz.store.catalog import find_runs
from trainer.studies.conduct import conduct
from trainer.studies.median_rule import MedianRule
from trainer.studies.outcome import Outcome
from trainer.studies.trials import PRUNED_FILE, Trial, validation_curve

__all__ = ["corpus_cache"]

FIXED_FLAGS = "--bytes-per-domain 12000 --max-steps 4 --eval-every 2 --threads 1 --device cpu"
FIXED = FIXED_FLAGS.split()
VARY = ["--preset", "smoke", "--vary", "train-data=generated,absent.jsonl", "--vary", "top-k=2,9"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> Path:
    """A sweep of four: one trains, one fails, two are refused."""
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    assert main(["sweep", *VARY, "--runs", str(folder), "--", *FIXED]) == 1, "a run failed"
    return folder


def test_a_failed_run_is_told_and_the_others_train(swept: Path) -> None:
    rows = pd.read_parquet(swept / "comparison.parquet").set_index("run")
    states = dict(rows["state"])
    assert states == {
        "train-data=generated,top-k=2": "finished",
        "train-data=absent.jsonl,top-k=2": "failed",
        "train-data=generated,top-k=9": "refused",
        "train-data=absent.jsonl,top-k=9": "refused",
    }
    assert "absent.jsonl" in rows.loc["train-data=absent.jsonl,top-k=2", "why"]
    assert "top_k=9 exceeds" in rows.loc["train-data=generated,top-k=9", "why"]
    good = rows.loc["train-data=generated,top-k=2"]
    run = swept / "train-data=generated,top-k=2"
    assert [path for path, _ in find_runs(swept)] == [run], "an ordinary run folder"
    assert good["steps"] == 4
    assert good["val_loss"] == pytest.approx(validation_curve(run)[4])
    assert good["maxvio_global"] >= 0
    assert good["tokens_per_second"] > 0


def test_the_same_sweep_again_reads_what_is_there(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "smoke", "--vary", "train-data=generated", "--vary", "top-k=2"]
    before = (swept / "train-data=generated,top-k=2" / "run.json").read_bytes()
    assert main(["sweep", *words, "--runs", str(swept), "--json", "--", *FIXED]) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)
    assert row["state"] == "finished"
    assert row["top-k"] == "2"
    assert "trained before" in printed.err
    assert (swept / "train-data=generated,top-k=2" / "run.json").read_bytes() == before


def test_other_flags_in_the_same_folder_are_refused(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*VARY, "--runs", str(swept), "--", *FIXED, "--seed", "5"]
    assert main(["sweep", *words]) == 1
    assert "was trained with other flags" in capsys.readouterr().err


def test_a_run_behind_the_median_ends_early_with_its_checkpoint(swept: Path, tmp_path: Path) -> None:
    """The other run's losses are set to 0 by hand, so the one in training is behind at its first rung."""
    one = Trial(name="one", words=("--preset", "smoke", *FIXED))
    rule = MedianRule(least_others=1, first_share=0.0)
    slow = (
        "--preset",
        "smoke",
        *FIXED,
        "--max-steps",
        "100000",
        "--eval-every",
        "3",
        "--learning-rate",
        "1e-9",
    )
    behind = Trial(name="behind", words=slow)
    done = swept / "train-data=generated,top-k=2"
    shutil.copytree(done, tmp_path / "one")
    (tmp_path / "one" / "trial.json").write_text(json.dumps({"words": [*one.words, "--log-routing"]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "trainer.studies.pool.validation_curve",
            lambda run: dict.fromkeys(range(99), 0.0) if run.name == "one" else validation_curve(run),
        )
        found = conduct([one, behind], tmp_path, parse, jobs=1, rule=rule)
    assert [outcome.state for outcome in found] == ["finished", "pruned"]
    pruned = found[1]
    assert "the median of 1 others" in pruned.why
    told = json.loads((tmp_path / "behind" / PRUNED_FILE).read_text())
    assert told["step"] % 3 == 0
    assert pruned.steps < 100_000
    again = conduct([one, behind], tmp_path, parse, jobs=1, rule=rule)
    assert [outcome.state for outcome in again] == ["finished", "pruned"], "and stays ended"
    assert list((tmp_path / "behind" / "checkpoints").iterdir()), "its weights are kept"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "nothing to vary"),
        ("--vary lr=1 -- --lr 2", "both varied and the same"),
        ("--vary run=a,b", "the sweep's own"),
        ("--vary lr=1e-3 -- --resume x", "the sweep's own"),
        ("--vary lr=1e-3 --random 0", "--random 0 is below 1"),
        ("--vary lr=1e-3 --jobs 0", "jobs=0 is below 1"),
        ("--vary learning-rte=1e-3", "--learning-rate"),
        ("--preset smoke --vary top-k=8,9", "no run has flags that fit together: top_k=8 exceeds"),
    ],
)
def test_a_mistake_is_told_before_anything_trains(
    words: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *words.split()]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("balance --seeds 3 3", "repeats one"),
        ("experts --all", "leave it out"),
        ("balance --steps 0", "--steps 0 is below 1"),
    ],
)
def test_a_mistaken_study_is_told(
    words: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words.split()]) == 1
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_study_has_its_runs(tmp_path: Path) -> None:
    sizes = {
        name: len(study_of(StudyArguments(name=name), tmp_path).trials)  # type: ignore[arg-type]
        for name in ("balance", "architecture", "learning-rate", "experts")
    }
    assert sizes == {"balance": 9, "architecture": 5, "learning-rate": 5, "experts": 7}
    assert len(study_of(StudyArguments(name="balance", all=True, seeds=(1,)), tmp_path).trials) == 5


def test_a_study_prints_what_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are made up; that real ones are trained and read is the subject of the sweep above."""

    def made_up(trials: tuple[Trial, ...], folder: Path, *args: object, **options: object) -> list[Outcome]:
        return [
            Outcome(run=trial.name, path="", state="finished", values=trial.values, val_loss=loss)
            for loss, trial in enumerate(trials, 1)
        ]

    monkeypatch.setattr("trainer.studies.conduct.conduct", made_up)
    assert main(["study", "learning-rate", "--runs", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["learning-rate"] for run in told["runs"]] == ["3e-4", "1e-3", "3e-3", "1e-2", "3e-2"]
    assert told["runs"][0]["maxvio_global"] is None, "JSON has no NaN"
    assert [finding["holds"] for finding in told["findings"]] == [None, None, False]
    assert main(["study", "learning-rate", "--runs", str(tmp_path)]) == 0
    assert "does not hold" in " ".join(capsys.readouterr().out.split())
