"""An analysis says what brute force says: removed experts, outputs apart, decisions read by hooks of the test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from test_inspection_trace import VOCAB, mixtral_folder, opened, tiny_model

from moeviz.capture.sites import find_sites
from moeviz.cli import main
from moeviz.errors import MoevizError
from moeviz.inspection.analysis import analyze, num_ticks
from moeviz.inspection.heads import heads
from moeviz.inspection.probe_batch import (
    ProbeBatch,
    probe_of_windows,
    streams_of,
    window_length,
    windows_of,
)
from moeviz.inspection.removal import without_expert
from moeviz.metrics import GROUPS, METRICS
from moeviz.records import AnalysisValue
from moeviz.store.queries import analysis, sequences
from moeviz.store.reader import open_run

__all__ = ["mixtral_folder"]
N, S, L, E, K = 6, 9, 2, 5, 2


def probe(seed: int = 0) -> ProbeBatch:
    ids_NS = np.random.default_rng(seed).integers(0, len(VOCAB), (N, S))
    return ProbeBatch(token_ids_NS=ids_NS, domains=("prose",) * 3 + ("code",) * 3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[AnalysisValue, ...], list[str]]:
    run = tmp_path_factory.mktemp("analysis") / "run"
    told: list[str] = []
    values = analyze(
        opened(tiny_model()), probe(), run, modes=("zero", "reroute"), against=[opened(other_model())],
        progress=told.append,
    )  # fmt: skip
    return run, values, told


def other_model() -> torch.nn.Module:
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight += 0.3 * torch.randn_like(layer.mlp.gate.weight)
    return model


def routing_of(model: torch.nn.Module) -> list[tuple[np.ndarray, np.ndarray, torch.Tensor]]:
    """(ids, weights, router inputs) of every layer, by hooks of the test's own."""
    seen: list[tuple[np.ndarray, np.ndarray, torch.Tensor]] = []
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda _m, args, out: seen.append((out.expert_ids_TK.numpy(), out.weights_TK.numpy(), args[0]))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.from_numpy(probe().token_ids_NS))
    for handle in handles:
        handle.remove()
    return seen


def value_of(
    values: tuple[AnalysisValue, ...], name: str, layer: int, index: int = -1, label: str = ""
) -> float:
    (one,) = [
        each
        for each in values
        if (each.name, each.layer, each.index, each.label) == (name, layer, index, label)
    ]
    return one.value


def loss_of(model: torch.nn.Module) -> np.ndarray:
    ids_NS = torch.from_numpy(probe().token_ids_NS)
    with torch.no_grad():
        log_probs = model(ids_NS).logits_BSV.double().log_softmax(-1)
    return -log_probs[:, :-1].gather(-1, ids_NS[:, 1:, None])[..., 0].numpy()


def masked_loss(layer: int, expert: int, mode: str) -> np.ndarray:
    """The loss when the gate of one layer is written out by hand (sigmoid scores, selection bias) without an expert."""
    model = tiny_model()
    gate = model.model.layers[layer].mlp.gate

    def forward(x_TD: torch.Tensor, *rest: object) -> object:
        routing = type(gate).forward(gate, x_TD, *rest)
        if mode == "zero":
            keep_TK = (routing.expert_ids_TK != expert).float()
            return routing._replace(weights_TK=routing.weights_TK * keep_TK)
        scores_TE = torch.sigmoid(x_TD.reshape(-1, x_TD.shape[-1]) @ gate.weight.T)
        others = [at for at in range(E) if at != expert]
        rank = (scores_TE + gate.e_score_correction_bias)[:, others].topk(K, dim=-1).indices
        ids_TK = torch.tensor(others)[rank]
        chosen_TK = scores_TE.gather(-1, ids_TK)
        return routing._replace(
            expert_ids_TK=ids_TK, weights_TK=chosen_TK / chosen_TK.sum(-1, keepdim=True) * gate.config.scale
        )

    assert gate.config.norm_topk
    gate.forward = forward
    return loss_of(model.eval())


@pytest.mark.parametrize("mode", ["zero", "reroute"])
def test_knockout_is_a_forward_with_the_expert_masked_by_hand(
    found: tuple[Path, tuple[AnalysisValue, ...], list[str]], mode: str
) -> None:
    base_NS = loss_of(tiny_model().eval())
    largest = 0.0
    for layer in range(L):
        for expert in range(E):
            delta_NS = masked_loss(layer, expert, mode) - base_NS
            name = f"knockout_{mode}"
            for label, rows in (("all", slice(None)), ("prose", slice(0, 3)), ("code", slice(3, 6))):
                got = value_of(found[1], name, layer, expert, label)
                np.testing.assert_allclose(got, delta_NS[rows].mean(), atol=2e-6)
            largest = max(largest, float(np.abs(delta_NS).max()))
    assert largest > 1e-2, "removing experts must matter, or this proves nothing"


