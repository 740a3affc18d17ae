"""The smoke run of presets: what is narrowed keeps its wiring, and a preset's loss falls on the text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from trainer_runs import corpus_cache

from model.config import ModelConfig
from model.presets import PRESETS

# Last, for scripts there share names with packages.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import presets as benchmark

__all__ = ["corpus_cache"]

WIRING = (
    "attention",
    "attention_bias",
    "qk_norm",
    "num_experts",
    "top_k",
    "num_shared_experts",
    "router",
    "experts",
)
WIRING += ("block", "rope", "tie_embeddings", "heads")


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_narrowed_keeps_its_wiring(name: str) -> None:
    config = PRESETS[name]()
    small = benchmark.narrowed(config)
    assert [getattr(small, field) for field in WIRING] == [getattr(config, field) for field in WIRING]
    assert small.num_heads // small.kv_heads == config.num_heads // config.kv_heads
    assert (small.num_moe_layers > 0, small.num_moe_layers < small.num_layers) == (
        config.num_moe_layers > 0,
        config.num_moe_layers < config.num_layers,
    )
    assert bool(small.reach.window) == bool(config.reach.window)
    assert benchmark.narrowed(ModelConfig(**{**vars(config), "vocab_size": 512})).num_parameters() < 4e6


def test_a_preset_learns_within_a_few_steps(tmp_path: Path, corpus_cache: Path) -> None:
    config, full = benchmark.smoke_config("mixtral-tiny", tmp_path, 30, 0)
    assert not full
    assert config.data.bytes_per_domain * benchmark.NUM_DOMAINS <= benchmark.TEXT_BYTES
    row = benchmark.smoke("mixtral-tiny", 30, 0)
    assert row["steps"] == 30
    assert row["last / first"] < 0.9
