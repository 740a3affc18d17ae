"""Studies: which runs they are, when one ends early, what a folder says about its run, and how bands are judged."""

from __future__ import annotations

import fcntl
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trainer_runs import StopAfter, corpus_cache, no_packing, toy

from moeviz.commands.train import parse
from moeviz.errors import MoevizError
from moeviz.records import ModelInfo
from moeviz.store import queries
from moeviz.store.reader import open_run
from moeviz.store.run import RunInfo, create_run
from trainer.config import TrainConfig
from trainer.studies import balance, comparison, recipes
from trainer.studies.balance import ARMS, ArmRun, arm_run, balance_study, judge
from trainer.studies.grid import draw, grid, parse_axes, trials_of
from trainer.studies.median_rule import MedianRule
from trainer.studies.outcome import Outcome, global_loads, outcome_of
from trainer.studies.pool import Pool
from trainer.studies.study import Finding
from trainer.studies.trials import (
    PRUNED_FILE,
    TRIAL_FILE,
    State,
    Trial,
    begin,
    check_same,
    checked,
    named,
    state_of,
    validation_curve,
)
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]

SMOKE = ("--preset", "smoke", "--bytes-per-domain", "12000", "--max-steps", "6")


class Told:
    """What a pool said about its trials."""

    def __init__(self) -> None:
        self.begins: list[str] = []
        self.ends: dict[str, tuple[State, str]] = {}

    def begun(self, trial: Trial) -> None:
        self.begins.append(trial.name)

    def at(self, trial: Trial, step: int, loss: str) -> None: ...

    def ended(self, trial: Trial, state: State, why: str) -> None:
        self.ends[trial.name] = (state, why)


# Which runs.


def test_a_grid_is_every_combination_once() -> None:
    axes = parse_axes(["learning-rate=1e-3,3e-4", "--top_k=1,2,4"])
    found = [tuple(values.items()) for values in grid(axes)]
    assert found == [
        (("learning-rate", rate), ("top-k", k)) for rate in ("1e-3", "3e-4") for k in ("1", "2", "4")
    ]


@pytest.mark.parametrize(
    ("vary", "told"),
    [
        (["lr"], "names no values"),
        (["lr="], "names no values"),
        (["lr=1,1"], "repeats"),
        (["lr=1", "lr=2"], "repeats"),
        (["lr=0..1"], "no range of positive"),
        (["lr=2..1"], "no range of positive"),
        (["lr=a..b"], "no range of positive"),
    ],
)
def test_values_that_say_nothing_are_refused(vary: list[str], told: str) -> None:
    with pytest.raises(MoevizError, match=told):
        parse_axes(vary)


def test_only_drawing_reads_a_range() -> None:
    with pytest.raises(MoevizError, match="--random"):
        grid(parse_axes(["lr=1e-4..1e-2"]))


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    axes = parse_axes(["lr=1e-4..1e-2", "top-k=1..4", "balance=aux,bias"])
    few, many = draw(axes, 5, seed=7), draw(axes, 40, seed=7)
    assert many[:5] == few
    assert len({tuple(values.items()) for values in many}) == 40
    assert draw(axes, 5, seed=8) != few


def test_a_range_is_drawn_evenly_in_the_logarithm() -> None:
    values = [float(each["lr"]) for each in draw(parse_axes(["lr=1e-4..1e-2"]), 400, seed=0)]
    assert min(values) >= 1e-4
    assert max(values) <= 1e-2
    assert 0.4 < np.mean(np.array(values) < 1e-3) < 0.6, "half of them below the middle of the logarithm"
    whole = {each["k"] for each in draw(parse_axes(["k=1..4"]), 50, seed=0)}
    assert whole == {"1", "2", "3", "4"}, "and integers stay integers, as many as there are"


def test_flags_that_contradict_each_other_are_told_not_raised() -> None:
    good, bad, unknown = (
        checked(trial, parse)
        for trial in trials_of([{"top-k": "2"}, {"top-k": "9"}, {"top-kk": "2"}], ("--preset", "smoke"))
    )
    assert good.config is not None
    assert good.config.log_routing, "there is routing to log"
    assert bad.config is None
    assert bad.problem.startswith("top_k=9 exceeds num_experts=4")
    assert unknown.config is None
    assert "--top-k" in unknown.problem
    dense = checked(Trial(name="dense", words=("--preset", "gpt2-tiny")), parse)
    assert dense.config is not None
    assert not dense.config.log_routing
    switched = trials_of([{"document-mask": "true"}, {"document-mask": "false"}], ("--preset", "smoke"))
    configs = [checked(trial, parse).config for trial in switched]
    assert [config.data.document_mask for config in configs if config] == [True, False]
    with pytest.raises(MoevizError, match="two runs are named"):
        named([good, good])