def test_model_is_as_it_was_after_a_removal() -> None:
    model = tiny_model().eval()
    before, weights = loss_of(model), {name: each.clone() for name, each in model.state_dict().items()}
    site = find_sites(model).routers[1]
    busiest = int(np.bincount(routing_of(model)[1][0].ravel()).argmax())
    with without_expert(site, busiest, "reroute"):
        assert not np.allclose(loss_of(model), before)
    np.testing.assert_array_equal(loss_of(model), before)
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())


def test_removal_refuses_an_expert_that_is_not_there() -> None:
    site = find_sites(tiny_model()).routers[0]
    with pytest.raises(MoevizError, match="0 to 4"), without_expert(site, 5, "zero"):
        pass


def test_information_agrees_with_scikit_learn(
    found: tuple[Path, tuple[AnalysisValue, ...], list[str]],
) -> None:
    routing = routing_of(tiny_model().eval())
    tokens_T, domains_T = probe().token_ids_NS.ravel(), np.repeat([0, 0, 0, 1, 1, 1], S)
    for layer, (ids_TK, _, _) in enumerate(routing):
        for name, labels_T in (
            ("mi_token", tokens_T),
            ("mi_domain", domains_T),
            ("mi_pos", np.arange(N * S) % S),
        ):
            expected = mutual_info_score(labels_T, ids_TK[:, 0])
            assert value_of(found[1], name, layer) == pytest.approx(expected, abs=1e-9)
    expected = mutual_info_score(routing[0][0][:, 0], routing[1][0][:, 0])
    assert value_of(found[1], "mi_layer", 0) == pytest.approx(expected, abs=1e-9)


def test_shares_and_partners_count_what_the_router_chose(
    found: tuple[Path, tuple[AnalysisValue, ...], list[str]],
) -> None:
    for layer, (ids_TK, _, _) in enumerate(routing_of(tiny_model().eval())):
        for expert in range(E):
            uses_T = (ids_TK == expert).any(axis=1)
            assert value_of(found[1], "share", layer, expert) == pytest.approx(uses_T.sum() / (N * S * K))
            spec = value_of(found[1], "domain_spec", layer, expert, "code")
            assert spec == pytest.approx(uses_T[3 * S :].mean())
        for one in found[1]:
            if one.name == "coact" and one.layer == layer:
                mine = ids_TK[(ids_TK == one.index).any(axis=1)]
                other = int(one.label.removeprefix("expert "))
                assert one.value == pytest.approx((mine == other).any(axis=1).mean())


