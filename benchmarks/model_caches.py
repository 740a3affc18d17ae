"""What caches of keys and values take, measured on their buffers, beside the formula."""

from __future__ import annotations

from typing import Any

from model.attention_config import LatentConfig, MLAConfig, ReachConfig
from model.config import ModelConfig
from model.kv_cache import KVCache, cache_bytes


def caches() -> list[dict[str, Any]]:
    """Bytes a token that caches really take, beside the formula."""
    base: dict[str, Any] = {
        "dim": 256,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 4,
        "max_seq_len": 1024,
    }
    configs = {
        "full": ModelConfig(**base),
        "sliding 128": ModelConfig(**base, reach=ReachConfig(window=128)),
        "MLA": ModelConfig(**{**base, "num_kv_heads": None}, attention="mla", mla=MLAConfig()),
        "two-stage latents": ModelConfig(**base, attention="latent", latents=LatentConfig()),
    }
    rows = []
    for name, config in configs.items():
        for storage in ("dense", "int8") if name != "two-stage latents" else ("dense",):
            measured = KVCache(config, batch_size=1, storage=storage).num_bytes  # type: ignore[arg-type]
            formula = cache_bytes(config, batch_size=1, storage=storage)  # type: ignore[arg-type]
            rows.append(
                {
                    "cache": f"{name}, {'fp32' if storage == 'dense' else storage}",
                    "measured bytes": measured,
                    "formula bytes": formula,
                    "bytes a token and layer": measured / 1024 / config.num_layers,
                }
            )
    return rows
