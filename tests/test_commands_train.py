"""`moeviz train`: flags become a config, mistakes become one sentence, and a run ends with what to do next."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainer_runs import corpus_cache, no_packing

from moeviz.cli import main
from moeviz.commands.train import ALIASES, parse
from moeviz.errors import MoevizError
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import TrainConfig, flag_names
from trainer.presets import train_preset

__all__ = ["corpus_cache", "no_packing"]

TOY_FLAGS = (
    "--preset smoke --dim 16 --vocab-size 280 --bytes-per-domain 12000 --max-steps 4 --eval-every 2 --save-every 2 "
    "--threads 1 --device cpu"
)
TOY = TOY_FLAGS.split()


def parsed(words: str) -> TrainConfig:
    return parse(words.split())


def test_no_flag_is_the_preset() -> None:
    assert parse(["--preset", "olmoe-tiny"]) == train_preset("olmoe-tiny")
    assert parse([]) == train_preset("demo")


def test_flags_change_the_preset_and_nothing_else() -> None:
    config = parsed("--preset smoke --num-experts 6 --learning-rate 0.5 --dtype bf16 --log-routing")
    smoke = train_preset("smoke")
    assert config.model.num_experts == 6
    assert config.model.dim == smoke.model.dim
    assert config.optim.learning_rate == 0.5
    assert config.optim.beta2 == smoke.optim.beta2
    assert config.engine.dtype == "bf16"
    assert (config.log_routing, smoke.log_routing) == (True, False)


def test_every_part_of_a_config_is_within_reach() -> None:
    config = parsed(
        "--run r --route-sequences all --val-data v --balance aux --zero-stage 2 --keep-checkpoints 3 --score sigmoid"
    )
    assert config.run == Path("r")
    assert config.sampling.route_sequences == "all"
    assert config.data.val_data == "v"
    assert config.balance.balance == "aux"
    assert config.engine.zero_stage == 2
    assert config.checkpoint.keep_checkpoints == 3
    assert config.model.router.score == "sigmoid"


def test_other_spellings_name_flags_that_exist() -> None:
    flags = flag_names()
    assert set(ALIASES.values()) <= set(flags)
    assert not set(ALIASES) & set(flags)
    config = parsed("--n-layers 3 --n_heads=2 --lr 0.25 --steps 7 --gradient_accumulation_steps 2")
    assert (config.model.num_layers, config.model.num_heads) == (3, 2)
    assert (config.optim.learning_rate, config.max_steps, config.data.gradient_accumulation_steps) == (
        0.25,
        7,
        2,
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--learning-rte 0.1", "--learning-rate"),
        ("--top-k 9", "top_k=9 exceeds num_experts=8"),
        ("--batch-size 0", "batch_size=0 is below 1"),
        ("--zero-stage 7", "--zero-stage"),
        ("--dtype fp8", "--dtype"),
        ("--max-steps many", "--max-steps"),
        ("--engine deepspeed --zero-stage 0 --dtype bf16", "use zero_stage=1"),
        ("--route-every -1", "route_every=-1 is negative"),
    ],
)
def test_wrong_usage_is_told_with_status_2(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", *words.split()])
    assert exit_.value.code == 2
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert told in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--preset demmo", "did you mean demo?"),
        ("--resume nowhere/at-all", "no run at nowhere/at-all"),
        ("--resume --run nowhere", "no run at nowhere"),
        ("--resume nowhere --preset demo", "leave --preset out"),
        ("--train-data nowhere.txt", "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_line_with_status_1(
    words: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words.split()]) == 1
    error = capsys.readouterr().err.strip()
    assert told in error
    assert error.startswith("moeviz train: ")
    assert len(error.splitlines()) == 1


def test_help_shows_the_values_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--preset", "olmoe-tiny", "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Routed experts of a layer, E. (default: 64)" in text
    assert "--log-routing" in text


def test_a_run_from_beginning_to_end_and_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_packing: None
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TOY, "--log-routing"]) == 0
    told = capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("smoke-")
    assert "step 4/4  loss " in told
    assert "validation loss" in told
    assert f"moeviz tui runs/{run.name}" in told
    assert main(["train", "--resume", "--max-steps", "6"]) == 0
    assert "step 6/6" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert parse(["--resume", str(run), "--max-steps", "9"]).log_routing, (
        "what was recorded goes on being recorded"
    )


def test_a_run_folder_is_used_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_packing: None
) -> None:
    words = ["train", *TOY, "--run", str(tmp_path / "run"), "--max-steps", "1", "--eval-every", "0"]
    assert main(words) == 0
    assert main(words) == 1
    assert "already holds a run; go on with --resume" in capsys.readouterr().err


def test_resuming_a_changed_model_names_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_packing: None
) -> None:
    run = str(tmp_path / "run")
    assert main(["train", *TOY, "--run", run, "--max-steps", "1", "--eval-every", "0"]) == 0
    assert main(["train", "--resume", run, "--num-experts", "6", "--max-steps", "2"]) == 1
    assert "model.num_experts=6 differs from 4" in capsys.readouterr().err


def test_a_damaged_checkpoint_that_was_named_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_packing: None
) -> None:
    run = tmp_path / "run"
    assert main(["train", *TOY, "--run", str(run), "--eval-every", "0"]) == 0
    newest = list_checkpoints(run / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"short")
    assert main(["train", "--resume", str(newest), "--max-steps", "9"]) == 1
    told = capsys.readouterr().err
    assert "model.safetensors has 5 bytes instead of" in told
    assert "the one before is" in told
    assert parse(["--resume", str(run), "--max-steps", "9"]).resume == str(newest.with_name("step-00000002"))
    assert "Continuing from" in capsys.readouterr().err


def test_parsing_raises_for_other_code() -> None:
    with pytest.raises(MoevizError, match="preset=nope is unknown"):
        parse(["--preset", "nope"])


def test_flags_that_people_of_the_field_type_mean_what_they_expect() -> None:
    words = (
        "--dim 64 --n-layers 3 --n-heads 4 --n-kv-heads 2 --num-experts 6 --top-k 3 --batch-size 5 "
        "--gradient-accumulation-steps 2 --max-steps 9 --learning-rate 0.25 --weight-decay 0.5 --warmup-steps 4 "
        "--grad-clip 0.75 --seq-len 48 --train-data texts --val-data more"
    )
    config = parsed(f"--preset smoke {words}")
    model, data, optim = config.model, config.data, config.optim
    assert (model.dim, model.num_layers, model.num_heads, model.num_kv_heads) == (64, 3, 4, 2)
    assert (model.num_experts, model.top_k) == (6, 3)
    assert (data.batch_size, data.gradient_accumulation_steps, data.seq_len) == (5, 2, 48)
    assert (data.train_data, data.val_data) == ("texts", "more")
    assert (optim.learning_rate, optim.weight_decay, optim.grad_clip) == (0.25, 0.5, 0.75)
    assert (config.max_steps, config.schedule.warmup_steps) == (9, 4)
    for spelling in ("--n_layers", "--n-layers"):
        assert parse(["--preset", "smoke", spelling, "3"]).model.num_layers == 3
