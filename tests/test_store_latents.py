"""What the store answers about latents is what was written, in every form that a run can have."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from latent_runs import HEADS, MLA_BLOCK, RANK, SLOT_BLOCK, STEPS, S, write_run

from moeviz.records import LatentRecord, ModelInfo
from moeviz.store import queries
from moeviz.store.compact import Rules, compact_run
from moeviz.store.export import export_run
from moeviz.store.pack import pack_run, unpack_run
from moeviz.store.reader import open_run
from moeviz.store.retention import SAMPLED, carry_out, plan

AT_ONCE = Rules(fan_in=2, most=4, delay_seconds=0.0, grace_seconds=0.0)


@pytest.fixture(scope="module", params=["live", "merged", "packed", "unpacked"])
def kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[LatentRecord]]:
    path = tmp_path_factory.mktemp(request.param) / "run"
    written = write_run(path, ranks=2)
    if request.param == "merged":
        for late in range(3):
            compact_run(path, AT_ONCE, now=time.time() + late)
    if request.param in ("packed", "unpacked"):
        pack_run(path)
    if request.param == "unpacked":
        unpack_run(path)
    return path, [record for record in written if record.rank == 0]


def test_every_picture_spectrum_and_profile_comes_back(kept: tuple[Path, list[LatentRecord]]) -> None:
    path, written = kept
    with open_run(path) as store:
        for record in written:
            found = queries.latent_arrays(store, record.step, record.layer, record.name)
            assert found is not None
            assert found.heads_X == (record.heads or (None,))
            assert (found.tokens, found.seq) == (record.tokens, record.seq)
            assert (found.first, found.length) == (record.first, record.length)
            span = np.ptp(record.grid_XSC, axis=(1, 2))
            error = np.abs(found.grid_XSC - record.grid_XSC).max(axis=(1, 2))
            assert (error <= span / 510 + 1e-6).all()
            np.testing.assert_array_equal(found.singular_XR, record.singular_XR)
            np.testing.assert_array_equal(found.profile_XC, record.profile_XC)
        assert queries.latent_arrays(store, 5, MLA_BLOCK, "kv") is None


def test_the_index_says_what_there_is(kept: tuple[Path, list[LatentRecord]]) -> None:
    path, written = kept
    with open_run(path) as store:
        index = queries.latent_index(store)
        assert store.notes == []
    expected = sorted(
        (record.step, record.layer, record.name, max(len(record.heads), 1)) for record in written
    )
    assert [*index[["step", "layer", "name", "heads"]].itertuples(index=False, name=None)] == expected
    assert set(index["seq"]) == {2}


def test_series_over_steps_are_means_over_heads(kept: tuple[Path, list[LatentRecord]]) -> None:
    path, written = kept
    with open_run(path) as store:
        for layer, name in ((MLA_BLOCK, "kv"), (SLOT_BLOCK, "write")):
            spectra = queries.latent_spectra(store, layer, name)
            profiles = queries.latent_profiles(store, layer, name, last=10)
            own = {record.step: record for record in written if (record.layer, record.name) == (layer, name)}
            for step, rows in spectra.groupby("step"):
                singular_XR = own[step].singular_XR
                shares = (singular_XR / singular_XR.sum(axis=1, keepdims=True)).mean(axis=0)
                np.testing.assert_allclose(rows["share"], shares, rtol=1e-6)
                np.testing.assert_allclose(rows["value"], singular_XR.mean(axis=0), rtol=1e-6)
                assert rows["place"].tolist() == list(range(1, len(shares) + 1))
            assert sorted(profiles["step"].unique()) == [0, 10]
            for step, rows in profiles.groupby("step"):
                np.testing.assert_allclose(rows["value"], own[step].profile_XC.mean(axis=0), rtol=1e-6)
                assert rows["place"].tolist() == list(range(own[step].profile_XC.shape[1]))


def test_quantities_are_metrics_of_the_block_and_of_one_rank(kept: tuple[Path, list[LatentRecord]]) -> None:
    path, written = kept
    with open_run(path) as store:
        found = queries.latent_metrics(store)
        assert len(queries.latent_metrics(store, last=10)) == len(found) * 2 // 3
    expected = {
        (record.step, record.layer, name): value
        for record in written
        for name, value in record.values.items()
    }
    got = {(row.step, row.layer, row.name): row.value for row in found.itertuples(index=False)}
    assert got == pytest.approx(expected)


def test_a_run_without_latents_is_whole_and_has_none(tmp_path: Path) -> None:
    write_run(tmp_path / "run", latents=False)
    with open_run(tmp_path / "run") as store:
        assert queries.latent_index(store).empty
        assert queries.latent_metrics(store).empty
        assert queries.latent_spectra(store, 0, "kv").empty
        assert store.notes == []


def test_export_holds_them(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run")
    with open_run(tmp_path / "run") as store:
        export_run(store, tmp_path / "out", "parquet")
    table = pd.read_parquet(tmp_path / "out" / "latents.parquet")
    assert len(table) == sum(max(len(record.heads), 1) for record in written)
    assert set(table["name"]) == {"kv", "q", "read", "write"}
    row = table[(table["name"] == "kv") & (table["step"] == STEPS[1])].iloc[0]
    assert (row["rows"], row["cols"], len(row["grid"])) == (S, RANK, S * RANK)
    assert pd.isna(row["head"])
    assert sorted(table[table["name"] == "write"]["head"].unique()) == list(range(HEADS))


def test_retention_takes_pictures_and_leaves_quantities(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    pack_run(tmp_path / "run")
    assert "latents" in SAMPLED
    carry_out(plan(tmp_path, drop_samples=True))
    with open_run(tmp_path / "run") as store:
        assert queries.latent_index(store).empty
        assert not queries.latent_metrics(store).empty


def test_the_model_is_described_and_older_descriptions_still_open(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with open_run(tmp_path / "run") as store:
        info = store.info.model
    assert [(each.layer, each.kind) for each in info.latents] == [
        (MLA_BLOCK, "mla"),
        (SLOT_BLOCK, "two-stage"),
    ]
    older = info.to_dict()
    del older["latents"]
    assert ModelInfo.from_dict(older).latents == ()
