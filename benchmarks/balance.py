"""Three ways to balance a small MoE, trained from scratch: what collapses, what the alerts say, what the loss hides.

    python benchmarks/balance.py --seeds 3 4 5 --out balance.json

trains each arm (no balancing; auxiliary loss, 1e-3; selection bias, 1e-3; and with --all a bias step of 0.1) on the
built-in corpus and prints MaxVio of the loads of the last 200 steps, the least used expert, the validation loss, and
the alerts still open at the end. MaxVio and the arms follow Wang et al. 2024 (https://arxiv.org/abs/2408.15664).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from rich.console import Console
from rich.table import Table

from model.config import ModelConfig, RouterConfig
from moeviz.policy import SamplingPolicy
from moeviz.store import queries
from moeviz.store.reader import open_run
from trainer.config import (
    BalanceConfig,
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    InputConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.train import train

ARMS = {
    "none": BalanceConfig(balance="none", z_coef=0.0),
    "aux 1e-3": BalanceConfig(balance="aux", aux_coef=1e-3, z_coef=0.0),
    "bias 1e-3": BalanceConfig(balance="bias", bias_step=1e-3, z_coef=0.0),
    "bias 0.1": BalanceConfig(balance="bias", bias_step=0.1, z_coef=0.0),
}
WINDOW = 200
"""Last steps whose summed loads give MaxVio_global."""


def arm_config(arm: str, seed: int, steps: int, run: Path) -> TrainConfig:
    """383k-parameter class: 3 MoE layers of 8 experts, top-2, sigmoid gates, 1,024 tokens a step."""
    model = ModelConfig(
        vocab_size=512,
        dim=64,
        num_layers=3,
        num_heads=4,
        num_experts=8,
        top_k=2,
        expert_dim=96,
        max_seq_len=64,
        router=RouterConfig(score="sigmoid"),
    )
    return TrainConfig(
        run=run,
        seed=seed,
        max_steps=steps,
        log_routing=True,
        model=model,
        data=InputConfig(seq_len=64, batch_size=16, domain_weights="uniform"),
        optim=OptimConfig(learning_rate=2e-3),
        schedule=ScheduleConfig(warmup_steps=100),
        balance=ARMS[arm],
        sampling=SamplingPolicy(route_every=0, attention_every=0),
        evaluation=EvaluationConfig(eval_every=steps, eval_sequences=16),
        checkpoint=CheckpointConfig(save_every=0),
        engine=EngineConfig(threads=1),
    )


def measure(arm: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one arm and read its outcome back from the run."""
    run = folder / f"{arm.replace(' ', '-')}-{seed}"
    result = train(arm_config(arm, seed, steps, run))
    with open_run(run) as store:
        loads = store.sql(
            "SELECT layer, counts FROM expert_load WHERE step >= ? ORDER BY layer", [max(0, steps - WINDOW)]
        )
        alerts = queries.alert_records(store)
    rel_LE = np.stack([_relative(np.stack(rows["counts"])) for _, rows in loads.groupby("layer")])
    last = result.evaluations[steps]
    return {
        "arm": arm,
        "seed": seed,
        "maxvio_global": float(np.mean(rel_LE.max(1) - 1)),
        "min_load": float(rel_LE.min()),
        "val_loss": float(np.mean([domain.loss_nats for domain in last.values()])),
        "open": sorted({f"{a.rule} L{a.layer} {a.severity}" for a in alerts if a.cleared_step is None}),
        "raised": sorted({f"{a.rule} L{a.layer} @{a.raised_step}" for a in alerts}),
        "seconds": result.seconds,
    }


def _relative(counts_TE: np.ndarray) -> np.ndarray:
    total_E = counts_TE.sum(0)
    return total_E / total_E.mean()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of each run (default 800)")
    parser.add_argument("--all", action="store_true", help="also the arm whose bias step is far too large")
    parser.add_argument("--out", type=Path, help="write the outcomes as JSON")
    options = parser.parse_args()
    arms = list(ARMS) if options.all else list(ARMS)[:3]
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for arm in arms:
                with console.status(f"training arm {arm}, seed {seed}"):
                    rows.append(measure(arm, seed, options.steps, Path(folder)))
                console.print(f"{arm}, seed {seed}: {rows[-1]['seconds']:.0f} s")
                if options.out is not None:
                    options.out.write_text(json.dumps(rows, indent=1))
    console.print(_table(rows))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="balancing, loads of the last 200 steps")
    for heading in ("arm", "seed", "MaxVio_global", "min load", "val. loss", "alerts open at the end"):
        table.add_column(heading, justify="right" if heading[0] in "sMmv" else "left")
    for row in rows:
        numbers = (f"{row['maxvio_global']:.3f}", f"{row['min_load']:.2f}", f"{row['val_loss']:.3f}")
        table.add_row(row["arm"], str(row["seed"]), *numbers, ", ".join(row["open"]) or "none")
    return table


if __name__ == "__main__":
    main()
