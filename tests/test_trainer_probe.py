"""The trainer's fixed probe: held-out text, the same after a resume, and training to the bit as without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from trainer_runs import StopAfter, corpus_cache, no_packing, toy

from model.config import ModelConfig, RouterConfig
from moeviz.store import queries
from moeviz.store.reader import open_run
from trainer.config import EvaluationConfig, TrainConfig
from trainer.probe import held_out_probe
from trainer.text import open_text
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]

PROBED = EvaluationConfig(eval_every=3, eval_sequences=2, probe_every=2, probe_sequences=3)


def probed(run: Path, **changes: object) -> TrainConfig:
    return toy(run, log_routing=True, **{"evaluation": PROBED, **changes})


@pytest.mark.usefixtures("no_packing")
@pytest.mark.parametrize(("engine", "stage"), [("torch", 0), ("deepspeed", 3)])
def test_losses_are_those_of_a_run_without_it(tmp_path: Path, engine: str, stage: int) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    options = {"engine": {"engine": engine, "zero_stage": stage}, "max_steps": 5}
    never = EvaluationConfig(eval_every=3, eval_sequences=2, probe_every=0)
    without = train(probed(tmp_path / "without", evaluation=never, **options))
    watched = train(probed(tmp_path / "with", **options))
    assert watched.losses == without.losses
    with open_run(tmp_path / "with") as store, open_run(tmp_path / "without") as plain:
        assert queries.probe_steps(store) == [0, 2, 4, 5], "every second step, and after the last"
        assert queries.probe_steps(plain) == []
        loads = "SELECT step, layer, tokens, counts::VARCHAR AS counts FROM expert_load ORDER BY step, layer"
        assert store.sql(loads).equals(plain.sql(loads)), "no load counts the probe"
        similar = store.sql("SELECT count(*) AS n FROM metrics WHERE name IN ('pes', 'router_cos')")
        assert similar["n"][0] == 2 * 4 * 2, "weights are whole where they are read"
        assert not store.sql("SELECT * FROM events WHERE kind = 'recording_failed'").size


@pytest.mark.usefixtures("no_packing")
def test_a_resumed_run_asks_the_same_tokens_and_goes_on_comparing(tmp_path: Path) -> None:
    whole = train(probed(tmp_path / "whole", max_steps=8))
    listener = StopAfter(4)
    config = probed(tmp_path / "run", max_steps=8)
    train(config, progress=listener, interrupt=listener.interrupt)
    resumed = train(probed(tmp_path / "run", max_steps=8, resume=str(tmp_path / "run")))
    assert resumed.losses == whole.losses[4:]
    with open_run(tmp_path / "run") as store, open_run(tmp_path / "whole") as once:
        assert queries.probe_steps(store) == queries.probe_steps(once) == [0, 2, 4, 6, 8]
        changed = "SELECT step, layer, name, value FROM metrics WHERE name IN ('churn', 'flip1') ORDER BY ALL"
        assert store.sql(changed).equals(once.sql(changed)), (
            "also from the last pass before to the first after"
        )
        assert queries.probe_saturation(store).equals(queries.probe_saturation(once))


def test_the_probe_is_held_out_text_of_every_domain() -> None:
    config = probed(Path("unused"))
    text = open_text(config, quiet=True)
    probe = held_out_probe(text, config, config.model)
    assert probe is not None
    assert {probe.domains.count(name) for name in probe.names} == {3}
    shards = text.batches.shards
    whole = {name for name in shards.domains if shards.num_tokens("validation", name) >= 16}
    assert set(probe.names) == whole, "every domain with a window of text"
    for name, ids_S in zip(probe.domains, probe.token_ids_NS, strict=True):
        held_out = np.lib.stride_tricks.sliding_window_view(shards.tokens("validation", name), len(ids_S))
        assert (held_out == ids_S).all(axis=1).any()
    again = held_out_probe(open_text(config, quiet=True), config, config.model)
    assert again is not None
    assert np.array_equal(again.token_ids_NS, probe.token_ids_NS)


def test_models_without_a_choice_have_none() -> None:
    config = probed(Path("unused"))
    text = open_text(config, quiet=True)
    chosen = ModelConfig(router=RouterConfig(chooser="expert"))
    dense = ModelConfig(first_dense_layers=ModelConfig().num_layers)
    assert held_out_probe(text, config, chosen) is None
    assert held_out_probe(text, config, dense) is None
    assert held_out_probe(text, toy(Path("unused"), evaluation={"probe_every": 0}), config.model) is None


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
import os
rank = sys.argv[1]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT={port!r})
from pathlib import Path
from test_trainer_probe import probed
from trainer.train import train
result = train(probed(Path({run!r}), max_steps=3, engine=dict(engine="deepspeed", zero_stage=3)))
print(result.losses)
"""


@pytest.mark.slow
def test_two_ranks_run_it_together_and_one_writes_it(tmp_path: Path, corpus_cache: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    open_text(probed(Path("unused")), quiet=True)  # build the cache once
    program = TWO_RANKS.format(tests=str(Path(__file__).parent), port=port, run=str(tmp_path / "run"))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MOEVIZ_CACHE": str(corpus_cache), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    losses = []
    for process in ranks:
        told, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
        losses.append(told.splitlines()[-1])
    assert losses[0] == losses[1]
    with open_run(tmp_path / "run") as store:
        assert queries.probe_steps(store) == [0, 2, 3]
        ranks_written = store.sql("SELECT DISTINCT rank FROM probe_routing")["rank"].tolist()
        assert ranks_written == [0]
        assert store.sql("SELECT count(DISTINCT seq) AS n FROM probe_routing")["n"][0] == len(
            store.sql("SELECT * FROM probe_sequences WHERE step = 0")
        )
