"""Sums over tokens against loops in float64, one token at a time."""

from __future__ import annotations

import sys
import threading
from functools import cache, partial

import numpy as np
import pytest
import torch

from moeviz.capture import host_kernel, host_sums, reduce
from moeviz.capture.reading import Reading
from moeviz.capture.reduce import TOKEN_SUMS, RoutingSums, scores_of, stack, sum_decisions
from moeviz.capture.workspace import Workspace
from moeviz.metrics import decision
from moeviz.records import ScoreFunction

L, T, E, K = 3, 11, 5, 2
SCORES: list[ScoreFunction] = ["softmax", "sigmoid", "softmax_topk", "unknown"]


@pytest.fixture(params=["experts side by side", "tokens side by side", "compiled"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tables lie in memory in two ways, and compiled code needs none; nobody may see which."""
    if request.param == "compiled":
        assert host_sums.compile_now()
        monkeypatch.setattr(sys.modules[__name__], "sum_decisions", compiled)
        monkeypatch.setattr(sys.modules[__name__], "stack", lambda readings, workspace=None: readings)
    else:
        narrow = E + 1 if request.param == "tokens side by side" else 0
        monkeypatch.setattr("moeviz.capture.reduce._NARROW", narrow)
    return str(request.param)


def compiled(
    readings: list[Reading],
    score: ScoreFunction,
    bias_LE: torch.Tensor | None = None,
    valid_T: torch.Tensor | None = None,
    ranked: bool = True,
    logit_squared: bool = False,
    workspace: Workspace | None = None,
) -> RoutingSums:
    sums = host_sums.sum_on_host(readings, score, bias_LE, valid_T, ranked, logit_squared)
    assert sums is not None
    return sums


def readings(score: ScoreFunction, bias_LE: torch.Tensor | None, seed: int = 0) -> list[Reading]:
    """L layers that route the way their score function says."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in range(L):
        logits_TE = 2 * torch.randn(T, E, generator=generator)
        ranking_TE = logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)
        choice_TE = ranking_TE if bias_LE is None else ranking_TE + bias_LE[layer]
        ids_TK = choice_TE.topk(K, dim=-1).indices
        found.append(Reading(logits_TE, ranking_TE.gather(-1, ids_TK), ids_TK))
    return found


def by_loop(
    reading: Reading, score: ScoreFunction, bias_E: torch.Tensor | None, valid_T: torch.Tensor
) -> dict[str, np.ndarray]:
    """The definitions of the metrics, token by token in float64."""
    kind = "sigmoid" if score == "sigmoid" else "softmax"
    sums = {name: np.zeros(E) for name in ("counts", "prob_sum", "weight_sum")}
    sums |= {name: np.zeros(()) for name in TOKEN_SUMS}
    for token in np.flatnonzero(valid_T.numpy()):
        z_E = reading.logits_TE[token].double().numpy()
        p_E = decision.normalised_scores(z_E[None], kind)[0]
        rank_E = 1 / (1 + np.exp(-z_E)) if kind == "sigmoid" else p_E
        rank_E = rank_E + (0 if bias_E is None else bias_E.double().numpy())
        ids_K = reading.expert_ids_TK[token].tolist()
        for slot, expert in enumerate(ids_K):
            sums["counts"][expert] += 1
            sums["weight_sum"][expert] += float(reading.weights_TK[token, slot])
        sums["prob_sum"] += p_E
        sums["entropy_nats"] -= (p_E * np.log(p_E)).sum()
        sums["lse_squared"] += np.log(np.exp(z_E).sum()) ** 2
        sums["confidence"] += p_E.max()
        sums["logit_squared"] += np.square(z_E).mean()
        others = [expert for expert in range(E) if expert not in ids_K]
        sums["margin"] += rank_E[ids_K].min() - rank_E[others].max()
    return sums


def named(sums: RoutingSums, layer: int) -> dict[str, np.ndarray]:
    values = {
        "counts": sums.counts_LE[layer],
        "prob_sum": sums.prob_sum_LE[layer],
        "weight_sum": sums.weight_sum_LE[layer],
    }
    values |= {name: sums.token_sums_NL[row, layer] for row, name in enumerate(TOKEN_SUMS)}
    return {name: value.numpy() for name, value in values.items()}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("block", [1, 2 * E, 2 * T * E, 2**17])
def test_sums_equal_a_loop_over_tokens(
    score: ScoreFunction, biased: bool, padded: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the tables are cut: a token, two tokens, two layers at a time, everything at once."""
    monkeypatch.setattr("moeviz.capture.reduce._BLOCK_CPU", block)
    workspace = Workspace()
    sum_decisions(
        stack(readings(score, None, seed=9), workspace), score, workspace=workspace
    )  # leaves its traces
    bias_LE = torch.randn(L, E, generator=torch.Generator().manual_seed(1)) if biased else None
    valid_T = torch.ones(T, dtype=torch.bool)
    if padded:
        valid_T[[0, 4, 9, 10]] = False
    found = readings(score, bias_LE)
    sums = sum_decisions(
        stack(found), score, bias_LE, valid_T if padded else None, logit_squared=True, workspace=workspace
    )
    for layer, reading in enumerate(found):
        truth = by_loop(reading, score, None if bias_LE is None else bias_LE[layer], valid_T)
        for name, value in named(sums, layer).items():
            np.testing.assert_allclose(value, truth[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_rows_of_counts_sum_to_tokens_times_k() -> None:
    sums = sum_decisions(stack(readings("softmax", None)), "softmax")
    assert sums.counts_LE.dtype == torch.int64
    assert (sums.counts_LE.sum(-1) == T * K).all()


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_micro_batches_add_up(cut: int) -> None:
    found = readings("sigmoid", None)
    whole = sum_decisions(stack(found), "sigmoid")
    parts = [
        sum_decisions(stack([Reading(*(x[span] for x in r[:3])) for r in found]), "sigmoid")
        for span in (slice(0, cut), slice(cut, T))
    ]
    for together, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(together, first + second, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_another_type_are_summed_in_float32(dtype: torch.dtype) -> None:
    found = [reading._replace(logits_TE=reading.logits_TE.to(dtype)) for reading in readings("softmax", None)]
    same = [reading._replace(logits_TE=reading.logits_TE.float()) for reading in found]
    for mine, its in zip(*(sum_decisions(stack(r), "softmax") for r in (found, same)), strict=True):
        torch.testing.assert_close(mine, its, equal_nan=True, rtol=0, atol=0)


def test_reducing_leaves_the_models_tensors_alone() -> None:
    found, workspace = readings("sigmoid", None), Workspace()
    before = [[part.clone() for part in reading[:3]] for reading in found]
    sum_decisions(stack(found, workspace), "sigmoid", torch.ones(L, E), workspace=workspace)
    for reading, parts in zip(found, before, strict=True):
        assert all(map(torch.equal, reading[:3], parts))


def test_sums_stand_when_the_workspace_is_used_again() -> None:
    workspace = Workspace()
    sums = sum_decisions(stack(readings("softmax", None), workspace), "softmax", workspace=workspace)
    kept = [part.clone() for part in sums]
    with torch.inference_mode():
        sum_decisions(stack(readings("softmax", None, seed=5), workspace), "softmax", workspace=workspace)
    sum_decisions(stack(readings("softmax", None, seed=6), workspace), "softmax", workspace=workspace)
    for mine, its in zip(sums, kept, strict=True):
        torch.testing.assert_close(mine, its, equal_nan=True, rtol=0, atol=0)


def test_uniform_router_has_entropy_log_e_and_no_margin() -> None:
    reading = Reading(torch.zeros(T, E), torch.full((T, K), 0.5), torch.arange(K).expand(T, K))
    values = named(sum_decisions(stack([reading]), "softmax"), 0)
    assert values["entropy_nats"] / T == pytest.approx(np.log(E))
    assert values["lse_squared"] / T == pytest.approx(np.log(E) ** 2)
    assert values["margin"] == pytest.approx(0)


def test_logits_beyond_the_range_of_exp_stay_finite() -> None:
    logits_TE = torch.tensor([[300.0, -300.0, 0.0]])
    reading = Reading(logits_TE, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long))
    for score in SCORES:
        scores = scores_of(reading.logits_TE[None], score)
        assert all(torch.isfinite(part).all() for part in scores)
        assert float(scores.lse_LT) == pytest.approx(300)


def test_padding_that_holds_nan_changes_nothing() -> None:
    found = readings("softmax", None)
    valid_T = torch.ones(T, dtype=torch.bool)
    valid_T[3] = False
    clean = sum_decisions(stack(found), "softmax", valid_T=valid_T, logit_squared=True)
    for reading in found:
        reading.logits_TE[3] = float("nan")
        reading.weights_TK[3] = float("nan")
    dirty = sum_decisions(stack(found), "softmax", valid_T=valid_T, logit_squared=True)
    assert all(map(torch.equal, clean, dirty))


def test_all_experts_selected_or_unranked_has_no_margin() -> None:
    everyone = Reading(torch.randn(T, K), torch.ones(T, K), torch.arange(K).expand(T, K))
    assert torch.isnan(sum_decisions(stack([everyone]), "softmax").token_sums_NL[-1]).all()
    sums = sum_decisions(stack(readings("softmax", None)), "softmax", ranked=False, logit_squared=True)
    assert torch.isnan(sums.token_sums_NL[-1]).all()
    assert not torch.isnan(sums.token_sums_NL[:-1]).any()


def test_dropped_slots_are_counted_where_they_were_wanted() -> None:
    ids_TK = torch.tensor([[0, 1], [0, 2], [0, 1]])
    dropped_TK = torch.tensor([[False, False], [True, False], [True, True]])
    weights_TK = torch.ones(3, 2).masked_fill(dropped_TK, 0.0)
    sums = sum_decisions(stack([Reading(torch.zeros(3, 3), weights_TK, ids_TK, dropped_TK)]), "softmax")
    assert sums.counts_LE.tolist() == [[3, 2, 1]]
    assert sums.dropped_LE.tolist() == [[2, 1, 0]]
    assert sums.weight_sum_LE.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 64 * 64 + 70])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("span", [1.0, 30.0, 300.0])
def test_compiled_sums_of_any_number_of_tokens_and_range_of_logits_equal_those_of_tables(
    tokens: int, score: ScoreFunction, span: float
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    found = []
    for _ in range(2):
        logits_TE = span * torch.randn(tokens, 13, generator=generator)
        ids_TK = logits_TE.topk(4).indices
        found.append(Reading(logits_TE, logits_TE.softmax(-1).gather(-1, ids_TK), ids_TK))
    mine = compiled(found, score, logit_squared=True)
    tables = reduce.sum_decisions(reduce.stack(found), score, logit_squared=True)
    for name, one, other in zip(RoutingSums._fields, mine, tables, strict=True):
        size = tokens * max(1, span / 30)
        torch.testing.assert_close(
            one, other, rtol=2e-5, atol=3e-6 * size, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_logit_that_is_no_number_is_not_summed_away(bad: float, score: ScoreFunction) -> None:
    found = readings(score, None)
    found[1].logits_TE[3, 2] = bad
    sums = sum_decisions(stack(found), score)
    assert torch.isfinite(sums.token_sums_NL[1]).tolist() == [True, False, True]
    if score == "softmax" or bad != bad:  # the sigmoid of infinity is 1
        assert torch.isfinite(sums.token_sums_NL[0]).tolist() == [True, False, True]
        assert torch.isfinite(sums.prob_sum_LE).all(-1).tolist() == [True, False, True]


def test_slots_that_are_no_assignment_are_not_counted() -> None:
    ids_TK, unused_TK = torch.tensor([[0, 1], [2, 2]]), torch.tensor([[False, True], [False, False]])
    reading = Reading(torch.zeros(2, 3), torch.tensor([[0.5, 0.0], [1.0, 2.0]]), ids_TK, None, unused_TK)
    sums = sum_decisions(stack([reading]), "softmax", ranked=False)
    assert sums.counts_LE.tolist() == [[1, 0, 2]]
    assert sums.weight_sum_LE.tolist() == [[0.5, 0, 3]]


def test_counts_of_the_router_are_taken_as_they_are_but_not_where_tokens_are_left_out() -> None:
    known_E = torch.tensor([2, 1, 0])
    reading = Reading(torch.zeros(2, 3), torch.ones(2, 1), torch.tensor([[0], [0]]), counts_E=known_E)
    assert sum_decisions(stack([reading]), "softmax").counts_LE.tolist() == [[2, 1, 0]]
    valid_T = torch.tensor([True, False])
    assert sum_decisions(stack([reading]), "softmax", valid_T=valid_T).counts_LE.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    "wrong", ["negative id", "too large id", "tokens", "bias", "mask", "one without drops", "nothing"]
)
def test_what_compiled_code_must_not_read_is_left_to_tables(wrong: str) -> None:
    found, bias_LE, valid_T = readings("sigmoid", None), None, None
    if wrong == "negative id":
        found[2].expert_ids_TK[1, 1] = -1
    elif wrong == "too large id":
        found[2].expert_ids_TK[1, 1] = E
    elif wrong == "tokens":
        found[1] = found[1]._replace(weights_TK=found[1].weights_TK[:-1])
    elif wrong == "bias":
        bias_LE = torch.zeros(L - 1, E)
    elif wrong == "mask":
        valid_T = torch.ones(T + 1, dtype=torch.bool)
    elif wrong == "one without drops":
        found[0] = found[0]._replace(dropped_TK=torch.zeros(T, K, dtype=torch.bool))
    else:
        found = [Reading(*(part[:0] for part in reading[:3])) for reading in found]
    assert host_sums.sum_on_host(found, "sigmoid", bias_LE, valid_T) is None


def test_without_numba_sums_are_made_by_tables(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "numba.core", None)
    monkeypatch.setattr(host_sums, "_kernel", cache(host_sums._Kernel))
    with caplog.at_level("INFO"):
        assert host_sums.sum_on_host(readings("softmax", None), "softmax") is None
        assert host_sums.sum_on_host(readings("softmax", None), "softmax") is None
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_where_it_was_never_compiled_a_thread_does_so_and_tables_serve_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_kernel, "is_kept", lambda: False)
    monkeypatch.setattr(host_sums, "_kernel", cache(host_sums._Kernel))
    started, go = threading.Event(), threading.Event()
    compile_it = host_sums._Kernel.compile

    def slowly(self: host_sums._Kernel) -> None:
        started.set()
        assert go.wait(60)
        compile_it(self)

    monkeypatch.setattr(host_sums._Kernel, "compile", slowly)
    assert host_sums.sum_on_host(readings("softmax", None), "softmax") is None
    assert started.wait(60)
    go.set()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "moeviz-compile"]
    assert not thread.daemon
    thread.join(60)
    assert host_sums.sum_on_host(readings("softmax", None), "softmax") is not None