# When one ends early.


def test_the_median_rule_ends_what_is_worse_than_half() -> None:
    rule = MedianRule(least_others=3)
    others = [{50: 3.0 + shift, 100: 2.0 + shift} for shift in (0.0, 0.1, 0.2)]
    verdict = rule.verdict({50: 3.5, 100: 2.11}, others, max_steps=200)
    assert verdict is not None
    assert (verdict.step, verdict.loss, verdict.others) == (100, 2.11, 3)
    assert verdict.median == statistics.median(curve[100] for curve in others)
    assert rule.verdict({50: 3.5, 100: 2.1}, others, max_steps=200) is None, "as good as the median"
    assert rule.verdict({50: 2.0, 100: 2.5}, others, max_steps=200) is None, "its best counts, not its newest"


def test_the_median_rule_waits_for_steps_and_others() -> None:
    rule = MedianRule(least_others=2, first_share=0.5)
    others = [{50: 1.0, 100: 1.0}, {50: 1.0, 100: 1.0}, {50: 1.0}]
    bad = {50: 9.0, 100: 9.0}
    assert rule.verdict({}, others, max_steps=150) is None
    assert rule.verdict({50: 9.0}, others, max_steps=150) is None, "before half of the steps"
    assert rule.verdict(bad, others, max_steps=100) is None, "at its end"
    assert rule.verdict(bad, others[1:], max_steps=150) is None, "one other came so far"
    assert rule.verdict(bad, others, max_steps=150) is not None


