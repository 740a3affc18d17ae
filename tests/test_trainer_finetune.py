"""A new run from trained weights: all of them arrive, what is frozen stays, and mistakes are told with a remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trainer_runs import TOY, StopAfter, corpus_cache, no_packing, toy

from model.config import ModelConfig
from model.hf import from_hf, to_hf
from model.lm import MoELanguageModel
from moeviz.commands.train import parse
from moeviz.errors import MoevizError
from trainer.checkpoint import load_checkpoint
from trainer.checkpoint_folder import BEST, list_checkpoints
from trainer.frozen import PARTS, freeze
from trainer.resume import find_checkpoint
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]

pytestmark = pytest.mark.usefixtures("no_packing", "corpus_cache")

MODEL = ModelConfig(
    vocab_size=20, dim=8, num_layers=2, num_heads=2, num_experts=4, expert_dim=6, num_shared_experts=1
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> TrainResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeviz.store.run._in_process", lambda module, *args: True)
        return train(toy(tmp_path_factory.mktemp("trained") / "run", evaluation={"eval_every": 0}))


def weights_of(checkpoint: Path | None) -> dict[str, Tensor]:
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def trainable(model: MoELanguageModel) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_words_and_globs_name_parts_and_every_weight_has_a_word() -> None:
    names = {name for name, _ in MoELanguageModel(MODEL).named_parameters()}
    for word in PARTS:
        model = MoELanguageModel(MODEL)
        freeze(model, (word,), ())
        assert trainable(model) < names
    model = MoELanguageModel(MODEL)
    with pytest.raises(MoevizError, match="every weight is frozen"):
        freeze(model, tuple(PARTS), ())
    freeze(model, ("router|experts", "model.layers.1.*"), ())
    assert not any(".mlp.gate." in name or ".mlp.experts." in name for name in trainable(model))
    assert not any(name.startswith("model.layers.1.") for name in trainable(model))
    freeze(model, (), ("router",))
    assert trainable(model) == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
    freeze(model, ("model.layers.0.*",), ("router",))
    assert trainable(model) == {"model.layers.1.mlp.gate.weight"}


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("expert", "did you mean experts"),
        ("gate_up", "experts.gate_up_proj"),
        ("zzz", "there is router, experts, shared_experts, attention, embeddings, norms, or a glob"),
    ],
)
def test_a_part_that_matches_nothing_is_told(part: str, told: str) -> None:
    with pytest.raises(MoevizError, match=f"no weight belongs to '{part}'.*") as error:
        freeze(MoELanguageModel(MODEL), (part,), ())
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("engine", "stage", "dtype"), [("torch", 0, "fp32"), ("torch", 0, "bf16"), ("deepspeed", 2, "fp32")]
)
def test_only_the_router_moves_where_only_it_is_trained(
    engine: str, stage: int, dtype: str, trained: TrainResult, tmp_path: Path
) -> None:
    pytest.importorskip(engine, reason="DeepSpeed is not installed")
    parts = {"engine": engine, "zero_stage": stage, "dtype": dtype}
    config = toy(tmp_path / "run", engine=parts, evaluation={"eval_every": 0}, max_steps=2)
    tuned = train(replace(config, init_from=str(trained.run), train_only=("router",)))
    before, after = weights_of(trained.checkpoint), weights_of(tuned.checkpoint)
    moved = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    assert {name for name in moved if not name.endswith("correction_bias")} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)
    }


def test_a_frozen_router_keeps_its_bias_too(trained: TrainResult, tmp_path: Path) -> None:
    config = toy(tmp_path / "run", evaluation={"eval_every": 0}, max_steps=2)
    tuned = train(replace(config, init_from=str(trained.run), freeze=("router",)))
    before, after = weights_of(trained.checkpoint), weights_of(tuned.checkpoint)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if ".mlp.gate." in name}


def test_fine_tuning_begins_with_the_loss_that_training_ended_with(
    trained: TrainResult, tmp_path: Path
) -> None:
    config = parse(["--init-from", str(trained.run), "--run", str(tmp_path / "run"), "--max-steps", "2"])
    assert config.optim.learning_rate == pytest.approx(0.1 * TOY.optim.learning_rate)
    assert (config.model, config.data.seq_len) == (TOY.architecture.__class__(**vars(config.model)), 16)
    begun = train(replace(config, evaluation=replace(config.evaluation, eval_every=1)))
    assert begun.steps_done == 2
    assert trained.checkpoint is not None
    resumed = toy(
        tmp_path / "other", resume=str(trained.checkpoint), max_steps=7, evaluation={"eval_every": 1}
    )
    onwards = train(replace(resumed, run=None))
    assert begun.evaluations[0] == onwards.evaluations[6], "the same weights on the same held-out text"
    gone_on = parse(["--resume", str(tmp_path / "run"), "--max-steps", "3"])
    assert train(gone_on).steps_done == 3


def test_a_folder_of_transformers_is_a_beginning(trained: TrainResult, tmp_path: Path) -> None:
    assert trained.checkpoint is not None
    vocab_size = load_checkpoint(trained.checkpoint).model.config.vocab_size
    to_hf(MoELanguageModel(replace(TOY.model, vocab_size=vocab_size)), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((trained.checkpoint / "tokenizer.json").read_bytes())
    small = "--train-data generated --bytes-per-domain 12000 --seq-len 16 --batch-size 2 --max-steps 1 --eval-every 0"
    words = [
        "--init-from",
        str(tmp_path / "hf"),
        "--run",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        *small.split(),
    ]
    tuned = train(parse([*words, "--train-only", "norms"]))
    before = {name: value.detach() for name, value in from_hf(tmp_path / "hf").state_dict().items()}
    after = weights_of(tuned.checkpoint)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("norm" in name for name in moved)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--num-experts 6", "leave out the flags that change the architecture"),
        ("--num-layers 3", "leave out the flags that change the architecture"),
        ("--freeze ruoter", "no weight belongs to 'ruoter'; did you mean router"),
    ],
)
def test_what_does_not_fit_the_weights_is_told(
    words: str, told: str, trained: TrainResult, tmp_path: Path
) -> None:
    config = parse(["--init-from", str(trained.run), "--run", str(tmp_path / "run"), *words.split()])
    with pytest.raises(MoevizError, match=told):
        train(config)
    assert not (tmp_path / "run").exists()


def test_mistaken_beginnings_are_told(trained: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match="no run at nowhere"):
        parse(["--init-from", "nowhere"])
    with pytest.raises(MoevizError, match="with --resume: a resumed run has its weights"):
        parse(["--init-from", str(trained.run), "--resume", str(trained.run)])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "frobnicate"}))
    with pytest.raises(MoevizError, match="frobnicate"):
        parse(["--init-from", str(tmp_path)])


def test_the_best_weights_are_kept_beside_the_newest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Validation losses 9, 5, 7, 3, 8 of steps 0, 1, 2, 3, 4: 3 is kept, and 5 only until then."""
    told = iter([9.0, 5.0, 7.0, 3.0, 8.0, 3.0, 8.0])
    monkeypatch.setattr("trainer.train.evaluation_scalars", lambda losses: {"val_loss": next(told)})
    checkpoint = {"save_every": 0, "keep_checkpoints": 1, "keep_best": True}
    config = toy(tmp_path / "run", max_steps=4, checkpoint=checkpoint, evaluation={"eval_every": 1})
    watcher = StopAfter()
    train(config, progress=watcher, interrupt=watcher.interrupt)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000003", "step-00000004"]
    assert (folder / BEST).resolve().name == "step-00000003"
    assert load_checkpoint(folder / BEST).step == 3
    assert find_checkpoint(str(tmp_path / "run"), None).step == 4, "resuming goes on from the newest"
    assert find_checkpoint(str(folder / BEST), None).path.name == "step-00000003"
    again = train(replace(config, run=None, resume=str(folder / BEST), max_steps=4))
    assert again.steps_done == 4
    assert (folder / BEST).resolve().name == "step-00000003"
