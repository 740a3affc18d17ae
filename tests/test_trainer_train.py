"""What the loop promises: recording changes no bit, losses are losses, and trouble is told without losing the run."""

from __future__ import annotations

import errno
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from trainer_runs import TOY, StopAfter, corpus_cache, no_packing, toy

from model.config import ModelConfig
from model.lm import MoELanguageModel
from model.presets import PRESETS as MODEL_PRESETS
from model.router import Routing, routers
from moeviz.errors import MoevizError
from moeviz.policy import EVERYTHING
from moeviz.store import queries_series as queries
from moeviz.store.queries_tokens import sequences
from moeviz.store.reader import open_run
from trainer import checkpoint_folder
from trainer.checkpoint import SaveError, load_checkpoint
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import TrainConfig
from trainer.data_batches import TokenBatches
from trainer.presets import preset_names, train_preset
from trainer.text import open_text
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]

pytestmark = pytest.mark.usefixtures("no_packing")


def weights_of(result: TrainResult) -> dict[str, Tensor]:
    assert result.checkpoint is not None
    return load_file(result.checkpoint / "model.safetensors")


def assert_same(one: TrainResult, other: TrainResult) -> None:
    assert one.losses == other.losses
    first, second = weights_of(one), weights_of(other)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> TrainResult:
    """TOY as it is: no routing recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeviz.store.run._in_process", lambda module, *args: True)
        return train(toy(tmp_path_factory.mktemp("plain") / "run"))


def test_recording_everything_changes_no_bit(plain: TrainResult, tmp_path: Path) -> None:
    watched = train(toy(tmp_path / "run", log_routing=True, sampling=EVERYTHING))
    assert_same(watched, plain)
    assert watched.evaluations == plain.evaluations


def test_recording_changes_no_bit_under_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    parts = {"engine": "deepspeed", "zero_stage": 1}
    watched = train(toy(tmp_path / "watched", engine=parts, log_routing=True, sampling=EVERYTHING))
    assert_same(watched, train(toy(tmp_path / "plain", engine=parts)))


def test_evaluating_changes_no_bit(plain: TrainResult, tmp_path: Path) -> None:
    assert_same(train(toy(tmp_path / "run", evaluation={"eval_every": 0})), plain)


def test_training_lowers_the_loss_and_another_seed_is_another_run(plain: TrainResult, tmp_path: Path) -> None:
    assert plain.losses[0] == pytest.approx(math.log(280), rel=0.02), "an untrained model guesses uniformly"
    assert plain.losses[-1] < plain.losses[0] - 0.2
    assert train(toy(tmp_path / "run", max_steps=2, seed=1)).losses != plain.losses[:2]


def test_micro_batches_and_batch_size_multiply_to_the_same_step(plain: TrainResult, tmp_path: Path) -> None:
    """Same rows a step, so the same loss up to rounding, and exactly the same counts, which move the bias."""
    data = {"batch_size": 4, "gradient_accumulation_steps": 1}
    merged = train(toy(tmp_path / "run", data=data, max_steps=3))
    assert merged.losses == pytest.approx(plain.losses[:3], abs=1e-4)


def test_the_bias_moves_by_the_sign_of_the_missing_load_of_the_whole_step(tmp_path: Path) -> None:
    config = toy(tmp_path / "run", max_steps=1)
    trained = weights_of(train(config))
    text = open_text(config, quiet=True)
    torch.manual_seed(config.seed)
    model = MoELanguageModel(text.fit(config.architecture))
    counts_LE = torch.zeros(2, 4)

    def count(layer: int, routing: Routing) -> None:
        counts_LE[layer] += torch.bincount(routing.expert_ids_TK.flatten(), minlength=4)

    for layer, router in enumerate(routers(model)):
        router.register_forward_hook(lambda _module, _args, routing, layer=layer: count(layer, routing))
    for micro_batch in range(config.data.gradient_accumulation_steps):
        batch = text.batches.batch(0, micro_batch)
        model(torch.from_numpy(batch.input_ids_BS), torch.from_numpy(batch.labels_BS))
    for layer in range(2):
        expected = config.balance.bias_step * torch.sign(counts_LE[layer].mean() - counts_LE[layer])
        torch.testing.assert_close(
            trained[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"], expected
        )


def test_a_run_out_of_time_ends_like_a_finished_one(plain: TrainResult, tmp_path: Path) -> None:
    config = toy(tmp_path / "run")
    result = train(replace(config, max_minutes=1e-9))
    assert result.steps_done == 1
    assert not result.interrupted
    assert result.losses == plain.losses[:1]
    assert set(result.evaluations) == {0, 1}
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step-00000001"
    with open_run(result.run) as store:
        assert "ended" in set(store.sql("SELECT kind FROM events")["kind"])


def test_validation_loss_is_cross_entropy_on_the_held_out_windows(plain: TrainResult) -> None:
    """Oracle: whole logits and torch's own cross-entropy; bytes counted by decoding."""
    assert plain.checkpoint is not None
    model, tokenizer, config, step = load_checkpoint(plain.checkpoint)
    assert tokenizer is not None
    text = open_text(replace(config, data=replace(config.data, batch_size=1)), quiet=True)
    held_out = {name for name in text.batches.domains if text.batches.shards.num_tokens("validation", name)}
    assert set(plain.evaluations[step]) == held_out
    for domain, told in plain.evaluations[step].items():
        nats, tokens, num_bytes, correct = 0.0, 0, 0, 0
        for batch in text.batches.validation(domain, num_tokens=config.evaluation.eval_sequences * 16):
            labels_BS = torch.from_numpy(batch.labels_BS)
            with torch.no_grad():
                logits_BSV = model(torch.from_numpy(batch.input_ids_BS)).logits_BSV
            nats += F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum").item()
            tokens += labels_BS.numel()
            correct += int((logits_BSV.argmax(dim=-1) == labels_BS).sum())
            ids = [token for token in batch.labels_BS.flatten().tolist() if token != tokenizer.eos_id]
            num_bytes += len(tokenizer.encoding.decode_bytes(ids))
        assert told.num_tokens == tokens <= config.evaluation.eval_sequences * 16
        assert told.loss_nats == pytest.approx(nats / tokens, rel=1e-5)
        assert told.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert told.accuracy == pytest.approx(correct / tokens)
        assert told.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_token_lengths_add_up_to_the_text(corpus_cache: Path) -> None:
    tokenizer = open_text(TOY, quiet=True).tokenizer
    assert tokenizer is not None
    words = "3 + 4 = 7; naïve “quotes”\n"
    lengths_V = tokenizer.token_lengths()
    assert lengths_V[tokenizer.encode(words)].sum() == len(words.encode())
    assert lengths_V[tokenizer.eos_id] == 0