def test_outputs_apart_are_those_of_the_weights(
    found: tuple[Path, tuple[AnalysisValue, ...], list[str]],
) -> None:
    model = tiny_model().eval()
    for layer, (ids_TK, weights_TK, x_TD) in enumerate(routing_of(model)):
        experts = model.model.layers[layer].mlp.experts
        outputs = []
        for expert in range(E):
            gate_TF, up_TF = (x_TD @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            outputs.append((torch.nn.functional.silu(gate_TF) * up_TF @ experts.down_proj[expert].T).detach())
        for expert in range(E):
            at_T, at_K = np.nonzero(ids_TK == expert)
            if len(at_T):
                expected = np.mean(weights_TK[at_T, at_K] * outputs[expert].norm(dim=-1).numpy()[at_T])
                assert value_of(found[1], "reap", layer, expert) == pytest.approx(expected, rel=1e-4)
        pairs = [
            torch.nn.functional.cosine_similarity(outputs[i], outputs[j], dim=-1).mean()
            for i in range(E)
            for j in range(i)
        ]
        assert value_of(found[1], "pes", layer) == pytest.approx(float(np.mean(pairs)), abs=1e-5)


def test_against_counts_kept_experts(found: tuple[Path, tuple[AnalysisValue, ...], list[str]]) -> None:
    now, before = routing_of(tiny_model().eval()), routing_of(other_model().eval())
    for layer in range(L):
        kept = [
            len({*a} & {*b}) / K
            for a, b in zip(now[layer][0].tolist(), before[layer][0].tolist(), strict=True)
        ]
        assert value_of(found[1], "saturation", layer, label="tiny") == pytest.approx(np.mean(kept))
        assert value_of(found[1], "churn", layer, label="tiny") == pytest.approx(1 - np.mean(kept))
        assert value_of(found[1], "probe_drift", layer, label="tiny") > 0


def test_every_head_is_measured(
    found: tuple[Path, tuple[AnalysisValue, ...], list[str]],
) -> None:
    heads = [each for each in found[1] if each.part == "head" and each.name == "attn_entropy"]
    assert {(each.layer, each.index) for each in heads} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(0 < each.value <= 1 for each in heads)


def test_run_holds_the_probe_and_every_value(
    found: tuple[Path, tuple[AnalysisValue, ...], list[str]],
) -> None:
    run, values, told = found
    assert len(told) == num_ticks(tiny_model(), ("zero", "reroute"))
    with open_run(run) as store:
        stored = analysis(store)
        asked = store.sql("SELECT count(*) AS n FROM analysis WHERE name = 'domain_spec'")
        texts = sequences(store)
    assert len(stored) == len(values)
    assert asked["n"][0] == L * E * 2
    assert sorted(texts["domain"]) == ["code"] * 3 + ["prose"] * 3
    hidden = {(one.name, one.layer, one.index, one.label) for one in values if one.hidden}
    rows = stored[stored["hidden"]].fillna({"unit": -1, "layer": -1})
    assert {(row.name, row.layer, row.unit, row.label) for row in rows.itertuples(index=False)} == hidden
    assert hidden, "random weights and random tokens: chance must explain something"


def test_probe_gives_every_domain_the_same_number_of_windows() -> None:
    windows = {"a": windows_of(np.arange(50), 5), "b": windows_of(np.arange(100, 117), 5), "c": []}
    made = probe_of_windows(windows, num_tokens=1000)
    assert made.domains == ("a",) * 3 + ("b",) * 3
    np.testing.assert_array_equal(made.token_ids_NS[:3, 0], [0, 15, 30])
    with pytest.raises(MoevizError, match="--data"):
        probe_of_windows({"c": []}, 10)


def test_windows_are_short_enough_for_a_null() -> None:
    assert window_length(4096, 13, 256) == 4096 // (8 * 13)
    assert window_length(100, 13, 256) == 16
    assert window_length(10**6, 2, 64) == 64


def test_streams_take_only_the_domains_asked_for() -> None:
    texts = [("a", "xx"), ("b", "yyy"), ("a", "z"), ("a", "never")]
    got = streams_of(texts, lambda text: [ord(c) for c in text], tokens_per_domain=3, domains=("a",))
    assert bytes(got["a"].tolist()) == b"xxz"
    assert len(got["b"]) == 0


def test_huggingface_folder_is_analysed(
    mixtral_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("digits", "0123456789 " * 60), ("words", "the fox ran far away. " * 30)):
        (tmp_path / "text" / name).mkdir(parents=True)
        (tmp_path / "text" / name / "one.txt").write_text(text)
    argv = ["analyze", str(mixtral_folder), "--data", str(tmp_path / "text"), "--tokens", "512", "--knockout"]
    assert main([*argv, "--run", str(tmp_path / "run"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    by_name = {row["name"] for row in rows}
    assert {"knockout_reroute", "knockout_zero", "reap", "pes", "domain_spec", "induction"} <= by_name
    assert sum(row["name"] == "knockout_zero" and row["label"] == "all" for row in rows) == 3 * 6
    assert {row["label"] for row in rows if row["name"] == "domain_spec"} == {"digits", "words"}


def test_unknown_domain_is_refused(
    mixtral_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("the fox ran far away. " * 30)
    argv = ["analyze", str(mixtral_folder), "--data", str(tmp_path / "a.txt"), "--domains", "law"]
    assert main(argv) == 1
    assert "no such domain" in capsys.readouterr().err


def test_heads_are_those_of_eager_attention(mixtral_folder: Path) -> None:
    from transformers import MixtralForCausalLM

    from moeviz.commands.inspect import open_checkpoint

    model = open_checkpoint(mixtral_folder).model
    ids_NS = np.random.default_rng(1).integers(0, 256, (3, 12))
    sites = find_sites(model)
    blocks = tuple(core.layer for core in sites.info.attentions)
    values = tuple(heads(model, sites.cores, blocks, ids_NS, 256, lambda: None))
    eager = MixtralForCausalLM.from_pretrained(mixtral_folder, attn_implementation="eager").eval()
    with torch.no_grad():
        attentions = eager(torch.from_numpy(ids_NS), output_attentions=True).attentions
    sinks = []
    for block, maps_NHSS in enumerate(attentions):
        back_SS = torch.arange(12)[:, None] - torch.arange(12)
        for head in range(2):
            maps_NSS = maps_NHSS[:, head].double()
            sinks.append(float(maps_NSS[:, :, 0].mean()))
            distance = float((maps_NSS * back_SS).sum(-1).mean())
            previous = float(maps_NSS.diagonal(-1, 1, 2).sum(-1).mean() / 12)
            assert value_of(values, "sink_mass", block, head) == pytest.approx(sinks[-1], abs=1e-5)
            assert value_of(values, "attn_distance", block, head) == pytest.approx(distance, abs=1e-4)
            assert value_of(values, "prev_token", block, head) == pytest.approx(previous, abs=1e-5)
    assert value_of(values, "sink_rate", -1) == pytest.approx(np.mean(np.array(sinks) > 0.3))


def test_every_name_that_is_stored_is_explained(
    found: tuple[Path, tuple[AnalysisValue, ...], list[str]],
) -> None:
    explained = {name for metric in METRICS for name in metric.analysis}
    assert {each.name for each in found[1]} <= explained
    elsewhere = {"overflow_max", "grad_norm_expert", "grad_per_token", "last_fluctuation"}
    elsewhere |= {"mi_domain_given_token", "vocab_spec"}  # the probe is too small for them
    elsewhere |= {"rc", "rc_ratio"}  # all its first choices are one expert
    elsewhere |= {metric.id for metric in GROUPS["latent attention"]}  # this model keeps no latents
    assert explained - {each.name for each in found[1]} <= elsewhere
