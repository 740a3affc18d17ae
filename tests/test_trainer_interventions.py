"""What a run does about alerts: only what it was told, recorded each time, and the same after a resume."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import TOY, StopAfter, corpus_cache, no_packing, toy

from model.lm import MoELanguageModel
from model.router import routers
from moeviz.commands.train import parse
from moeviz.errors import MoevizError
from moeviz.store import queries_series as queries
from moeviz.store.reader import open_run
from trainer.balance import training_loss
from trainer.config import BalanceConfig, EngineConfig, TrainConfig
from trainer.engine import build_engine
from trainer.judge import JUDGE_FILE, Judge
from trainer.response_config import Response, ResponseConfig
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]

pytestmark = pytest.mark.usefixtures("no_packing")

DEAD = 3
SOON = ("arm_after=2", "raise_after=2", "startup_steps=0", "startup_warmups=0")


@pytest.mark.parametrize(
    ("text", "response"),
    [
        ("DEAD=reinit_router", Response("EXPERT_DEAD", "reinit_router", "")),
        ("collapse=stop", Response("ROUTING_COLLAPSE", "stop", "")),
        ("LOSS_SPIKE=lower_lr", Response("LOSS_SPIKE", "lower_lr", "")),
        ("NONFINITE=run:page --layer {layer}", Response("NONFINITE", "run", "page --layer {layer}")),
        ("STARVED=post:https://hooks.test/a=b", Response("EXPERT_STARVED", "post", "https://hooks.test/a=b")),
    ],
)
def test_a_part_of_a_rules_name_and_an_action_are_enough(text: str, response: Response) -> None:
    assert ResponseConfig(on_alert=(text,)).responses == (response,)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("DEAD", "is no RULE=ACTION"),
        ("DEAD=reinit_ruoter", "did you mean DEAD=reinit_router"),
        ("EXPERT=stop", "names EXPERT_STARVED and EXPERT_DEAD"),
        ("TOKENS_DROPPED=stop", "names no rule that training can act on; there is EXPERT_STARVED"),
        ("COLLAPSE=reinit_router", "names no expert to begin anew"),
        ("DEAD=post:localhost", "no address"),
        ("DEAD=run:", "is empty"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, told: str) -> None:
    with pytest.raises(MoevizError, match=told):
        ResponseConfig(on_alert=(text,))


def test_actions_that_would_change_nothing_are_refused() -> None:
    with pytest.raises(MoevizError, match="balance=aux changes nothing; use --balance bias"):
        TrainConfig(
            balance=BalanceConfig(balance="aux"), response=ResponseConfig(on_alert=("DEAD=raise_bias",))
        )
    with pytest.raises(MoevizError, match="use --zero-stage 2 or less"):
        TrainConfig(
            engine=EngineConfig(engine="deepspeed", zero_stage=3),
            response=ResponseConfig(on_alert=("DEAD=reinit_router",)),
        )


def test_flags_may_be_repeated_and_secrets_stay_out_of_the_run() -> None:
    words = "--on-alert DEAD=reinit_router COLLAPSE=stop --on-alert DEAD=run:secret --freeze norms --freeze=attention"
    config = parse(words.split())
    assert config.response.on_alert == ("DEAD=reinit_router", "COLLAPSE=stop", "DEAD=run:secret")
    assert config.freeze == ("norms", "attention")
    assert "secret" not in json.dumps(config.to_dict())
    assert TrainConfig.from_dict(config.to_dict()).response.on_alert == (
        "DEAD=reinit_router",
        "COLLAPSE=stop",
    )


@pytest.fixture
def one_dead_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models begin with an expert that a bias keeps from ever being chosen."""
    honest = MoELanguageModel.init_weights

    def init_weights(self: MoELanguageModel) -> None:
        honest(self)
        router = routers(self)[1]
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias[DEAD] = -10.0

    monkeypatch.setattr(MoELanguageModel, "init_weights", init_weights)


def dying(run: Path, *responses: str, **changes: Any) -> TrainConfig:
    """A run whose expert stays dead unless something is done; no balancing."""
    model = replace(TOY.model, router=replace(TOY.model.router, selection_bias=True))
    parts: dict[str, Any] = {
        "model": model,
        "max_steps": 14,
        "balance": {"balance": "none"},
        "alerting": {"alert_thresholds": SOON},
        "evaluation": {"eval_every": 0},
        "response": {"on_alert": responses, "respond_every": 5},
    }
    return toy(run, **{**parts, **changes})


def interventions(run: Path) -> list[tuple[int, dict[str, Any]]]:
    with open_run(run) as store:
        events = queries.events(store)
    rows = events[events["kind"] == "intervention"]
    details = [json.loads(each) if isinstance(each, str) else each for each in rows["detail"]]
    return list(zip(rows["step"].tolist(), details, strict=True))


def stopped(config: TrainConfig, after: int) -> TrainResult:
    watcher = StopAfter(after)
    return train(config, progress=watcher, interrupt=watcher.interrupt)


def test_nothing_is_done_unless_told(one_dead_expert: None, tmp_path: Path) -> None:
    train(dying(tmp_path / "run"))
    assert interventions(tmp_path / "run") == []
    assert not list((tmp_path / "run").rglob(JUDGE_FILE))