def test_what_is_recorded_is_what_happened(tmp_path: Path) -> None:
    config = toy(tmp_path / "run", log_routing=True, sampling=EVERYTHING)
    result = train(config)
    with open_run(result.run) as store:
        told = queries.scalars(store)
        seen = sequences(store, last=1000)
        kinds = queries.events(store)["kind"].tolist()
        counts = store.sql(
            "SELECT step, layer, sum(c) AS n FROM (SELECT step, layer, unnest(counts) AS c FROM expert_load) "
            "GROUP BY ALL"
        )
    values = dict(list(told.groupby("name")))
    assert values["loss"]["value"].tolist() == pytest.approx(result.losses)
    assert values["val_loss/arithmetic"]["step"].tolist() == [0, 3, 6]
    assert values["val_loss/arithmetic"]["value"].tolist() == pytest.approx(
        [result.evaluations[step]["arithmetic"].loss_nats for step in (0, 3, 6)]
    )
    assert {"lr", "grad_norm", "tokens_per_second", "step_seconds", "val_loss"} <= set(values)
    tokens = config.data.tokens_per_step
    assert len(counts) == 6 * 2
    assert set(counts["n"]) == {tokens * 2}, "evaluation is not counted"
    batches = open_text(config, quiet=True).batches
    assert _domains(seen, 5) == [name for m in range(2) for name in batches.batch(5, m).domains]
    assert kinds[0] == "started"
    assert kinds[-1] == "ended"
    assert "checkpoint" in kinds


def _domains(seen, step: int) -> list[str]:  # type: ignore[no-untyped-def]
    return seen[seen["step"] == step].sort_values("seq")["domain"].tolist()


def test_a_dense_model_trains_and_says_that_it_has_no_routing(tmp_path: Path) -> None:
    dense = toy(tmp_path / "dense", model={"first_dense_layers": 2}, max_steps=2)
    watcher = StopAfter()
    result = train(dense, progress=watcher)
    assert len(result.losses) == 2
    assert all(math.isnan(report.worst_load) for report in watcher.reports)
    watcher = StopAfter()
    assert (
        train(replace(dense, run=tmp_path / "watched", log_routing=True), progress=watcher).losses
        == result.losses
    )
    assert any("no experts" in note for note in watcher.notes)


def test_the_report_names_the_busiest_expert(tmp_path: Path) -> None:
    watcher = StopAfter()
    train(toy(tmp_path / "run", max_steps=1, log_routing=True), progress=watcher)
    with open_run(tmp_path / "run") as store:
        busiest = store.sql(
            "SELECT layer, c.i AS expert, c.n / tokens / 2.0 * 4 AS load FROM (SELECT layer, tokens, "
            "unnest([{i: i - 1, n: counts[i]} FOR i IN range(1, 5)]) AS c FROM expert_load) ORDER BY load DESC LIMIT 1"
        ).iloc[0]
    (report,) = watcher.reports
    assert report.worst_load == pytest.approx(busiest["load"])
    assert report.worst_expert == (busiest["layer"], busiest["expert"])


