"""A checkpoint's latents on a probe are those that hooks of the test see, over all of its tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from capture_models import small_model
from rich.console import Console
from test_capture_latents import MLA, RANK, SLOTS, TWO_STAGE, erank
from test_inspection_analysis import probe
from test_inspection_trace import VOCAB, opened

from moeviz.inspection.analysis import analyze
from moeviz.inspection.findings_report import _latent_table
from moeviz.inspection.latents import latents
from moeviz.store import queries
from moeviz.store.reader import open_run


def test_every_block_is_measured_over_all_tokens() -> None:
    model = small_model(**MLA, vocab_size=len(VOCAB)).eval()
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.latents.register_forward_hook(lambda _m, _a, out: seen.append(out))  # type: ignore[union-attr]
    ids_NS = probe().token_ids_NS
    found = {(each.layer, each.name): each.value for each in latents(model, ids_NS)}
    assert len(seen) == 3
    for block, latents_BSR in enumerate(seen):
        c_TR = latents_BSR.detach().reshape(ids_NS.size, RANK).double().numpy()
        expected = erank(c_TR - c_TR.mean(axis=0))
        assert found[block, "latent_erank"] == pytest.approx(expected, rel=1e-5)
        assert found[block, "latent_util"] == pytest.approx(expected / RANK, rel=1e-5)
    assert model.training is False


def test_slots_are_measured_and_a_model_without_latents_has_none() -> None:
    ids_NS = np.random.default_rng(0).integers(0, len(VOCAB), (4, 14))
    found = {(each.layer, each.name): each.value for each in latents(small_model(**TWO_STAGE).eval(), ids_NS)}
    assert {block for block, _ in found} == {0, 1, 2}
    assert all(1 <= found[block, "slot_n_eff"] <= SLOTS for block in range(3))
    assert latents(small_model().eval(), ids_NS) == []


def test_an_analysis_keeps_and_prints_them(tmp_path: Path) -> None:
    checkpoint = opened(small_model(**MLA, vocab_size=len(VOCAB)))
    values = analyze(checkpoint, probe(), tmp_path / "run")
    own = [each for each in values if each.name == "latent_erank"]
    assert [(each.part, each.layer, each.index) for each in own] == [
        ("head", block, -1) for block in range(3)
    ]
    with open_run(tmp_path / "run") as store:
        kept = queries.analysis(store)
        assert len(kept[kept["name"] == "latent_erank"]) == 3
        assert set(queries.latent_index(store)["layer"]) == {0, 1, 2}
    table = _latent_table(values)
    assert table is not None
    console = Console(record=True, width=120)
    console.print(table)
    text = console.export_text()
    assert f"{own[1].value:.3f}" in text
    assert "block 2" in text
    assert _latent_table([replace(each, part="layer") for each in values]) is None
