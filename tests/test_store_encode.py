"""What is written is read back equal, for any shape."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from store_runs import model_info, new_run

from moeviz.records import (
    AlertRecord,
    AttentionRecord,
    EventRecord,
    LoadRecord,
    MetricRecord,
    Record,
    ScalarRecord,
    SequenceRecord,
    TokenRoutingRecord,
)
from moeviz.store.columns import Rows
from moeviz.store.encode import encode
from moeviz.store.encode_samples import SampleRecord, encode_samples
from moeviz.store.encode_steps import encode_steps
from moeviz.store.reader import open_run
from moeviz.store.schema import TABLES
from moeviz.store.writer import SegmentWriter


def rows(record: Record, table: str, num_experts: tuple[int, ...] = ()) -> list[dict]:
    found = [batch.to_pylist() for name, batch in encode(record, num_experts) if name == table]
    assert len(found) == 1
    return found[0]


def random_load(rng: np.random.Generator, experts: tuple[int, ...], sparse: bool) -> LoadRecord:
    shape = (len(experts), max(experts))
    own_LE = np.arange(shape[1]) < np.array(experts)[:, None]
    counts_LE = np.where(own_LE, rng.integers(0, 2**31, shape), 0)
    return LoadRecord(
        step=int(rng.integers(0, 2**31)),
        rank=int(rng.integers(0, 2**16)),
        ts=float(rng.random() * 2e9),
        tokens=int(rng.integers(1, 2**31)),
        counts_LE=counts_LE,
        prob_sum_LE=None if sparse else rng.random(shape, dtype=np.float32),
        weight_sum_LE=rng.random(shape, dtype=np.float32),
        bias_LE=None if sparse else rng.normal(size=shape).astype(np.float32),
        dropped_LE=None if sparse else counts_LE // 2,
        token_sums={}
        if sparse
        else {"entropy_nats": rng.random(len(experts), dtype=np.float32), "extra": rng.random(len(experts))},
    )


@pytest.mark.parametrize("seed", range(20))
def test_loads_survive_with_each_layers_own_number_of_experts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = tuple(int(size) for size in rng.integers(1, 40, rng.integers(1, 9)))
    record = random_load(rng, experts, sparse=bool(seed % 2))
    back = rows(record, "expert_load", experts)
    assert [row["layer"] for row in back] == list(range(len(experts)))
    for layer, row in enumerate(back):
        size = experts[layer]
        assert (row["step"], row["rank"], row["ts"], row["tokens"]) == (
            record.step,
            record.rank,
            record.ts,
            record.tokens,
        )
        assert row["counts"] == record.counts_LE[layer, :size].tolist()
        for column in ("bias", "dropped"):
            array_LE = getattr(record, f"{column}_LE")
            assert row[column] == (None if array_LE is None else array_LE[layer, :size].tolist())
        for column in ("prob_sum", "weight_sum"):
            array_LE = getattr(record, f"{column}_LE")
            if array_LE is None:
                assert row[column] is None
            else:
                np.testing.assert_allclose(row[column], array_LE[layer, :size], rtol=2**-16)
        if record.token_sums:
            mean = record.token_sums["entropy_nats"][layer] / record.tokens
            assert row["entropy_nats"] == pytest.approx(mean, rel=1e-6)
        assert row["margin"] is None


def test_sums_without_a_column_become_metrics() -> None:
    record = random_load(np.random.default_rng(0), (3, 5), sparse=False)
    back = rows(record, "metrics")
    assert [(row["name"], row["layer"]) for row in back] == [("mean/extra", 0), ("mean/extra", 1)]
    assert [row["value"] for row in back] == pytest.approx(
        (record.token_sums["extra"] / record.tokens).tolist()
    )


@pytest.mark.parametrize("seed", range(20))
def test_token_routing_survives_ragged_lengths_and_any_layout(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_layers, num_seqs, length, k = (int(n) for n in rng.integers(1, 7, 4))
    experts = rng.integers(0, 2**16, (num_layers, num_seqs, length, k)).astype(np.uint16)
    weights = rng.random(experts.shape, dtype=np.float32) * (1 if seed % 3 else 2.5)
    if seed % 2:  # a transposed view, as a gather over layers leaves it
        experts, weights = (np.asfortranarray(array) for array in (experts, weights))
    lengths = rng.integers(0, length + 1, num_seqs)
    layers, seqs = rng.permutation(50)[:num_layers], rng.permutation(70_000)[:num_seqs]
    record = TokenRoutingRecord(
        step=3,
        rank=1,
        layers=layers,
        seqs=seqs,
        experts_LNSK=experts,
        weights_LNSK=weights,
        lengths_N=lengths,
    )
    back = {(row["layer"], row["seq"]): row for row in rows(record, "routing")}
    assert len(back) == num_layers * num_seqs
    for at, layer in enumerate(layers):
        for n, seq in enumerate(seqs):
            row, size = back[layer, seq], lengths[n]
            assert (row["n_tokens"], row["k"]) == (size, k)
            assert row["experts"] == experts[at, n, :size].ravel().tolist()
            scale = row["weight_scale"]
            assert scale == max(1.0, weights[at, n].max())
            decoded = np.array(row["weights"]) * scale / 255
            np.testing.assert_allclose(decoded, weights[at, n, :size].ravel(), atol=scale / 510 + 1e-6)


def test_weights_of_a_diverged_run_are_zero_and_not_noise() -> None:
    weights = np.array([[[[np.nan, 0.5], [np.inf, 1.0]]]], dtype=np.float32)
    record = TokenRoutingRecord(
        step=0,
        rank=0,
        layers=np.array([0]),
        seqs=np.array([0]),
        experts_LNSK=np.ones((1, 1, 2, 2), np.uint16),
        weights_LNSK=weights,
        lengths_N=np.array([2]),
    )
    row = rows(record, "routing")[0]
    assert (row["weights"], row["weight_scale"]) == ([0, 128, 0, 255], 1.0)


def test_sequences_survive() -> None:
    ids, loss = (
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
    )
    record = SequenceRecord(
        step=9,
        rank=2,
        seqs=np.array([5, 0, 9]),
        token_ids_NS=ids,
        lengths_N=np.array([4, 1, 0]),
        domains=("a", None, "ä"),
        token_loss_NS=loss,
    )
    back = rows(record, "sequences")
    assert [row["token_ids"] for row in back] == [[0, 1, 2, 3], [4], []]
    assert [row["token_loss"] for row in back] == [loss[0].tolist(), loss[1, :1].tolist(), []]
    assert [(row["seq"], row["domain"], row["n_tokens"]) for row in back] == [
        (5, "a", 4),
        (0, None, 1),
        (9, "ä", 0),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_attention_survives_to_half_a_code_of_each_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    map_QC = (rng.dirichlet(np.full(9, 0.1), 6) * (rng.random((6, 1)) > 0.2)).astype(np.float32)
    row = rows(
        AttentionRecord(step=1, rank=0, layer=2, head=3, seq=4, map_QC=map_QC, q_len=60, k_len=90),
        "attention",
    )[0]
    assert (row["rows"], row["cols"], row["q_len"], row["k_len"]) == (6, 9, 60, 90)
    back = np.array(row["map"]).reshape(6, 9) * np.array(row["row_max"])[:, None] / 255
    assert (np.abs(back - map_QC) <= map_QC.max(1, keepdims=True) / 509).all()


def test_scalars_metrics_alerts_and_events_survive() -> None:
    scalar = ScalarRecord(step=1, rank=0, ts=2.5, values={"loss": 3.25, "val_loss/code": float("nan")})
    loss, val_loss = rows(scalar, "scalars")
    assert (loss["name"], loss["value"], loss["ts"]) == ("loss", 3.25, 2.5)
    assert val_loss["name"] == "val_loss/code"
    assert np.isnan(val_loss["value"])
    metric = MetricRecord(step=4, values={"gini": np.array([0.5, 0.25]), "maxvio": 0.125})
    assert [(r["name"], r["layer"], r["value"]) for r in rows(metric, "metrics")] == [
        ("gini", 0, 0.5),
        ("gini", 1, 0.25),
        ("maxvio", None, 0.125),
    ]
    alert = AlertRecord(
        episode="R/1/5",
        rule="R",
        rule_version=2,
        layer=None,
        experts=(1, 65535),
        severity="critical",
        raised_step=5,
        updated_step=7,
        cleared_step=None,
        value=0.1,
        peak=0.05,
        threshold=0.2,
        message="m",
        remedy="r",
        evidence={"counts": np.array([1, 2]), 3: "x"},
    )
    row = rows(alert, "alerts")[0]
    assert (row["step"], row["layer"], row["experts"], row["cleared_step"]) == (7, None, [1, 65535], None)
    assert row["evidence"] == '{"counts":[1,2],"3":"x"}'
    event = EventRecord(step=-1, rank=3, ts=1.5, kind="started", detail={"path": Path("a")})
    assert rows(event, "events") == [
        {"step": -1, "rank": 3, "ts": 1.5, "kind": "started", "detail": '{"path":"a"}'}
    ]


def test_every_batch_has_the_schema_of_its_table() -> None:
    for table, batch in encode(random_load(np.random.default_rng(1), (4, 2), sparse=True), (4, 2)):
        assert batch.schema == TABLES[table].schema


def test_long_lists_are_not_copied() -> None:
    experts = np.ones((2, 3, 50, 4), dtype=np.uint16)
    record = TokenRoutingRecord(
        step=0,
        rank=0,
        layers=np.arange(2),
        seqs=np.arange(3),
        experts_LNSK=experts,
        weights_LNSK=np.ones(experts.shape, np.float32),
        lengths_N=np.full(3, 50),
    )
    _, batch = next(encode(record))
    values: pa.Array = batch["experts"].values
    assert values.buffers()[1].address == experts.ctypes.data


def test_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="dict is no record"):
        next(encode({"step": 1}))


def test_a_whole_step_comes_back_from_disk(tmp_path: Path) -> None:
    new_run(tmp_path / "run", model=model_info((6, 3)))
    record = random_load(np.random.default_rng(7), (6, 3), sparse=False)
    with open_run(tmp_path / "run") as store:
        writer = SegmentWriter(tmp_path / "run")
        writer.write(record)
        writer.close()
        back = store.sql("SELECT * FROM expert_load ORDER BY layer")
    assert [counts.tolist() for counts in back["counts"]] == [
        record.counts_LE[0].tolist(),
        record.counts_LE[1, :3].tolist(),
    ]
    assert back["ts"].tolist() == [record.ts, record.ts]


def some_steps(rng: np.random.Generator) -> list[LoadRecord | MetricRecord | ScalarRecord]:
    """Records of both shapes of a load, metrics that come and go, and scalars, in the order of training."""
    records: list[LoadRecord | MetricRecord | ScalarRecord] = []
    for step in range(12):
        records.append(random_load(rng, (3, 7, 5), sparse=step % 5 == 0))
        values: dict[str, np.ndarray | float] = {"gini": rng.random(3), "drift": float(rng.random())}
        if step % 3 == 0:
            values = {"extra": rng.random(3), **values}
        records.append(MetricRecord(step=step, values=values))
        names = rng.permutation(["loss", "lr", "grad_norm", "β"])[: step % 4]
        records.append(
            ScalarRecord(step=step, rank=step % 2, ts=step / 3, values={name: rng.random() for name in names})
        )
    return records


@pytest.mark.parametrize("seed", range(3))
def test_steps_encoded_together_are_the_rows_of_each(seed: int) -> None:
    records = some_steps(np.random.default_rng(seed))

    def as_rows(found: Iterable[Rows]) -> dict[str, list[str]]:
        by_table: dict[str, list[str]] = {}
        for table, batch in found:
            by_table.setdefault(table, []).extend(map(repr, batch.to_pylist()))
        return {table: sorted(lines) for table, lines in by_table.items()}

    together = as_rows(encode_steps(records, (3, 7, 5)))
    assert together == as_rows(part for record in records for part in encode(record, (3, 7, 5)))
    assert len(together["expert_load"]) == 12 * 3


def test_a_record_that_is_no_row_costs_itself_alone(tmp_path: Path) -> None:
    path = new_run(tmp_path / "run")
    words: dict[str, Any] = {"loss": "much"}
    with_text = ScalarRecord(step=1, rank=0, ts=1.0, values=words)
    writer = SegmentWriter(path, flush_seconds=1e9)
    for step in (0, 1, 2):
        writer.write(
            with_text if step == 1 else ScalarRecord(step=step, rank=0, ts=1.0, values={"loss": 0.5})
        )
    with pytest.raises(ValueError, match="much"):
        writer.flush()
    writer.close()
    with open_run(path) as store:
        assert store.sql("SELECT step FROM scalars ORDER BY step")["step"].tolist() == [0, 2]


def some_samples(rng: np.random.Generator) -> list[SampleRecord]:
    """Sequences with and without losses and domains, their decisions, maps of any shape, and alerts."""
    records: list[SampleRecord] = []
    for step in range(6):
        num_seqs, length, k = (int(n) for n in rng.integers(1, 5, 3))
        lengths_N = rng.integers(0, length + 1, num_seqs)
        seqs, ids = np.arange(num_seqs), rng.integers(0, 900, (num_seqs, length)).astype(np.int32)
        loss = None if step % 3 == 1 else rng.random((num_seqs, length), dtype=np.float32)
        domains = tuple((None, "π", "code")[int(rng.integers(3))] for _ in seqs)
        records.append(
            SequenceRecord(
                step=step,
                rank=1,
                seqs=seqs,
                token_ids_NS=ids,
                lengths_N=lengths_N,
                domains=domains,
                token_loss_NS=loss,
            )
        )
        experts = rng.integers(0, 9, (step % 3, num_seqs, length, k)).astype(np.uint16)
        weights = rng.random(experts.shape, dtype=np.float32) * (1 + step % 2)
        records.append(
            TokenRoutingRecord(
                step=step,
                rank=1,
                layers=np.arange(step % 3),
                seqs=seqs,
                experts_LNSK=experts,
                weights_LNSK=weights,
                lengths_N=lengths_N,
            )
        )
        for head in range(3):
            map_QC = rng.random(rng.integers(1, 6, 2), dtype=np.float32)
            map_QC[rng.random(map_QC.shape) < 0.1] = rng.choice([np.nan, np.inf, -np.inf, 0.0])
            records.append(
                AttentionRecord(
                    step=step, rank=1, layer=2, head=head, seq=7, map_QC=map_QC, q_len=9, k_len=step
                )
            )
        records.append(
            AlertRecord(
                episode=f"DEAD/{step}",
                rule="DEAD",
                rule_version=1,
                layer=None if step % 2 else 3,
                experts=tuple(range(step % 3)),
                severity="error",
                raised_step=1,
                updated_step=step,
                cleared_step=step if step % 2 else None,
                value=0.5,
                peak=1.0,
                threshold=0.1,
                message="m",
                remedy="r",
                evidence={"at": step},
            )
        )
    return records


@pytest.mark.parametrize("seed", range(5))
def test_samples_encoded_together_are_the_rows_of_each_in_order(seed: int) -> None:
    records = some_samples(np.random.default_rng(seed))

    def as_rows(found: Iterable[Rows]) -> dict[str, list[str]]:
        by_table: dict[str, list[str]] = {}
        for table, batch in found:
            by_table.setdefault(table, []).extend(map(repr, batch.to_pylist()))
        return by_table

    together = as_rows(encode_samples(records))
    assert together == as_rows(part for record in records for part in encode(record))
    assert len(together["attention"]) == 6 * 3
    assert len(together["alerts"]) == 6