def test_a_full_disk_on_the_way_does_not_stop_training(
    plain: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_checkpoints(monkeypatch, "step-00000004")
    watcher = StopAfter()
    result = train(toy(tmp_path / "run", checkpoint={"save_every": 2}), progress=watcher)
    assert_same(result, plain)
    assert ["No space left" in note and "Training goes on" in note for note in watcher.notes] == [True]
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-00000002", "step-00000006"]
    with open_run(tmp_path / "run") as store:
        assert "checkpoint_failed" in queries.events(store)["kind"].tolist()


def test_a_full_disk_at_the_end_is_an_error_and_the_checkpoint_before_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_checkpoints(monkeypatch, "step-00000006")
    with pytest.raises(SaveError, match="no checkpoint of step 6"):
        train(toy(tmp_path / "run", checkpoint={"save_every": 4}))
    (kept,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert load_checkpoint(kept)[3] == 4
    with open_run(tmp_path / "run") as store:
        last = queries.events(store).iloc[-1]
    assert (last["kind"], "failed" in str(last["detail"])) == ("ended", True)


def refuse_checkpoints(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full whenever a checkpoint of this name is made durable."""
    sync = checkpoint_folder._sync

    def full(path: Path) -> None:
        if name in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint_folder, "_sync", full)


def test_a_loss_that_is_no_number_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match=r"step \d+ has loss=.*lower learning_rate=1e\+30"):
        train(toy(tmp_path / "run", optim={"learning_rate": 1e30}, schedule={"warmup_steps": 0}))


def test_a_folder_that_holds_a_run_is_not_touched(tmp_path: Path) -> None:
    config = toy(tmp_path / "run", max_steps=1)
    train(config)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(MoevizError, match=r"already holds a run; go on with --resume"):
        train(config)
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no file or folder at"), ("", "empty|no text"), ("  \n ", "empty")]
)
def test_missing_and_empty_data_are_refused_before_a_run_is_made(
    content: str | None, message: str, tmp_path: Path
) -> None:
    source = tmp_path / "text.txt"
    if content is not None:
        source.write_text(content)
    with pytest.raises(MoevizError, match=message):
        train(toy(tmp_path / "run", data={"train_data": str(source)}))
    assert not (tmp_path / "run").exists()


def test_own_text_is_trained_on_and_other_text_evaluated_on(tmp_path: Path) -> None:
    for name, word in (("letters", "alpha beta gamma delta"), ("numbers", "one two three four")):
        (tmp_path / "texts").mkdir(exist_ok=True)
        lines = (f"{word} {i} {i * 37 % 101}\n" for i in range(400))
        (tmp_path / "texts" / f"{name}.txt").write_text("".join(lines))
    (tmp_path / "other.txt").write_text("".join(f"gamma three {i} beta two\n" for i in range(200)))
    data = {"train_data": str(tmp_path / "texts"), "val_data": str(tmp_path / "other.txt")}
    result = train(toy(tmp_path / "run", data=data, max_steps=3))
    assert set(result.evaluations[3]) == {"other"}
    assert result.evaluations[3]["other"].loss_nats < result.evaluations[0]["other"].loss_nats


def test_every_preset_is_a_config_and_survives_json() -> None:
    assert set(MODEL_PRESETS) <= set(preset_names())
    for name in [*preset_names(), "depth-3"]:
        config = train_preset(name)
        assert config.preset == name
        assert TrainConfig.from_dict(config.to_dict()) == config
        assert (config.architecture.num_moe_layers > 0) == (not name.startswith("gpt2"))
    with pytest.raises(MoevizError, match=r"preset=demmo is unknown; did you mean demo\?"):
        train_preset("demmo")


def test_batches_of_ranks_partition_the_step() -> None:
    """The rows of two ranks are the rows of one: what a step sees does not depend on the number of ranks."""
    text = open_text(TOY, quiet=True)
    wide = TokenBatches(text.batches.shards, batch_size=4, seq_len=16, micro_batches=2)
    narrow = TokenBatches(text.batches.shards, batch_size=2, seq_len=16, micro_batches=2)
    rows = {tuple(row) for m in range(2) for row in wide.batch(3, m).input_ids_BS.tolist()}
    split = {
        tuple(row)
        for m in range(2)
        for r in range(2)
        for row in narrow.batch(3, m, r, 2).input_ids_BS.tolist()
    }
    assert rows == split


def test_the_toy_is_a_mixture_of_experts() -> None:
    assert isinstance(TOY.model, ModelConfig)
    assert TOY.architecture.router.selection_bias
