"""`moeviz generate` prints what the model writes and nothing else, tells its cost, and names models that look ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trainer_runs import StopAfter, corpus_cache, toy

import moeviz.commands.eval as eval_command
import moeviz.commands.generate as command
from model.expert_config import RouterConfig
from model.generate import Sampling, generate
from model.head_config import HeadConfig
from moeviz.errors import MoevizError
from moeviz.store.reader import open_run
from trainer.text_model import TextModel, open_text_model
from trainer.train import TrainResult, train

__all__ = ["corpus_cache"]
FLAGS = ["--device", "cpu", "--max-new-tokens", "9"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    heads = HeadConfig(mtp_depth=1)
    return train(toy(tmp_path_factory.mktemp("runs") / "mine", model={"heads": heads, "max_seq_len": 32}))


@pytest.fixture(scope="module")
def opened(result: TrainResult) -> TextModel:
    return open_text_model(result.run, device="cpu")


def _expected(opened: TextModel, prompt: str, sampling: Sampling) -> str:
    words = opened.words()
    ids = generate(opened.module, torch.tensor([words.encode(prompt)]), sampling)[0].tolist()
    return words.decode(ids[: ids.index(words.eos_id)] if words.eos_id in ids else ids)


def test_the_text_goes_to_the_output_and_its_cost_elsewhere(
    result: TrainResult, opened: TextModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(result.run), "--prompt", "The old", *FLAGS, "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    sampling = Sampling(max_new_tokens=9, seed=3, eos_id=opened.words().eos_id)
    assert out == "The old" + _expected(opened, "The old", sampling) + "\n"
    assert "tokens in" in err
    assert "causal" not in err


def test_drafts_write_the_same_text_and_are_counted(
    result: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for flags in ([], ["--drafts"], ["--drafts", "--drafts-at-once", "1", "--cache", "int8"]):
        command.main([str(result.run), *FLAGS, "--temperature", "0", "--json", *flags])
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["text"] == told[1]["text"]
    assert "drafts" not in told[0]
    drafts = told[1]["drafts"]
    assert 0 <= drafts["acceptance"] <= 1 <= drafts["tokens_per_pass"] <= 2
    assert drafts["proposed"] > 0 < told[2]["cache_bytes"]
    command.main([str(result.run), *FLAGS, "--drafts"])
    assert "drafts kept" in capsys.readouterr().err


def test_a_compiled_step_writes_the_same_text(
    result: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for flags in ([], ["--compile"]):
        with torch.compiler.set_stance("default", force_backend="eager"):
            command.main([str(result.run), *FLAGS, "--temperature", "0", "--json", *flags])
        told.append(json.loads(capsys.readouterr().out)["text"])
    assert told[0] == told[1] != ""


@pytest.mark.parametrize("kind", ["mapped", "sinks", "heavy-hitters"])
def test_every_cache_can_be_asked_for(
    kind: str, result: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cache", kind, "--json", "--device", "cpu", "--eos-id", "0", "--prefill-chunk", "4"]
    flags += ["--cache-folder", str(tmp_path / "pages")] if kind == "mapped" else ["--cache-tokens", "12"]
    command.main([str(result.run), "--prompt", "The old man went down", *flags, "--max-new-tokens", "60"])
    told = json.loads(capsys.readouterr().out)
    assert told["cache_bytes"] > 0
    if kind == "mapped":
        assert len(list((tmp_path / "pages").iterdir())) == 4
    else:
        assert told["tokens"] == 60 > 32, "past the trained length"


def test_several_prompts_one_of_them_from_a_file(
    result: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("Ein Haus")
    command.main(
        [str(result.run), "--prompt", "one", "two", "--file", str(tmp_path / "prompt.txt"), "--json", *FLAGS]
    )
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["prompt"] for each in told] == ["one", "two", "Ein Haus"]


def test_a_stop_text_is_never_shown(
    result: TrainResult, opened: TextModel, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = Sampling(max_new_tokens=9, eos_id=opened.words().eos_id)
    whole = _expected(opened, "The", sampling)
    stop = whole[4:7]
    command.main([str(result.run), *FLAGS, "--stop", stop])
    assert capsys.readouterr().out == "The" + whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache", "mapped"], "name a folder with --cache-folder"),
        (["--cache", "sinks", "--cache-tokens", "32"], "--cache-tokens 32 is not between 8 and the 31"),
        (["--cache", "sinks", "--drafts"], "drafts need a cache that can go back"),
        (["--cache", "sinks", "--compile"], "compile=True does not fit a cache that forgets"),
        (["--drafts", "--compile"], "compile=True and drafts do not go together"),
        (["--drafts", "--drafts-at-once", "0"], "at_once=0 is below 1"),
        (["--file", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--prompt", "a " * 80], "leaves no room; shorten the prompt"),
    ],
)
def test_mistakes_are_named(flags: list[str], message: str, result: TrainResult) -> None:
    with pytest.raises(MoevizError, match=message):
        command.main([str(result.run), "--device", "cpu", *flags])


@pytest.mark.parametrize(
    ("router", "told"),
    [
        (RouterConfig(chooser="expert"), "router.chooser=expert is not causal"),
        (RouterConfig(capacity_factor=1.0, drop_order="prob"), "router.drop_order=prob is not causal"),
        (RouterConfig(capacity_factor=1.0), None),
    ],
    ids=["experts choose", "drops by weight", "drops by place"],
)
def test_training_evaluation_and_generation_say_that_a_model_looks_ahead(
    router: RouterConfig, told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy(
        tmp_path / "run", max_steps=2, model={"router": router}, balance={"balance": "none"}, log_routing=True
    )
    watcher = StopAfter()
    train(config, progress=watcher)
    causal = told is None
    assert any(told in note for note in watcher.notes) if told else "causal" not in " ".join(watcher.notes)
    with open_run(config.run) as store:  # type: ignore[arg-type]
        kinds = store.sql("SELECT kind FROM events")["kind"].tolist()
    assert ("not_causal" in kinds) is not causal
    capsys.readouterr()
    assert eval_command.main([str(config.run), "--limit", "1", "--json", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["causal"] is causal
    assert told in err if told else "causal" not in err
    command.main([str(config.run), *FLAGS])
    err = capsys.readouterr().err
    assert err.count(told) == 1 if told else "causal" not in err
