"""Three ways to balance a small MoE, trained from scratch: what collapses, what the alerts say, what the loss hides.

    python benchmarks/balance.py --seeds 3 4 5 --runs runs/balance --out balance.json

trains each arm (no balancing; auxiliary loss, 1e-3; selection bias, 1e-3; and with --all ten times the loss and a bias
step of 0.1) on four domains of the built-in corpus, byte by byte, and prints MaxVio of the loads of the last 200 steps,
the least used expert, the validation loss, what experts know about domains beside its null, the alerts still open at
the end, and which claims hold. Runs that are in the folder already are read and not trained again. MaxVio and the arms
follow Wang et al. 2024 (https://arxiv.org/abs/2408.15664).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from bench_report import machine
from rich.console import Console
from rich.table import Table

from model.config import ModelConfig, RouterConfig
from moeviz.policy import SamplingPolicy
from moeviz.store import queries
from moeviz.store.reader import Store, open_run
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
from trainer.corpus import build_corpus
from trainer.train import train

ARMS = {
    "none": BalanceConfig(balance="none", z_coef=0.0),
    "aux 1e-3": BalanceConfig(balance="aux", aux_coef=1e-3, z_coef=0.0),
    "bias 1e-3": BalanceConfig(balance="bias", bias_step=1e-3, z_coef=0.0),
    "aux 1e-2": BalanceConfig(balance="aux", aux_coef=1e-2, z_coef=0.0),
    "bias 0.1": BalanceConfig(balance="bias", bias_step=0.1, z_coef=0.0),
}
DOMAINS = ("manual", "python", "arithmetic", "json")
"""Prose, code, mathematics and logs: one domain a sequence, all alike often."""
BYTES = 257
"""Vocabulary: every byte, and the end of a document."""
WINDOW = 200
"""Last steps whose summed loads give MaxVio_global."""


def write_text(folder: Path) -> Path:
    """The four domains of the embedded corpus as files of `folder`, where they are not yet."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    if not all((folder / f"{domain}.jsonl").exists() for domain in DOMAINS):
        for document in build_corpus(quiet=True).documents():
            if document.domain in texts:
                texts[document.domain].append(json.dumps({"text": document.text, "domain": document.domain}))
        for domain, lines in texts.items():
            (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    return folder


def arm_config(arm: str, seed: int, steps: int, run: Path, text: Path) -> TrainConfig:
    """The size of 0.5M parameters: 3 MoE layers of 8 experts, top-2, sigmoid gates, 1,024 bytes a step."""
    model = ModelConfig(
        vocab_size=BYTES,
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
        data=InputConfig(train_data=str(text), seq_len=64, batch_size=16, domain_weights="uniform"),
        optim=OptimConfig(learning_rate=2e-3),
        schedule=ScheduleConfig(warmup_steps=100),
        balance=ARMS[arm],
        sampling=SamplingPolicy(route_every=0, attention_every=0),
        evaluation=EvaluationConfig(
            eval_every=steps, eval_sequences=64, probe_every=max(1, steps // 8), probe_sequences=16
        ),
        checkpoint=CheckpointConfig(save_every=0),
        engine=EngineConfig(threads=1),
    )


def measure(arm: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one arm, if it was not before, and read its outcome back from the run."""
    run = folder / f"{arm.replace(' ', '-')}-seed{seed}-{steps}"
    if not run.exists():
        unfinished = run.with_name(f"unfinished-{run.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        train(arm_config(arm, seed, steps, unfinished, write_text(folder / "text")))
        unfinished.rename(run)
    with open_run(run) as store:
        return {"arm": arm, "seed": seed, **outcome(store, steps)}


def outcome(store: Store, steps: int) -> dict[str, Any]:
    """What a finished run shows."""
    loads = store.sql("SELECT step, layer, counts FROM expert_load ORDER BY layer, step")
    counts_LTE = np.stack([np.stack(rows["counts"]) for _, rows in loads.groupby("layer")]).astype(np.int64)
    rel_LE = _relative(counts_LTE[:, -WINDOW:].sum(axis=1))
    scalars = queries.scalars(store, ["val_loss"])
    domains = store.sql(
        """SELECT max(value) FILTER (name = 'nmi_domain') AS nmi,
                  max(value) FILTER (name = 'nmi_domain/null_mean') AS null_mean
        FROM metrics WHERE step = ?""",
        [steps],
    ).iloc[0]
    alerts = queries.alert_records(store)
    return {
        "maxvio_global": float(np.mean(rel_LE.max(-1) - 1)),
        "maxvio_batch": float(np.mean(_relative(counts_LTE[:, -WINDOW:]).max(-1) - 1)),
        "min_load": float(rel_LE.min()),
        "val_loss": float(scalars["value"].iloc[-1]),
        "nmi_domain": float(domains["nmi"]),
        "nmi_null": float(domains["null_mean"]),
        "open": sorted({f"{a.rule} L{a.layer} {a.severity}" for a in alerts if a.cleared_step is None}),
        "raised": sorted({f"{a.rule} L{a.layer} @{a.raised_step}" for a in alerts}),
    }


def _relative(counts_E: np.ndarray) -> np.ndarray:
    return counts_E / counts_E.mean(axis=-1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of each run (default 800)")
    parser.add_argument("--all", action="store_true", help="also the arm whose bias step is far too large")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and do not train those that are")
    parser.add_argument("--out", type=Path, help="write the outcomes as JSON")
    options = parser.parse_args()
    arms = list(ARMS) if options.all else list(ARMS)[:3]
    with tempfile.TemporaryDirectory() as folder:
        run_arms(arms, options.seeds, options.steps, options.runs or Path(folder), options.out)


def run_arms(arms: Sequence[str], seeds: Sequence[int], steps: int, folder: Path, out: Path | None) -> None:
    """Measure every arm and seed, one after the other, and print the table."""
    console, rows = Console(), []
    for seed in seeds:
        for arm in arms:
            with console.status(f"arm {arm}, seed {seed}"):
                rows.append(measure(arm, seed, steps, folder))
            if out is not None:
                out.write_text(json.dumps({"machine": machine(), "arms": rows}, indent=1))
    console.print(_table(rows))
    for claim, holds in claims(rows).items():
        console.print(f"{'holds' if holds else '[bold red]does not hold[/]'}: {claim}")


def claims(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """What these arms are trained to show, and whether they do, on every seed that was measured."""

    def of(arm: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["arm"] == arm]

    def rules(row: dict[str, Any], key: str = "open") -> set[str]:
        return {alert.partition(" ")[0] for alert in row[key]}

    skew_steps = {
        row["seed"]: min(
            [int(a.rpartition("@")[2]) for a in row["raised"] if a.startswith("LOAD_SKEW")] or [10**9]
        )
        for row in of("none")
    }
    swings = {f"BIAS_OSCILLATION L{layer} warning" for layer in range(3)}
    pairs = [(a, b) for a in of("aux 1e-3") for b in of("bias 1e-3") if a["seed"] == b["seed"]]
    losses: dict[int, list[float]] = {}
    for row in rows:
        if row["arm"] in list(ARMS)[:3]:
            losses.setdefault(row["seed"], []).append(row["val_loss"])
    found = {
        "without balancing an expert is dead or a layer collapsed at the end": all(
            rules(row) & {"EXPERT_DEAD", "ROUTING_COLLAPSE"} for row in of("none")
        ),
        "without balancing LOAD_SKEW is told by step 100": all(step <= 100 for step in skew_steps.values()),
        "without balancing MaxVio_global is above 0.9": all(row["maxvio_global"] > 0.9 for row in of("none")),
        "the bias leaves no alert open": all(not row["open"] for row in of("bias 1e-3")),
        "the bias brings MaxVio_global below 0.1": all(row["maxvio_global"] < 0.1 for row in of("bias 1e-3")),
        "an auxiliary loss of 1e-3 leaves an expert starved": all(
            "EXPERT_STARVED" in rules(row) for row in of("aux 1e-3")
        ),
        "... and MaxVio_global between 0.2 and 1.1": all(
            0.2 < row["maxvio_global"] < 1.1 for row in of("aux 1e-3")
        ),
        "... at least 5 times that of the bias": all(
            aux["maxvio_global"] >= 5 * bias["maxvio_global"] for aux, bias in pairs
        ),
        "in every arm the experts of a layer know domains: information above 0.1, its null below 0.02": all(
            row["nmi_domain"] > 0.1 and row["nmi_null"] < 0.02 for row in rows
        ),
        "validation losses of the three ways are within 3 % of each other": all(
            max(each) < 1.03 * min(each) for each in losses.values()
        ),
    }
    if of("aux 1e-2"):
        found["an auxiliary loss of 1e-2 leaves no alert open"] = all(
            not row["open"] for row in of("aux 1e-2")
        )
    if of("bias 0.1"):
        found["a bias step of 0.1 swings in every layer and raises nothing else that stays"] = all(
            set(row["open"]) == swings for row in of("bias 0.1")
        )
    return found


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="balancing, loads of the last 200 steps")
    numeric = ("seed", "MaxVio_global", "min load", "val. loss", "domain information (null)")
    for heading in ("arm", *numeric, "alerts open at the end"):
        table.add_column(heading, justify="right" if heading in numeric else "left")
    for row in rows:
        numbers = (
            f"{row['maxvio_global']:.3f}",
            f"{row['min_load']:.2f}",
            f"{row['val_loss']:.3f}",
            f"{row['nmi_domain']:.2f} ({row['nmi_null']:.3f})",
        )
        table.add_row(row["arm"], str(row["seed"]), *numbers, ", ".join(row["open"]) or "none")
    return table


if __name__ == "__main__":
    main()
