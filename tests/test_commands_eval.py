"""`moeviz eval`: what it prints, what it keeps in the run, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from trainer_runs import corpus_cache, toy

from moeviz.commands import eval as command
from moeviz.errors import MoevizError
from moeviz.store.reader import open_run
from moeviz.store.run import read_info
from trainer.train import TrainResult, train

__all__ = ["corpus_cache"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(toy(tmp_path_factory.mktemp("runs") / "mine"))


@pytest.fixture
def run(result: TrainResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(result.run, tmp_path / "mine"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"query": f"{n} and", "choices": [f" {n}", "two", "one hundred"], "gold": n % 3} for n in range(7)
    ]
    (folder / "openbook_qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "copa.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    return folder


def test_text_by_domain_is_what_training_said_last(
    run: Path, result: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(run), "--limit", "2", "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)["results"]
    last = result.evaluations[result.steps_done]
    for domain, each in last.items():
        assert told[f"eval/{domain}/loss"] == pytest.approx(each.loss_nats, rel=1e-4)
        assert told[f"eval/{domain}/bits_per_byte"] == pytest.approx(each.bits_per_byte, rel=1e-4)
        assert told[f"eval/{domain}/accuracy"] == pytest.approx(each.accuracy)
        assert told[f"eval/{domain}/perplexity"] == pytest.approx(math.exp(each.loss_nats), rel=1e-3)


def test_scores_are_kept_in_the_run_packed_or_not(
    run: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_info(run).packed
    flags = ["--task", "openbookqa", "copa", "--task-data", str(questions), "--json", "--device", "cpu"]
    assert command.main([str(run), *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["questions"] == {"openbookqa": 7, "copa": 4}
    assert "eval/copa/acc_norm" not in told["results"]
    assert read_info(run).packed
    with open_run(run) as store:
        rows = store.sql("SELECT step, name, value FROM scalars WHERE name LIKE 'eval/%'")
        events = store.sql("SELECT step, detail FROM events WHERE kind = 'evaluated'")
        losses = store.sql("SELECT step FROM scalars WHERE name = 'loss' ORDER BY step")
    assert dict(zip(rows["name"], rows["value"], strict=True)) == pytest.approx(told["results"])
    assert set(rows["step"]) == {told["step"]} == {6}
    assert json.loads(events["detail"].iloc[0])["questions"] == {"openbookqa": 7, "copa": 4}
    assert losses["step"].tolist() == list(range(6)), "nothing that was recorded before is lost"


def test_tables_and_a_checkpoint_outside_of_its_run(
    run: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(
        next((run / "checkpoints").iterdir()), tmp_path / "alone" / "checkpoints" / "step-00000006"
    )
    flags = ["--task", "openbookqa", "--task-data", str(questions), "--limit", "5", "--device", "cpu"]
    assert command.main([str(alone), *flags]) == 0
    out = capsys.readouterr().out
    assert "openbookqa" in out
    assert " 5 " in out
    assert "33.3%" in out


def test_other_text_is_judged_whole(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text("One river, two rivers.\n" * 40)
    flags = ["--data", str(tmp_path / "other.txt"), "--limit", "3", "--no-keep", "--json", "--device", "cpu"]
    assert command.main([str(run), *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == {"other": 3 * 16}
    with open_run(run) as store:
        assert store.sql("SELECT count(*) AS n FROM events WHERE kind = 'evaluated'")["n"].iloc[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "hellaswagg"], "no task 'hellaswagg'; there are text, hellaswag"),
        (["--limit", "0"], "--limit 0 is below 1"),
        (["--task", "piqa", "--task-data", "nowhere"], "no file or folder at nowhere"),
    ],
)
def test_mistakes_are_named(run: Path, flags: list[str], message: str) -> None:
    with pytest.raises(MoevizError, match=message):
        command.main([str(run), *flags])


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match="no checkpoint at"):
        command.main([str(tmp_path / "none")])
