"""What follows from passes over the fixed probe agrees with definitions written out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from moeviz.derive import DeriveSink
from moeviz.probe_history import ProbeHistory, domain_counts, layer_decisions, nmi_null
from moeviz.records import (
    LayerInfo,
    LoadRecord,
    MetricRecord,
    ModelInfo,
    ProbeRecord,
    Record,
    ScalarRecord,
    SequenceRecord,
    TokenRoutingRecord,
)

E, K, S = 6, 2, 5
LENGTHS = np.array([5, 3, 5, 4])
DOMAINS = ("b", "a", "b", "a")
INFO = ModelInfo(
    family="test",
    layers=tuple(
        LayerInfo(layer=at, name=f"layers.{at}", block=at + 1, num_experts=E, top_k=K) for at in range(2)
    ),
)


def a_pass(
    step: int,
    ids_LNSK: np.ndarray,
    *,
    domains: tuple[str | None, ...] = DOMAINS,
    tokens: int = 0,
    layers: tuple[int, ...] = (0, 1),
    **values: np.ndarray,
) -> ProbeRecord:
    """A pass over four sequences; `tokens` makes another text."""
    seqs = np.arange(4)
    text = SequenceRecord(
        step=step,
        rank=0,
        seqs=seqs,
        token_ids_NS=np.arange(20).reshape(4, S) + tokens,
        lengths_N=LENGTHS,
        domains=domains,
    )
    routing = TokenRoutingRecord(
        step=step,
        rank=0,
        layers=np.array(layers),
        seqs=seqs,
        experts_LNSK=ids_LNSK.astype(np.uint16),
        weights_LNSK=np.full(ids_LNSK.shape, 0.5, dtype=np.float32),
        lengths_N=LENGTHS,
    )
    return ProbeRecord(step=step, rank=0, sequences=text, routings=(routing,), layer_values=values)


def arrays(record: MetricRecord) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in record.values.items()}


def some_ids(seed: int, layers: int = 2) -> np.ndarray:
    """K different experts for each token."""
    return np.random.default_rng(seed).random((layers, 4, S, E)).argsort(-1)[..., :K]


def test_churn_and_flips_count_valid_tokens_of_consecutive_passes() -> None:
    history = ProbeHistory(INFO, 0.05)
    first, second = some_ids(1), some_ids(2)
    assert "churn" not in arrays(history.observe(a_pass(10, first)))
    found = arrays(history.observe(a_pass(20, second)))
    for layer in range(2):
        kept, flips, total = 0, 0, 0
        for n, s in itertools.product(range(4), range(S)):
            if s < LENGTHS[n]:
                kept += len({*first[layer, n, s].tolist()} & {*second[layer, n, s].tolist()})
                flips += first[layer, n, s, 0] != second[layer, n, s, 0]
                total += 1
        assert found["churn"][layer] == pytest.approx(1 - kept / total / K)
        assert found["flip1"][layer] == pytest.approx(flips / total)
    again = arrays(history.observe(a_pass(30, second)))
    assert again["churn"].tolist() == again["flip1"].tolist() == [0, 0]


def test_other_tokens_or_other_domains_are_another_probe() -> None:
    history = ProbeHistory(INFO, 0.05)
    history.observe(a_pass(10, some_ids(1)))
    assert "churn" not in arrays(history.observe(a_pass(20, some_ids(2), tokens=7)))
    assert "churn" not in arrays(
        history.observe(a_pass(30, some_ids(2), tokens=7, domains=("a", "a", "b", "b")))
    )
    assert "churn" in arrays(history.observe(a_pass(40, some_ids(2), tokens=7, domains=("a", "a", "b", "b"))))


def test_layers_without_decisions_are_nan() -> None:
    history = ProbeHistory(INFO, 0.05)
    for step in (1, 2):
        record = a_pass(step, some_ids(step, layers=1), layers=(1,), pes=np.array([np.nan, 0.25]))
        found = arrays(history.observe(record))
    assert np.isnan(found["churn"][0])
    assert found["churn"][1] > 0
    assert found["pes"][1] == 0.25
    assert sorted(layer_decisions(record)) == [1]


def test_domain_information_is_the_oracles_with_equal_domains() -> None:
    found = arrays(ProbeHistory(INFO, 0.05).observe(a_pass(0, some_ids(3))))
    for layer in range(2):
        table = np.zeros((2, E))
        for n, s in itertools.product(range(4), range(S)):
            if s < LENGTHS[n]:
                np.add.at(table[int(DOMAINS[n] == "a")], some_ids(3)[layer, n, s], 1)
        weighted = (table * table.sum(axis=1)[::-1, None]).astype(np.int64)  # both domains count alike
        expected = mutual_info_score(None, None, contingency=weighted[:, weighted.any(axis=0)]) / np.log(2)
        assert found["nmi_domain"][layer] == pytest.approx(expected)


def test_the_null_breaks_the_link_of_domains_and_nothing_else() -> None:
    rng = np.random.default_rng(4)
    domain_N = np.repeat(np.arange(3), 8)
    blind_NE = rng.multinomial(64, np.full(E, 1 / E), size=24)
    mean, sd = nmi_null(blind_NE, domain_N)
    told_NE = np.stack([rng.multinomial(64, np.roll([0.5, 0.3, 0.1, 0.1, 0, 0], 2 * d)) for d in domain_N])
    told_mean, _ = nmi_null(told_NE, domain_N)
    assert 0 < mean < 0.03
    assert sd < mean
    assert told_mean < 0.2, "sequences that differ raise the null, but never to what they know"


def test_domains_need_two_sequences_each_and_names() -> None:
    history = ProbeHistory(INFO, 0.05)
    assert "nmi_domain" not in arrays(history.observe(a_pass(0, some_ids(1), domains=(None,) * 4)))
    assert "nmi_domain" not in arrays(history.observe(a_pass(1, some_ids(1), domains=("a", "a", "b", None))))
    assert "nmi_domain" not in arrays(history.observe(a_pass(2, some_ids(1), domains=("a",) * 4)))
    ids_TK = layer_decisions(a_pass(0, some_ids(1)))[0]
    counts_DE, counts_NE, domain_N = domain_counts(ids_TK, LENGTHS, ("b", None, "b", "a"), E)
    assert counts_NE.shape == (3, E)
    assert domain_N.tolist() == [0, 0, 1]
    assert counts_DE.sum(axis=1).tolist() == [K * 10, K * 4]


def test_heads_are_told_per_layer_and_as_a_share() -> None:
    record = a_pass(0, some_ids(1))
    heads = {0: np.array([0.01, 0.9]), 1: np.array([0.02, 0.04]), 2: np.array([0.5, 0.7])}
    record = ProbeRecord(
        step=0, rank=0, sequences=record.sequences, routings=record.routings, head_entropy=heads
    )
    found = arrays(ProbeHistory(INFO, 0.05).observe(record))
    assert found["attn_entropy"].tolist() == pytest.approx([0.03, 0.6]), "blocks 1 and 2 hold the MoE layers"
    assert found["attn_collapsed"] == pytest.approx(3 / 6)


class Kept:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def a_load(step: int) -> LoadRecord:
    return LoadRecord(step=step, rank=0, ts=0.0, tokens=30, counts_LE=np.full((2, E), 10, dtype=np.int64))


def test_passes_are_derived_beside_the_loads_and_leave_them_alone() -> None:
    with_probe, without = Kept(), Kept()
    one, other = DeriveSink(with_probe, INFO), DeriveSink(without, INFO)
    for step in range(6):
        one.write(a_pass(step, some_ids(step)))
        one.write(a_load(step))
        other.write(a_load(step))

    def loads(kept: Kept) -> list[list[tuple[str, list[float]]]]:
        rows = [
            record for record in kept.records if isinstance(record, MetricRecord) and "n_eff" in record.values
        ]
        return [[(name, np.ravel(value).tolist()) for name, value in row.values.items()] for row in rows]

    assert loads(with_probe) == loads(without)
    churned = [r.step for r in with_probe.records if isinstance(r, MetricRecord) and "churn" in r.values]
    assert churned == [1, 2, 3, 4, 5]
    told = {r.step: r.values["probe_churn"] for r in with_probe.records if isinstance(r, ScalarRecord)}
    by_layer = {
        r.step: np.mean(r.values["churn"])
        for r in with_probe.records
        if isinstance(r, MetricRecord) and "churn" in r.values
    }
    assert told == by_layer, "one number for whoever looks at numbers of the run"
    assert one.failures == 0


def test_going_back_compares_with_nothing_that_was_undone() -> None:
    kept = Kept()
    sink = DeriveSink(kept, INFO)
    for step in (10, 20, 10, 20):
        sink.write(a_pass(step, some_ids(step)))
    churned = [r.step for r in kept.records if isinstance(r, MetricRecord) and "churn" in r.values]
    assert churned == [20, 20], "the first pass after going back has none"


def test_a_resumed_run_goes_on_comparing() -> None:
    kept = Kept()
    sink = DeriveSink(kept, INFO)
    sink.replay([a_pass(10, some_ids(1))])
    assert not kept.records
    sink.write(a_pass(20, some_ids(2)))
    churned = [r.values["churn"] for r in kept.records if isinstance(r, MetricRecord)]
    assert len(churned) == 1
