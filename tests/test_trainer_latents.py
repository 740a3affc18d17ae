"""From the command line to the page: presets with latents record them without another flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeviz.cli import main
from moeviz.store import queries
from moeviz.store.reader import open_run

SMALL = (
    "--max-steps 11 --train-data generated --bytes-per-domain 40000 --dim 32 --num-layers 2 --seq-len 64 "
    "--batch-size 4 --expert-dim 16 --eval-every 0 --threads 1 --log-routing"
)


@pytest.mark.parametrize(
    ("preset", "parts", "quantity"),
    [("demo-mla", ["kv", "q"], "latent_erank"), ("demo-slots", ["read", "write"], "slot_n_eff")],
)
def test_a_tour_records_its_latents(
    preset: str, parts: list[str], quantity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", preset, "--run", "runs/tour", *SMALL.split()]) == 0
    with open_run(tmp_path / "runs" / "tour") as store:
        index = queries.latent_index(store)
        assert sorted(index["step"].unique()) == [0, 10]
        assert sorted(index["name"].unique()) == parts
        assert [each.layer for each in store.info.model.latents] == [0, 1]
        found = queries.latent_metrics(store)
        assert len(found[found["name"] == quantity]) == 4
        arrays = queries.latent_arrays(store, 10, 1, parts[0])
        assert arrays is not None
        texts = queries.trace_arrays(store, 10, arrays.seq).texts
        assert "".join(texts[: arrays.length]).strip()
