"""Does every preset learn? A smoke run of each on the same 200 KB of text, through the trainer as a user starts it.

    python benchmarks/presets.py [--presets demo blues ...] [--steps 60] [--full-below 4e6] [--out presets.json]

Presets of so many parameters or fewer train as they are, larger ones narrowed: the same wiring (attention, routing,
experts and their number, norms, positions, sinks, heads for each key head) in two or three blocks of width 64 or 128
with the learning rate of the demo. The vocabulary is 512 ids for all. Losses are means of three steps, in nats per
token; tokens a second are of processor time, which holds on a busy machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_report import Bar, machine, publish, save

from model.attention_config import MLAConfig
from model.config import ModelConfig
from model.presets import PRESETS
from trainer.config import CheckpointConfig, EngineConfig, EvaluationConfig, InputConfig, TrainConfig
from trainer.presets import train_preset
from trainer.train import train

TEXT_BYTES = 200_000
NUM_DOMAINS = 13
FALLS_TO = 0.9
"""The loss at the end over that at the beginning, at most."""
_WIDTH, _HEAD, _SEQ, _BATCH = 64, 16, 64, 16
_AVERAGED = 3


def narrowed(config: ModelConfig) -> ModelConfig:
    """The same wiring, small enough for a minute of one core."""
    group = config.num_heads // config.kv_heads
    mla = config.mla
    if config.attention == "mla":
        queries = None if mla.q_lora_rank is None else 32
        mla = MLAConfig(
            q_lora_rank=queries, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=_HEAD
        )
    num_layers = 3 if 0 < config.first_dense_layers < config.num_layers else 2
    return replace(
        config,
        dim=max(_WIDTH, 2 * group * _HEAD),
        num_heads=2 * group,
        num_kv_heads=None if config.attention == "mla" else 2,
        head_dim=_HEAD,
        num_layers=num_layers,
        first_dense_layers=min(config.first_dense_layers, num_layers),
        max_seq_len=_SEQ,
        mla=mla,
        latents=replace(config.latents, latent_chunk=16),
        reach=replace(config.reach, window=config.reach.window and 16),
        expert_dim=32,
        dense_ffn_dim=None,
    )


def smoke_config(name: str, run: Path, steps: int, full_below: float) -> tuple[TrainConfig, bool]:
    """A preset's run on the text, and whether the preset is whole."""
    preset = train_preset(name)
    model = replace(preset.model, vocab_size=512)
    full = model.num_parameters() <= full_below
    demo = train_preset("demo")
    config = replace(
        preset,
        run=run,
        max_steps=steps,
        model=model if full else narrowed(model),
        data=InputConfig(bytes_per_domain=TEXT_BYTES // NUM_DOMAINS, seq_len=_SEQ, batch_size=_BATCH),
        optim=preset.optim if full else demo.optim,
        schedule=replace(preset.schedule, warmup_steps=5),
        evaluation=EvaluationConfig(eval_every=0, probe_every=0),
        checkpoint=CheckpointConfig(save_every=0),
        engine=EngineConfig(device="cpu", threads=1),
    )
    return config, full


def smoke(name: str, steps: int, full_below: float) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        config, full = smoke_config(name, Path(folder) / "run", steps, full_below)
        began = time.process_time()
        result = train(config)
        seconds = time.process_time() - began
    first, last = (sum(part) / len(part) for part in (result.losses[:_AVERAGED], result.losses[-_AVERAGED:]))
    return {
        "preset": name,
        "size": "full" if full else "narrowed",
        "parameters": config.architecture.num_parameters(),
        "steps": result.steps_done,
        "first loss": round(first, 3),
        "last loss": round(last, 3),
        "last / first": round(last / first, 3),
        "tokens / cpu s": round(steps * config.data.tokens_per_step / seconds),
    }


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """Every loss falls."""
    return [
        Bar(
            what=f"{row['preset']}: loss at the end",
            value=row["last / first"],
            at_most=FALLS_TO,
            unit="of first",
        )
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--full-below", type=float, default=4e6, help="parameters of a preset that trains as it is"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    before = machine()
    rows: list[dict[str, Any]] = []
    for name in options.presets:
        rows.append(smoke(name, options.steps, options.full_below))
        save("presets", rows, bars_of(rows), before, options.out)
        print(*rows[-1].values(), flush=True)
    publish("every preset on 200 KB of text", rows, bars_of(rows), before, options.out)


if __name__ == "__main__":
    main()
