"""What readers are told about the fixed probe is what its passes say, live, packed, and after a change of tokens."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_probe_history import DOMAINS, INFO, LENGTHS, E, K, S, a_load, a_pass, some_ids

from moeviz.metrics import change
from moeviz.records import ProbeRecord
from moeviz.store import open_run, queries
from moeviz.store.pack import pack_run
from moeviz.store.past import read_past
from moeviz.store.run import RunInfo, create_run, resume_run
from moeviz.store.writer import SegmentWriter

STEPS = (0, 10, 20, 30)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("moeviz.store.run._in_process", lambda module, *args: True)
    path = tmp_path / "run"
    create_run(path, RunInfo(name="run", model=INFO))
    writer = SegmentWriter(path)
    for step in STEPS:
        writer.write(a_pass(step, some_ids(step)))
        writer.write(a_load(step))
    writer.close()
    return path


def valid(ids_NSK: np.ndarray) -> np.ndarray:
    return np.concatenate([ids_SK[:length] for ids_SK, length in zip(ids_NSK, LENGTHS, strict=True)])


def test_saturation_is_the_overlap_with_the_newest_pass(run: Path) -> None:
    with open_run(run) as store:
        rows = queries.probe_saturation(store)
        one = queries.probe_saturation(store, layer=1, last=20)
    assert rows["step"].tolist() == [*STEPS, *STEPS]
    for row in rows.itertuples():
        mine, newest = valid(some_ids(row.step)[row.layer]), valid(some_ids(STEPS[-1])[row.layer])
        assert row.saturation == pytest.approx(float(change.saturation(mine, newest)))
        assert row.top1 == pytest.approx((mine[:, 0] == newest[:, 0]).mean())
        assert row.chance == pytest.approx(K / E)
    assert rows[rows["step"] == STEPS[-1]]["saturation"].tolist() == [1, 1]
    assert rows[rows["step"] == STEPS[-1]]["moving"].tolist() == [0, 0]
    assert (
        rows["moving"].is_monotonic_decreasing or (rows.groupby("layer")["moving"].diff().dropna() <= 0).all()
    )
    assert one["step"].tolist() == [0, 10, 20], "a frozen view compares with what was newest then"
    assert one["saturation"].iloc[-1] == 1


def test_shares_of_domains_are_counted_over_tokens(run: Path) -> None:
    with open_run(run) as store:
        rows = queries.probe_domains(store, 1).set_index(["step", "domain", "expert"])
    for step, domain, expert in itertools.product(STEPS, "ba", range(E)):
        used = total = 0
        for n, s in itertools.product(range(4), range(S)):
            if s < LENGTHS[n] and DOMAINS[n] == domain:
                used += expert in some_ids(step)[1, n, s]
                total += 1
        row = rows.loc[(step, domain, expert)]
        assert row["tokens"] == total
        assert row["share"] == pytest.approx(used / total)
    sums = rows.groupby(["step", "domain"])[["share", "null_mean"]].sum()
    np.testing.assert_allclose(sums, K, err_msg="every token uses K experts, whatever its label")


def test_a_domain_that_an_expert_owns_stands_out_of_its_null(tmp_path: Path) -> None:
    path = tmp_path / "told"
    create_run(path, RunInfo(name="told", model=INFO))
    writer = SegmentWriter(path)
    ids_LNSK = some_ids(1)
    ids_LNSK[0, [0, 2]] = np.array([0, 1])
    ids_LNSK[0, [1, 3]] = np.array([2, 3])
    writer.write(a_pass(0, ids_LNSK))
    writer.close()
    with open_run(path) as store:
        rows = queries.probe_domains(store, 0).set_index(["domain", "expert"])
    assert rows.loc[("b", 0), "share"] == 1
    assert rows.loc[("a", 0), "share"] == 0
    assert 0 < rows.loc[("b", 0), "null_mean"] < 1


def test_packing_keeps_the_probe_and_training_routing_never_holds_it(run: Path) -> None:
    with open_run(run) as store:
        before = queries.probe_saturation(store), queries.probe_domains(store, 0)
        assert store.sql("SELECT count(*) AS n FROM routing")["n"][0] == 0
        assert queries.sequences(store, last=10).empty
    pack_run(run, force=True)
    with open_run(run) as store:
        assert store.info.packed
        assert queries.probe_steps(store) == [*STEPS]
        assert queries.probe_saturation(store).equals(before[0])
        assert queries.probe_domains(store, 0).equals(before[1])


def test_other_tokens_begin_another_probe(run: Path) -> None:
    resume_run(run, 40)
    writer = SegmentWriter(run)
    for step in (40, 50):
        writer.write(a_pass(step, some_ids(step), tokens=9))
    writer.close()
    with open_run(run) as store:
        assert queries.probe_steps(store) == [40, 50]
        assert queries.probe_saturation(store, 0)["step"].tolist() == [40, 50]


def test_runs_without_a_probe_answer_with_nothing(tmp_path: Path) -> None:
    path = tmp_path / "old"
    create_run(path, RunInfo(name="old", model=INFO))
    writer = SegmentWriter(path)
    writer.write(a_load(0))
    writer.close()
    for table in ("probe_routing", "probe_sequences"):  # as a run from before they existed
        shutil.rmtree(path / table)
    with open_run(path) as store:
        assert queries.probe_steps(store) == []
        assert queries.probe_passes(store, 0) is None
        assert queries.probe_saturation(store).empty
        assert queries.probe_domains(store, 0).empty


def test_what_a_resumed_run_reads_back_is_what_was_written(run: Path) -> None:
    resume_run(run, 30)
    past = [record for record in read_past(run, 30).records if isinstance(record, ProbeRecord)]
    assert [record.step for record in past] == [0, 10, 20], "the pass at the step itself is taken again"
    for record in past:
        written = a_pass(record.step, some_ids(record.step))
        assert record.sequences.token_ids_NS.tobytes() != b""
        assert record.sequences.domains == DOMAINS
        assert record.sequences.lengths_N.tolist() == LENGTHS.tolist()
        found = {int(part.layers[0]): part.experts_LNSK[0] for part in record.routings}
        for layer in range(2):
            assert np.array_equal(valid(found[layer]), valid(written.routings[0].experts_LNSK[layer]))
