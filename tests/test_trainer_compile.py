"""A compiled run takes the steps of a plain one, and shows its routing as a plain one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from trainer_runs import TOY, corpus_cache, no_packing, toy

from model.lm import MoELanguageModel
from moeviz.errors import MoevizError
from moeviz.policy import SamplingPolicy
from moeviz.store.queries_loads import load_matrix
from moeviz.store.reader import open_run
from trainer.engine import Engine, build_engine
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]

pytestmark = pytest.mark.usefixtures("no_packing")
COMPILED: dict[str, Any] = {"compile": True, "dtype": "fp32"}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: str | Callable[..., Any]) -> None:
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, **options: compiled(module, backend=backend, **options)
    )


def test_a_compiled_run_is_the_plain_run_and_shows_the_same_routing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as always; torch's own kernels compute, which saves a minute of compiling."""
    compile_with(monkeypatch, "aot_eager")
    told: dict[str, Any] = {"max_steps": 4, "log_routing": True}
    told["sampling"] = SamplingPolicy(route_every=1, attention_every=0)
    told["model"] = replace(TOY.model, num_layers=1)
    plain = train(toy(tmp_path / "plain", **told))
    assert not counters["stats"]
    compiled = train(toy(tmp_path / "compiled", engine=COMPILED, **told))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1, "one program for all steps, and evaluation beside it"
    with open_run(tmp_path / "plain") as store, open_run(tmp_path / "compiled") as other:
        for step in range(4):
            ours, theirs = load_matrix(other, step), load_matrix(store, step)
            assert len(ours) == 4
            # Other kernels round otherwise: a token between two experts may change its mind in later steps.
            if step == 0:
                assert ours["count"].tolist() == theirs["count"].tolist()
            assert ours["count"].sum() == theirs["count"].sum() == 2 * 2 * 16 * 2


def _engine(config: dict[str, Any]) -> Engine:
    torch.manual_seed(0)
    config_of_run = toy(Path("unused"), engine=config)
    return build_engine(MoELanguageModel(config_of_run.architecture), config_of_run)


def test_where_nothing_can_be_compiled_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: Any, inputs: Any) -> None:
        raise RuntimeError("No working C++ compiler found")

    compile_with(monkeypatch, no_compiler)
    ids_BS = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(MoevizError, match=r"No working C\+\+ compiler found.*leave --compile out"):
        _engine(COMPILED).forward(ids_BS, ids_BS)
