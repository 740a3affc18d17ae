"""A checkpoint is whole or absent, describes itself, names its damage, and needs no pickle."""

from __future__ import annotations

import errno
import json
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.lm import MoELanguageModel
from moeviz.errors import MoevizError, RunNotFoundError
from trainer import checkpoint_folder
from trainer.checkpoint import SaveError, load_checkpoint, read_checkpoint, restore, save_checkpoint
from trainer.checkpoint_folder import keep_newest, list_checkpoints, set_aside_after
from trainer.config import InputConfig, TrainConfig
from trainer.engine import Engine, build_engine
from trainer.resume import check_resumable, find_checkpoint
from trainer.standing import Standing
from trainer.text import Text, open_text

MODEL = ModelConfig(
    vocab_size=280,
    dim=16,
    num_layers=2,
    num_heads=2,
    num_experts=4,
    top_k=2,
    expert_dim=16,
    tie_embeddings=True,
)
CONFIG = TrainConfig(
    model=MODEL,
    max_steps=9,
    data=InputConfig(train_data="generated", bytes_per_domain=8000, seq_len=8, batch_size=2),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Text]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEVIZ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield open_text(CONFIG, quiet=True)


def engine_of(text: Text, seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    return build_engine(MoELanguageModel(text.fit(CONFIG.architecture)), CONFIG)


@pytest.fixture
def engine(text: Text) -> Engine:
    return engine_of(text)


def save(folder: Path, step: int, engine: Engine, text: Text) -> Path:
    return save_checkpoint(folder, step=step, config=CONFIG, engine=engine, text=text, standing=Standing())


def run_with(run: Path, engine: Engine, text: Text, *steps: int) -> Path:
    for step in steps:
        save(run / "checkpoints", step, engine, text)
    return run


def test_a_folder_describes_itself(tmp_path: Path, engine: Engine, text: Text) -> None:
    path = save(tmp_path, 7, engine, text)
    model, tokenizer, config, step = load_checkpoint(path)
    assert (path.name, step, config) == ("step-00000007", 7, CONFIG)
    assert not model.training
    ours = engine.module.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay tied"
    assert tokenizer is not None
    assert text.tokenizer is not None
    assert tokenizer.key == text.tokenizer.key
    assert model.config.vocab_size == text.tokenizer.vocab_size


def test_restoring_brings_back_the_random_generators(tmp_path: Path, engine: Engine, text: Text) -> None:
    torch.manual_seed(5)
    torch.rand(3)
    path = save(tmp_path, 1, engine, text)
    expected = torch.rand(4)
    torch.manual_seed(6)
    restore(read_checkpoint(path), engine)
    assert torch.equal(torch.rand(4), expected)


def test_every_file_is_in_the_manifest_and_no_temporary_stays(
    tmp_path: Path, engine: Engine, text: Text
) -> None:
    path = save(tmp_path, 3, engine, text)
    files = {file.name for file in path.iterdir()}
    assert set(json.loads((path / "manifest.json").read_text())) == files - {"manifest.json"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000003"]


def test_files_hold_nothing_that_runs_code(tmp_path: Path, engine: Engine, text: Text) -> None:
    """Every global that the pickles of torch's files name is a tensor's, a container's or a number's."""
    path = save(tmp_path, 3, engine, text)
    named = set()
    for file in path.glob("*.pt"):
        with zipfile.ZipFile(file) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
        named |= {
            arg
            for data in pickles
            for op, arg, _ in pickletools.genops(data)
            if op.name in ("GLOBAL", "STACK_GLOBAL")
        }
    assert named
    assert all(str(name).split()[0] in ("torch", "torch._utils", "collections") for name in named), named


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damage_is_named_and_so_is_the_checkpoint_before(
    damage: str, tmp_path: Path, engine: Engine, text: Text
) -> None:
    run = run_with(tmp_path / "run", engine, text, 2, 4)
    bad = run / "checkpoints" / "step-00000004"
    file = bad / ("manifest.json" if damage == "manifest" else "model.safetensors")
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        file.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        MoevizError, match=rf"step-00000004 is damaged: {file.name}.*the one before is .*00000002"
    ):
        load_checkpoint(bad)
    notes: list[str] = []
    found = find_checkpoint(str(run), None, note=notes.append)
    assert found.step == 2
    assert "step-00000004 is damaged" in notes[0]
    assert "Continuing from" in notes[0]
    with pytest.raises(MoevizError, match="damaged"):
        find_checkpoint(str(bad), None)


def test_what_resume_can_mean(tmp_path: Path, engine: Engine, text: Text) -> None:
    run = run_with(tmp_path / "runs" / "a", engine, text, 2, 4)
    assert find_checkpoint(str(run), None).step == 4
    assert find_checkpoint(str(run / "checkpoints" / "step-00000002"), None).step == 2
    assert find_checkpoint("latest", run).step == find_checkpoint(str(run / "checkpoints"), None).step == 4
    run_with(tmp_path / "runs" / "b", engine, text, 1)
    assert find_checkpoint("latest", None, tmp_path / "runs").step == 1
    with pytest.raises(RunNotFoundError, match="no run at"):
        find_checkpoint(str(tmp_path / "nowhere"), None)
    with pytest.raises(RunNotFoundError, match="no run with a checkpoint"):
        find_checkpoint("latest", None, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MoevizError, match="has no checkpoint"):
        find_checkpoint(str(tmp_path / "empty"), None)


def test_a_resumed_run_keeps_its_model_data_and_engine(tmp_path: Path, engine: Engine, text: Text) -> None:
    found = read_checkpoint(save(tmp_path, 3, engine, text))
    check_resumable(found, replace(CONFIG, max_steps=100, run=Path("elsewhere")))
    check_resumable(found, replace(CONFIG, optim=replace(CONFIG.optim, learning_rate=0.5)))
    for changed, name in (
        (replace(CONFIG, model=replace(MODEL, num_experts=8)), "model.num_experts=8 differs from 4"),
        (replace(CONFIG, data=replace(CONFIG.data, batch_size=3)), "data.batch_size=3 differs from 2"),
        (
            replace(CONFIG, engine=replace(CONFIG.engine, engine="deepspeed")),
            "engine.engine=deepspeed differs",
        ),
        (replace(CONFIG, seed=1), "seed=1 differs from 0"),
        (replace(CONFIG, max_steps=3), "has 3 steps done; raise --max-steps"),
    ):
        with pytest.raises(MoevizError, match=name):
            check_resumable(found, changed)


def test_a_crash_before_the_rename_leaves_the_previous_checkpoint_and_no_other(
    tmp_path: Path, engine: Engine, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2, engine, text)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "_sync", _crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 4, engine, text)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert read_checkpoint(tmp_path / "step-00000002").step == 2
    save(tmp_path, 6, engine, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000006"]


def _crash(path: Path) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_one_sentence_and_changes_nothing(
    tmp_path: Path, engine: Engine, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = save(tmp_path, 2, engine, text)

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_folder, "_sync", refuse)
    with pytest.raises(SaveError, match=r"no checkpoint of step 4: .*No space left.*free space"):
        save(tmp_path, 4, engine, text)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert read_checkpoint(kept).step == 2


def test_a_disk_that_takes_a_part_of_a_file_is_one_sentence_too(
    tmp_path: Path, engine: Engine, text: Text
) -> None:
    """A limit of the system for the size of a file, which torch reports in words of its own."""
    resource = pytest.importorskip("resource", reason="this system has no such limits")
    kept = save(tmp_path, 2, engine, text)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SaveError, match=r"no checkpoint of step 4: .*cut short.*free space"):
            save(tmp_path, 4, engine, text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path, engine: Engine, text: Text) -> None:
    path = save(tmp_path, 2, engine, text)
    (path / "model.safetensors").write_bytes(b"")
    save(tmp_path, 2, engine, text)
    assert read_checkpoint(path).step == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000002"]


def test_only_the_newest_are_kept(tmp_path: Path, engine: Engine, text: Text) -> None:
    run_with(tmp_path, engine, text, 8, 9, 10, 11)
    keep_newest(tmp_path / "checkpoints", 2)
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "checkpoints")] == ["10", "11"]


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path, engine: Engine, text: Text) -> None:
    run = run_with(tmp_path, engine, text, 2, 4, 6)
    moved = set_aside_after(run / "checkpoints", 2)
    assert [path.name for path in moved] == ["superseded-step-00000004", "superseded-step-00000006"]
    assert find_checkpoint(str(run), None).step == 2
    keep_newest(run / "checkpoints", 1)
    assert all(path.exists() for path in moved), "what was set aside is not the trainer's to remove"