@pytest.mark.parametrize(("engine", "stage"), [("torch", 0), ("deepspeed", 1)])
def test_a_dead_expert_is_brought_back_to_life(
    engine: str, stage: int, one_dead_expert: None, tmp_path: Path
) -> None:
    pytest.importorskip(engine, reason="DeepSpeed is not installed")
    parts = {"engine": engine, "zero_stage": stage}
    config = dying(tmp_path / "run", "DEAD=reinit_router", engine=parts, log_routing=True)
    result = train(config)
    ((step, detail), *more) = interventions(tmp_path / "run")
    assert (detail["rule"], detail["layer"], detail["experts"]) == ("EXPERT_DEAD", 1, [DEAD])
    assert all(later - step >= 5 for later, _ in more)
    with open_run(tmp_path / "run") as store:
        counts = store.sql("SELECT step, counts FROM expert_load WHERE layer = 1 ORDER BY step")
    chosen = [row[DEAD] for row in counts["counts"]]
    assert max(chosen[: step + 1]) == 0
    assert chosen[step + 1] > 0
    assert result.steps_done == 14


def test_a_resumed_run_intervenes_when_the_other_did(one_dead_expert: None, tmp_path: Path) -> None:
    told = ("DEAD=reinit_router", "DEAD=lower_lr", "SKEW=lower_lr")
    whole = train(dying(tmp_path / "whole", *told))
    acted = interventions(tmp_path / "whole")
    assert len(acted) >= 3
    config = dying(tmp_path / "run", *told)
    losses: tuple[float, ...] = ()
    for after in (acted[0][0], acted[0][0] + 1, 10):
        found = {} if not losses else {"run": None, "resume": str(config.run)}
        losses += stopped(replace(config, **found), after).losses
    last = train(replace(config, run=None, resume=str(config.run)))
    assert losses + last.losses == whole.losses
    assert interventions(tmp_path / "run") == acted
    assert whole.checkpoint is not None
    assert last.checkpoint is not None
    one, other = (load_file(path / "model.safetensors") for path in (whole.checkpoint, last.checkpoint))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stopping_leaves_a_checkpoint_and_the_reason(one_dead_expert: None, tmp_path: Path) -> None:
    result = train(dying(tmp_path / "run", "DEAD=stop"))
    assert result.steps_done < 14
    assert result.stopped_by is not None
    assert "EXPERT_DEAD in layer 1" in result.stopped_by
    assert result.checkpoint is not None
    assert result.checkpoint.name == f"step-{result.steps_done:08d}"
    assert not result.interrupted


def test_factors_double_and_halve_within_bounds(one_dead_expert: None, tmp_path: Path) -> None:
    config = dying(
        tmp_path / "run",
        "DEAD=lower_lr",
        "DEAD=raise_aux",
        max_steps=60,
        balance={"balance": "aux", "aux_coef": 1e-6},
        schedule={"schedule": "constant", "warmup_steps": 0},
        response={"on_alert": ("DEAD=lower_lr", "DEAD=raise_aux"), "respond_every": 2},
    )
    result = train(config)
    assert result.checkpoint is not None
    standing = json.loads((result.checkpoint / "standing.json").read_text())
    assert (standing["rate_factor"], standing["aux_factor"]) == (1 / 16, 16.0)
    with open_run(tmp_path / "run") as store:
        rates = queries.scalars(store, ["lr"])["value"].tolist()
    assert rates[-1] == pytest.approx(config.optim.learning_rate / 16)
    assert rates[0] == pytest.approx(config.optim.learning_rate)


def test_a_command_is_told_about_the_alert(one_dead_expert: None, tmp_path: Path) -> None:
    told = tmp_path / "told"
    train(dying(tmp_path / "run", f"DEAD=run:tee {told}"))
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    alert = json.loads(told.read_text())
    assert (alert["rule"], alert["layer"]) == ("EXPERT_DEAD", 1)
    assert interventions(tmp_path / "run")[0][1]["action"] == "run"


@pytest.mark.parametrize(
    ("engine", "stage"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]
)
def test_replaced_rows_lose_their_momentum_and_no_other_row_does(engine: str, stage: int) -> None:
    """After the swap a step with no gradient moves every row but the new one."""
    pytest.importorskip(engine, reason="DeepSpeed is not installed")
    config = replace(
        toy(Path("none"), engine={"engine": engine, "zero_stage": stage}, optim={"weight_decay": 0.0}),
        balance=BalanceConfig(balance="none", z_coef=0.0),
    )
    torch.manual_seed(0)
    built = build_engine(MoELanguageModel(config.model), config)
    ids = torch.randint(0, 280, (2, 17), generator=torch.Generator().manual_seed(3))
    name = "model.layers.1.mlp.gate.weight"
    for _ in range(3):
        built.backward(training_loss(built.forward(ids[:, :-1], ids[:, 1:]), config.balance))
        built.step(1e-2)
    rows = torch.full((1, 16), 0.25)
    built.replace_rows(name, [2], rows)
    assert torch.equal(built.weights()[name][2], rows[0])
    before = built.weights()[name].clone()
    built.backward(0.0 * training_loss(built.forward(ids[:, :-1], ids[:, 1:]), config.balance))
    built.step(1e-2)
    moved = (built.weights()[name] - before).abs().amax(dim=1)
    assert moved[2] == 0
    assert all(moved[row] > 0 for row in (0, 1, 3))
    built.destroy()


def test_the_state_of_the_rules_calls_nothing() -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("called",))

    judge = Judge.__new__(Judge)
    with pytest.raises(pickle.UnpicklingError, match=r"asks for builtins\.print"):
        judge.load(pickle.dumps(Evil()))