# What a folder says.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus_cache: Path) -> tuple[Path, Trial]:
    """A finished run in a study's folder, trained here and not as a child."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeviz.store.run._in_process", lambda module, *args: True)
        config = toy(folder / "run", log_routing=True, max_steps=8, evaluation={"probe_every": 4})
        train(config)
    (folder / "run" / TRIAL_FILE).write_text(json.dumps({"words": ["toy"], "values": {"arm": "none"}}))
    return folder, Trial(
        name="run", words=("toy",), values={"arm": "none", "seed": "0"}, config=replace(config, run=None)
    )


def test_an_outcome_is_what_the_run_recorded(trained: tuple[Path, Trial]) -> None:
    folder, trial = trained
    found = outcome_of(trial, folder)
    with open_run(folder / "run") as store:
        counts = {
            (row.layer, row.step): list(row.counts)
            for row in store.sql("SELECT layer, step, counts FROM expert_load").itertuples()
        }
        losses = queries.scalars(store, ["val_loss"])
        loads_LE = global_loads(store, window=3)
    sums = [[sum(counts[layer, step][e] for step in (6, 7)) for e in range(4)] for layer in (0, 1)]
    relative = [[4 * count / sum(layer) for count in layer] for layer in sums]
    assert np.allclose(loads_LE, relative), "of 8 steps, the last quarter"
    assert found.state == "finished"
    assert found.steps == 8
    assert found.maxvio_global == pytest.approx(sum(max(layer) - 1 for layer in relative) / 2)
    assert found.min_load == pytest.approx(min(map(min, relative)))
    assert found.val_loss == pytest.approx(losses["value"].iloc[-1])
    assert trial.config is not None
    assert found.parameters == trial.config.architecture.num_parameters()
    assert found.active_parameters < found.parameters


def test_a_dense_run_has_losses_and_no_loads(tmp_path: Path, no_packing: None) -> None:
    config = toy(
        tmp_path / "dense", max_steps=2, model={"first_dense_layers": 2}, balance={"balance": "none"}
    )
    result = train(config)
    (tmp_path / "dense" / TRIAL_FILE).write_text("{}")
    found = outcome_of(Trial(name="dense", words=(), config=config), tmp_path)
    assert (found.state, found.steps) == ("finished", 2)
    assert np.isnan(found.maxvio_global)
    last = result.evaluations[2].values()
    tokens = sum(each.num_tokens for each in last)
    assert found.val_loss == pytest.approx(sum(each.loss_nats * each.num_tokens for each in last) / tokens)
    assert found.parameters == found.active_parameters


def test_a_run_without_a_step_says_nothing_yet(tmp_path: Path) -> None:
    create_run(tmp_path / "fresh", RunInfo(name="fresh", model=ModelInfo(family="moeviz", layers=())))
    (tmp_path / "fresh" / TRIAL_FILE).write_text("{}")
    found = outcome_of(checked(Trial(name="fresh", words=SMOKE), parse), tmp_path)
    assert (found.state, found.steps) == ("begun", 0)
    assert np.isnan([found.val_loss, found.maxvio_global, found.tokens_per_second]).all()


def test_the_tables_of_a_study_hold_every_run(trained: tuple[Path, Trial], tmp_path: Path) -> None:
    folder, trial = trained
    absent = Outcome(run="absent", path=str(tmp_path / "absent"), state="failed", why="it was not begun")
    comparison.save([absent, outcome_of(trial, folder)], tmp_path)
    table = pd.read_parquet(tmp_path / comparison.COMPARISON_FILE)
    curves = pd.read_parquet(tmp_path / comparison.CURVES_FILE)
    assert list(table["run"]) == ["run", "absent"], "those without a loss come last"
    assert table["arm"].iloc[0] == "none"
    losses = curves[curves["name"] == "val_loss"]
    assert dict(zip(losses["step"], losses["value"], strict=True)) == validation_curve(folder / "run")
    assert "maxvio_global" in set(curves["name"])


def test_a_begun_run_goes_on_and_a_lost_one_begins_anew(tmp_path: Path, no_packing: None) -> None:
    trial = checked(Trial(name="one", words=SMOKE), parse)
    run = tmp_path / "one"
    assert state_of(trial, run) == "new"
    assert begin(trial, run, parse) == [*trial.words, "--run", str(run)]
    (run / "half").touch()
    assert state_of(trial, run) == "begun"
    begin(trial, run, parse)
    assert not (run / "half").exists(), "without a checkpoint there is nothing to go on from"
    stop = StopAfter(3)
    assert trial.config is not None
    train(replace(trial.config, run=run), progress=stop, interrupt=stop.interrupt)
    assert state_of(trial, run) == "begun"
    assert begin(trial, run, parse) == ["--resume", str(run)]
    train(parse(["--resume", str(run)]))
    assert state_of(trial, run) == "finished"
    (run / PRUNED_FILE).write_text("{}")
    assert state_of(trial, run) == "pruned"


def test_a_run_with_other_flags_is_refused_not_taken_over(tmp_path: Path) -> None:
    trial = checked(Trial(name="one", words=SMOKE), parse)
    begin(trial, tmp_path / "one", parse)
    same = replace(
        trial, words=(*(word for word in SMOKE if word not in ("--max-steps", "6")), "--max-steps=6")
    )
    check_same(checked(same, parse), tmp_path / "one", parse)
    moved = replace(trial, places=("--train-data", "elsewhere"))
    check_same(moved, tmp_path / "one", parse)
    longer = checked(replace(trial, words=(*SMOKE, "--seed", "2"), config=None), parse)
    with pytest.raises(MoevizError, match=r"was trained with other flags.*--seed 2"):
        check_same(longer, tmp_path / "one", parse)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "thesis.txt").touch()
    with pytest.raises(MoevizError, match="not a run of this study"):
        begin(replace(trial, name="two"), tmp_path / "two", parse)
    assert (tmp_path / "two" / "thesis.txt").exists()


def test_a_run_that_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    told = Told()
    trial = checked(Trial(name="one", words=SMOKE), parse)
    with (tmp_path / ".one.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        states, reasons = Pool(folder=tmp_path, parse=parse, watcher=told, poll_seconds=0.01).run([trial])
    assert states == {"one": "failed"}
    assert "another process trains" in reasons["one"]
    assert told.begins == []
    assert not (tmp_path / "one").exists()


def test_finished_runs_are_read_and_not_trained_again(trained: tuple[Path, Trial]) -> None:
    folder, trial = trained
    told = Told()
    states, reasons = Pool(folder=folder, parse=parse, watcher=told).run([trial])
    assert (states, reasons, told.begins) == ({"run": "finished"}, {}, [])


def test_a_run_that_ended_early_counts_again_where_no_rule_ends_runs(trained: tuple[Path, Trial]) -> None:
    folder, trial = trained
    mark = folder / "run" / PRUNED_FILE
    mark.write_text(json.dumps({"step": 4, "why": "it was behind"}))
    assert outcome_of(trial, folder).why == "it was behind"
    with_rule = Pool(folder=folder, parse=parse, watcher=Told(), rule=MedianRule())
    assert with_rule.run([trial])[0] == {"run": "pruned"}
    assert Pool(folder=folder, parse=parse, watcher=Told()).run([trial])[0] == {"run": "finished"}
    assert not mark.exists()


# The studies.


def test_arms_of_the_balance_study_differ_in_nothing_but_balancing(tmp_path: Path) -> None:
    study = balance_study(tmp_path, seeds=(3, 4), steps=80, every_arm=True)
    configs = {trial.name: checked(trial, parse).config for trial in study.trials}
    assert len(configs) == 2 * len(ARMS)
    plain = configs["none-seed3-80"]
    assert plain is not None
    for trial in study.trials:
        config = configs[trial.name]
        assert isinstance(config, TrainConfig), trial.name
        same = replace(config, balance=plain.balance, seed=3)
        assert same == plain, trial.name
        assert config.balance.z_coef == 0
    assert plain.balance.balance == "none"
    assert plain.data.tokens_per_step == 1024
    assert not plain.architecture.router.selection_bias
    assert 382_500 <= plain.architecture.num_parameters() < 383_500


def test_the_recipes_compare_what_a_token_costs_alike() -> None:
    for make in (recipes.architecture_study, recipes.expert_study):
        trials = [checked(trial, parse) for trial in make((0,), 60).trials]
        configs = [trial.config for trial in trials if trial.config]
        assert len(configs) == len(trials), [trial.problem for trial in trials]
        assert len({config.optim.learning_rate for config in configs}) == 1
        assert len({(config.data, config.schedule, config.max_steps) for config in configs}) == 1
        active = [config.architecture.num_active_parameters() for config in configs]
        assert max(active) <= 1.05 * min(active)
    names = [trial.values["architecture"] for trial in recipes.architecture_study().trials]
    assert names == ["GPT-2", "dense", "MLA + dense", "MoE", "MLA + MoE"]
    rates = [checked(trial, parse).config for trial in recipes.learning_rate_study().trials]
    assert [config.optim.learning_rate for config in rates if config] == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


def test_a_best_rate_at_an_edge_is_told() -> None:
    def outcomes(losses: Sequence[float]) -> list[Outcome]:
        rates = recipes.LEARNING_RATES
        return [
            Outcome(
                run=rate,
                path="",
                state="finished",
                values={"learning-rate": rate, "seed": "0"},
                val_loss=loss,
            )
            for rate, loss in zip(rates, losses, strict=True)
        ]

    study = recipes.learning_rate_study()
    inside = study.findings(outcomes([3, 2, 1, 2, 3]))
    edge = study.findings(outcomes([3, 2.5, 2, 1.5, 1]))
    assert inside[0].found.startswith("3e-3 1.000, ")
    assert (inside[-1].found, inside[-1].holds) == ("3e-3", True)
    assert (edge[-1].found, edge[-1].holds) == ("3e-2", False)
    assert "--seeds" in inside[1].found, "one seed tells nothing about noise"


def arm(name: str, seed: int, maxvio: float, *open_alerts: str, **changes: object) -> ArmRun:
    told = Outcome(
        run=f"{name}{seed}",
        path="",
        state="finished",
        maxvio_global=maxvio,
        val_loss=float(changes.pop("val_loss", 1.5)),  # type: ignore[arg-type]
        alerts_open=open_alerts,
    )
    known = ArmRun(arm=name, seed=seed, outcome=told, nmi_domain=0.2, nmi_null=0.01, raised={})
    return replace(known, **changes)  # type: ignore[arg-type]


SKEWED = {("LOAD_SKEW", 2): 60}
AS_EXPECTED = [
    arm("none", 3, 1.2, "EXPERT_DEAD L2 error", raised=SKEWED),
    arm("aux 1e-3", 3, 0.7, "EXPERT_STARVED L0 warning"),
    arm("bias 1e-3", 3, 0.04),
    arm("bias 0.1", 3, 0.07, raised={("BIAS_OSCILLATION", layer): 70 for layer in range(3)}),
]


def verdicts(runs: list[ArmRun]) -> list[bool | None]:
    return [finding.holds for finding in judge(runs)]


def test_every_band_holds_where_all_is_as_expected() -> None:
    assert verdicts(AS_EXPECTED) == [True] * 11


@pytest.mark.parametrize(
    ("band", "run"),
    [
        (0, arm("none", 4, 0.8, "EXPERT_DEAD L1 error", raised=SKEWED)),
        (1, arm("aux 1e-3", 4, 1.2)),
        (1, arm("aux 1e-3", 4, 0.19)),
        (2, arm("bias 1e-3", 4, 0.11)),
        (3, arm("aux 1e-3", 3, 0.21)),
        (4, arm("none", 4, 1.2, "LOAD_SKEW L1 warning", raised=SKEWED)),
        (5, arm("none", 4, 1.2, "EXPERT_DEAD L1 error", raised={("LOAD_SKEW", 0): 101})),
        (5, arm("none", 4, 1.2, "EXPERT_DEAD L1 error")),
        (6, arm("bias 1e-3", 4, 0.05, "EXPERT_STARVED L0 warning")),
        (7, arm("bias 0.1", 4, 0.05, raised={("BIAS_OSCILLATION", 0): 70})),
        (8, arm("bias 1e-3", 4, 0.05, raised={("BIAS_OSCILLATION", 0): 70})),
        (9, arm("bias 1e-3", 4, 0.05, nmi_domain=0.09)),
        (9, arm("bias 1e-3", 4, 0.05, nmi_null=0.03)),
        (10, arm("bias 1e-3", 3, 0.05, val_loss=1.56)),
    ],
)
def test_one_run_outside_a_band_breaks_that_band_alone(band: int, run: ArmRun) -> None:
    runs = [*(each for each in AS_EXPECTED if (each.arm, each.seed) != (run.arm, run.seed)), run]
    if band == 3:  # 0.21 / 0.05 = 4.2
        runs = [
            replace(each, outcome=replace(each.outcome, maxvio_global=0.05))
            if each.arm == "bias 1e-3"
            else each
            for each in runs
        ]
    assert [at for at, holds in enumerate(verdicts(runs)) if not holds] == [band]


def test_a_band_that_no_run_tests_holds_neither_way() -> None:
    found = judge([])
    assert {finding.holds for finding in found} == {None}
    three = judge(AS_EXPECTED[:3])
    assert [finding.text for finding in three if finding.holds is None] == [
        "bias 0.1: BIAS_OSCILLATION raised in every layer"
    ]
    assert isinstance(three[0], Finding)


def test_an_arm_is_read_from_its_run(trained: tuple[Path, Trial]) -> None:
    folder, trial = trained
    found = arm_run(outcome_of(trial, folder))
    with open_run(folder / "run") as store:
        by_layer = queries.metric_over_time(store, "nmi_domain")
        alerts = queries.alert_records(store)
    assert found.nmi_domain == pytest.approx(by_layer[by_layer["step"] == 8]["value"].max())
    assert found.raised == {(alert.rule, alert.layer): alert.raised_step for alert in alerts}
    assert found.open_rules == {alert.rule for alert in alerts if alert.cleared_step is None}


def test_the_text_of_the_balance_study_is_its_four_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Document:
        def __init__(self, domain: str, text: str) -> None:
            self.domain, self.text = domain, text

    class Corpus:
        def documents(self) -> list[Document]:
            return [Document(domain, f"a {domain}") for domain in (*balance.DOMAINS[1:], "dice")]

    monkeypatch.setattr(balance, "build_corpus", lambda quiet: Corpus())
    monkeypatch.setattr(balance, "language_reference", lambda: iter(()))
    with pytest.raises(MoevizError, match="no pydoc_data"):
        balance.write_text(tmp_path)
    monkeypatch.setattr(balance, "language_reference", lambda: iter(["a prose"]))
    balance.write_text(tmp_path)
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found == {domain: {"text": f"a {domain}", "domain": domain} for domain in balance.DOMAINS}
    (tmp_path / "json.jsonl").write_text("kept")
    balance.write_text(tmp_path)
    assert (tmp_path / "json.jsonl").read_text() == "kept"
