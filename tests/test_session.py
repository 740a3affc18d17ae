"""`moeviz.watch` with a run folder: what training did is what a reader finds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_models import Kept, batches, small_model, train

import moeviz
from moeviz.alerts import AlertConfig
from moeviz.errors import MoevizError
from moeviz.policy import SamplingPolicy
from moeviz.records import LoadRecord
from moeviz.store.quantise import SUM_ERROR
from moeviz.store.run import read_info
from moeviz.vocabulary import describe_tokenizer, token_texts

STEPS = 4
POLICY = SamplingPolicy(route_every=2, attention_every=2, attention_heads=2)


def train_watched(run: Path | None, steps: int = STEPS, **options: Any) -> None:
    model = small_model()
    with moeviz.watch(model, run, policy=POLICY, **options) as probe:
        train(model, list(batches(steps, 2, padded=True)), lambda loss: probe.step(loss=loss))


def test_readers_find_what_the_probe_saw(tmp_path: Path) -> None:
    sink = Kept()
    train_watched(None, sink=sink)
    run = tmp_path / "mine"
    train_watched(run, vocab=[f"<{token}>" for token in range(61)], config={"lr": 3e-3}, planned_steps=STEPS)
    store = moeviz.open_run(run)
    rows = store.sql("SELECT step, layer, tokens, counts, prob_sum FROM expert_load ORDER BY step, layer")
    loads = sink.of(LoadRecord)
    assert len(rows) == STEPS * 2
    for row in rows.itertuples():
        load = loads[row.step]
        assert row.tokens == load.tokens
        assert row.counts.tolist() == load.counts_LE[row.layer].tolist()
        assert load.prob_sum_LE is not None
        np.testing.assert_allclose(row.prob_sum, load.prob_sum_LE[row.layer], rtol=SUM_ERROR)
    assert store.sql("SELECT DISTINCT step FROM routing ORDER BY step").step.tolist() == [0, 2]
    assert store.sql("SELECT count(*) AS n FROM attention").n[0] == 2 * 2 * 3 * 2
    once = store.sql("SELECT step, layer, name FROM metrics GROUP BY ALL HAVING count(*) > 1")
    assert len(once) == 0, "a metric of a step and layer is written once"
    assert (run / "run.duckdb").exists()
    assert not (run / "routing").exists(), "a clean end packs the run"
    info = store.info
    assert (info.name, info.planned_steps, info.config["lr"]) == ("mine", STEPS, 3e-3)
    assert info.config["alert_rules"] == asdict(AlertConfig()), "what the run was judged by"
    assert store.sql("SELECT text FROM vocab WHERE token_id = 7").text[0] == "<7>"


def events_of(run: Path) -> list[tuple[str, Any]]:
    events = moeviz.open_run(run).sql("SELECT kind, detail FROM events ORDER BY ts")
    return list(zip(events.kind, events.detail, strict=True))


def fail_in_training(run: Path) -> None:
    model = small_model()
    with moeviz.watch(model, run, policy=POLICY) as probe:
        train(model, list(batches(2, 1)), lambda loss: probe.step(loss=loss))
        raise KeyError("theirs")


def test_run_says_how_it_ended(tmp_path: Path) -> None:
    train_watched(tmp_path / "good", pack=False)
    assert [kind for kind, _ in events_of(tmp_path / "good")] == ["started", "ended"]
    assert "finished" in str(events_of(tmp_path / "good")[-1][1])
    with pytest.raises(KeyError):
        fail_in_training(tmp_path / "bad")
    kind, detail = events_of(tmp_path / "bad")[-1]
    assert kind == "ended"
    assert "failed" in str(detail)
    assert "KeyError" in str(detail)
    assert (tmp_path / "bad" / "expert_load").exists(), "what failed is left as it is"


def test_resumed_run_replaces_the_steps_that_are_trained_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_watched(run)
    with pytest.raises(MoevizError, match="already holds a run"):
        train_watched(run)
    train_watched(run, steps=3, resume_from=2)
    store = moeviz.open_run(run)
    assert store.sql("SELECT DISTINCT step FROM expert_load ORDER BY step").step.tolist() == [0, 1, 2, 3, 4]
    assert store.sql("SELECT count(*) AS n FROM expert_load").n[0] == 5 * 2
    assert [kind for kind, _ in events_of(run)].count("resumed") == 1
    assert [attempt.from_step for attempt in read_info(run).attempts] == [0, 2]


def test_run_of_another_model_is_not_resumed(tmp_path: Path) -> None:
    train_watched(tmp_path / "run", pack=False)
    with pytest.raises(MoevizError, match="same model"):
        moeviz.watch(small_model(num_experts=5), tmp_path / "run", resume_from=2)


@pytest.mark.parametrize("where", [{}, {"run": "somewhere", "sink": Kept()}])
def test_one_place_to_write_to(
    where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoevizError, match="either a run folder or a sink"):
        moeviz.watch(small_model(), **where)
    assert [*tmp_path.iterdir()] == []


def test_refused_model_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match="dense"):
        moeviz.watch(torch.nn.Linear(2, 2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("alerts", [False, True])
def test_alerts_can_be_left_out_and_metrics_stay(alerts: bool, tmp_path: Path) -> None:
    eager = AlertConfig(arm_after=1, raise_after=1, window_min=2)
    model, said = small_model(), []
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.mlp.gate.weight.zero_()
            block.mlp.gate.weight[:2] += 1.0
    run = tmp_path / "run"
    with moeviz.watch(
        model, run, alerts=eager if alerts else False, on_alert=said.append, pack=False
    ) as probe:
        for _ in range(30):
            model(torch.randint(0, 61, (4, 32)))
            probe.step()
    store = moeviz.open_run(run)
    assert (store.sql("SELECT count(*) AS n FROM alerts").n[0] > 0) == bool(said) == alerts
    assert store.sql("SELECT count(*) AS n FROM metrics WHERE name = 'n_eff'").n[0] == 60


class Words:
    """A tokenizer in the style of transformers."""

    name_or_path = "words"

    def __len__(self) -> int:
        return 3

    def decode(self, ids: list[int]) -> str:
        return "abc"[ids[0]]


class Bytes:
    """A tokenizer in the style of tiktoken, with a gap between its ids."""

    name = "bytes"
    n_vocab = 3

    def decode_single_token_bytes(self, token_id: int) -> bytes:
        return {0: b"a", 2: b"\xff"}[token_id]


def test_texts_come_from_any_tokenizer() -> None:
    assert token_texts(Words()) == ["a", "b", "c"]
    assert token_texts(Bytes()) == ["a", "", "\ufffd"]
    assert token_texts(None) == token_texts("a note") == []
    assert token_texts(Words(), ["x"]) == ["x"]
    assert [describe_tokenizer(t) for t in (Words(), Bytes(), "note", None)] == ["words", "bytes", "note", ""]
    with pytest.raises(MoevizError, match="vocab="):
        token_texts(object())


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
import moeviz
from capture_models import Kept, batches, loss_of, small_model
from moeviz.records import LoadRecord
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + {meet!r}, rank=rank, world_size=2)
steps = list(batches(3, 1 + rank, padded=bool(rank), seed=rank))
alone, sink = small_model(), Kept()
for run in (None, {run!r}):
    model = small_model()
    options = dict(sink=sink, across_ranks=False) if run is None else dict(run=run)
    with moeviz.watch(model, policy=moeviz.EVERYTHING, **options) as probe:
        for step in steps:
            for batch in step:
                loss_of(model, batch)
            probe.step(loss=float(rank))
    assert probe.failures.count == 0
torch.save([load.counts_LE.tolist() for load in sink.of(LoadRecord)], {meet!r} + str(rank))
dist.destroy_process_group()
"""


def test_loads_of_two_ranks_are_summed_and_both_write_their_sequences(tmp_path: Path) -> None:
    run, meet = tmp_path / "run", tmp_path / "meet"
    program = TWO_RANKS.format(tests=str(Path(__file__).parent), meet=str(meet), run=str(run))
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in ranks:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    alone = [np.array(torch.load(f"{meet}{rank}")) for rank in range(2)]
    store = moeviz.open_run(run)
    rows = store.sql("SELECT step, layer, rank, tokens, counts FROM expert_load ORDER BY step, layer")
    assert len(rows) == 3 * 2
    for row in rows.itertuples():
        assert (row.rank, row.tokens) == (0, 27 + 2 * 21)
        assert row.counts.tolist() == (alone[0] + alone[1])[row.step, row.layer].tolist()
    seqs = store.sql(
        "SELECT rank, count(DISTINCT seq) AS n FROM routing WHERE step = 1 GROUP BY rank ORDER BY rank"
    )
    assert seqs.n.tolist() == [3, 6]
    assert store.info.ranks == 2
    assert not (run / "routing").exists(), "packed once every rank had finished"
