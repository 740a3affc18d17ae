"""How often the alert rules cry wolf, and how soon they see what they are for: a simulation.

    python benchmarks/alerts.py --steps 8000 --out alerts.json

prints false alarms per 10,000 steps in healthy scenarios, steps from onset to alert in the others, the
scalar rules, and which bars hold. `--seed` draws everything anew; `--part quiet|loud|scalars` runs one part.
The detector judges all layers at once, so the replicates of a scenario are simply its layers. `5% rule` is the
rule in circulation: some expert below 0.4 of an even share on a single step (5 % of the assignments at 8 experts).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from alert_bars import alert_bars
from alert_scalars import scalar_delays, scalar_false_alarms
from alert_scenarios import (
    NOISES,
    ONSET,
    Counts,
    Noise,
    Truth,
    burst,
    dead_one,
    even,
    oscillate,
    published,
    relax,
    slow,
    sudden,
)
from bench_report import bar_table, machine
from rich.console import Console

from moeviz.alerts import RouterDetector
from moeviz.metrics import load
from moeviz.records import LayerInfo, LoadRecord, ModelInfo

Shape = tuple[int, int, int]
CONFIGURATIONS: tuple[Shape, ...] = (
    (8, 2, 2048),
    (8, 1, 2048),
    (16, 2, 4096),
    (32, 4, 4096),
    (64, 8, 8192),
    (64, 8, 1024),
)
"""(E, k, N): experts, experts per token, tokens per step."""
LOAD_RULES = {
    "LOAD_DRIFT": "DRIFT",
    "EXPERT_STARVED": "STARVED",
    "LOAD_SKEW": "SKEW",
    "ROUTING_COLLAPSE": "COLLAPSE",
    "EXPERT_DEAD": "DEAD",
    "BIAS_OSCILLATION": "OSCILL.",
}
LOUD = {"sudden": (sudden, 200), "slow": (slow, 2600), "dead1": (dead_one, 260), "oscillate": (oscillate, 60)}
"""Scenario -> (how to make it, steps after the onset)."""
CHUNK = 250
"""Steps drawn at once."""


@dataclass
class Outcome:
    """What the detector said in one scenario."""

    raised: dict[str, list[tuple[int, int]]]
    """Rule -> (replicate, step) of each raise."""
    critical: dict[int, int]
    """Replicate -> first step of a critical alert."""
    five_percent: int
    """Rising edges of the 5 % rule, all replicates together."""
    steps: int
    """Steps times replicates."""


def detector_for(num_experts: int, top_k: int, replicates: int) -> RouterDetector:
    """A detector whose layers are independent replicates."""
    layers = tuple(
        LayerInfo(layer=index, name=str(index), block=index, num_experts=num_experts, top_k=top_k)
        for index in range(replicates)
    )
    return RouterDetector(ModelInfo(family="simulation", layers=layers))


def chunks(steps: int) -> Iterator[np.ndarray]:
    for start in range(0, steps, CHUNK):
        yield np.arange(start, min(start + CHUNK, steps))


def simulate(truth: Truth, noise: Noise, shape: Shape, replicates: int, steps: int, seed: int) -> Outcome:
    """Run the detector over a scenario."""
    num_experts, top_k, tokens = shape
    detector = detector_for(num_experts, top_k, replicates)
    own_seed = sum(shape) + int(noise.design_effect) + 100_000 * seed
    counts = Counts(noise, tokens, top_k, (replicates, num_experts), own_seed)
    outcome = Outcome({rule: [] for rule in LOAD_RULES}, {}, 0, replicates * steps)
    below_R = np.zeros(replicates, dtype=bool)
    for step_S in chunks(steps):
        counts_SRE = counts.draw(truth(step_S))
        low_SR = load.min_load(load.load_share(counts_SRE)) < 0.4
        outcome.five_percent += int((low_SR & ~np.concatenate([below_R[None], low_SR[:-1]])).sum())
        below_R = low_SR[-1]
        for step, counts_RE in zip(step_S.tolist(), counts_SRE, strict=True):
            hear(outcome, detector, LoadRecord(step=step, rank=0, ts=0.0, tokens=tokens, counts_LE=counts_RE))
    return outcome


def hear(outcome: Outcome, detector: RouterDetector, record: LoadRecord) -> None:
    """Note what the detector says about one record."""
    for alert in detector.observe(record):
        assert alert.layer is not None
        if alert.raised_step == record.step:
            outcome.raised[alert.rule].append((alert.layer, alert.raised_step))
        if alert.severity == "critical":
            outcome.critical.setdefault(alert.layer, alert.updated_step)


def true_crossing(truth: Truth, num_experts: int, steps: int) -> int | None:
    """Steps from onset until the noise-free load of some expert falls below the starved line."""
    lowest_S = load.min_load(load.load_share(truth(np.arange(ONSET, steps))))
    below_S = lowest_S < load.starved_line(num_experts)
    return int(below_S.argmax()) if below_S.any() else None


def drift_lead(outcome: Outcome) -> int | None:
    """Fewest steps by which LOAD_DRIFT came before the collapse alert of the same replicate."""
    first: dict[str, dict[int, int]] = {"LOAD_DRIFT": {}, "ROUTING_COLLAPSE": {}}
    for rule, steps in first.items():
        for replicate, step in outcome.raised[rule]:
            if step >= ONSET:
                steps.setdefault(replicate, step)
    never = 10**9
    drift, collapse = first.values()
    leads = [step - drift.get(replicate, never) for replicate, step in collapse.items()]
    return max(min(leads), -1) if leads else None


def delays(outcome: Outcome, replicates: int) -> dict[str, dict[str, float]]:
    """Steps from onset to the first alert of each rule, over the replicates that have one."""
    table = {}
    for rule, found in outcome.raised.items():
        first: dict[int, int] = {}
        for replicate, step in found:
            if step >= ONSET:
                first.setdefault(replicate, step - ONSET)
        if first:
            values = np.array(list(first.values()))
            table[rule] = {
                "median": float(np.median(values)),
                "p90": float(np.quantile(values, 0.9)),
                "max": float(values.max()),
                "found": len(values) / replicates,
            }
    return table


def quiet_scenarios(shape: Shape, folder: Path | None) -> dict[str, tuple[Truth, float]]:
    """Healthy scenarios of a configuration: name -> (truth, share of the steps to run)."""
    num_experts, top_k, _ = shape
    found: dict[str, tuple[Truth, float]] = {"balanced": (even(num_experts, top_k), 1.0)}
    if folder is None:
        return found
    if (num_experts, top_k) == (8, 2):
        c4 = published(folder, "mistral", "c4", 2, top_k)
        found["mixtral c4 L15"] = c4, 0.3
        found["mixtral books L15"] = published(folder, "mistral", "book", 2, top_k), 0.3
        found["relax"] = relax(num_experts, top_k, c4), 0.8
    if num_experts == 64:
        c4 = published(folder, "olmoe", "c4", 2, top_k)
        found["olmoe c4 L0"] = published(folder, "olmoe", "c4", 0, top_k), 0.3
        found["olmoe c4 L15"] = c4, 0.3
        found["burst arxiv"] = burst(c4, published(folder, "olmoe", "arxiv", 2, top_k)), 0.3
        found["relax"] = relax(num_experts, top_k, c4), 0.8
    return found


def run_quiet(steps: int, replicates: int, folder: Path | None, seed: int) -> list[dict[str, Any]]:
    """False alarms of every healthy scenario, printed as they come."""
    rows = []
    for shape in CONFIGURATIONS:
        for noise in NOISES:
            for name, (truth, share) in quiet_scenarios(shape, folder).items():
                own_steps = max(int(steps * share), 1000)
                outcome = simulate(truth, noise, shape, replicates, own_steps, seed)
                alarms = {rule: len(found) for rule, found in outcome.raised.items() if found}
                row = {
                    "scenario": name,
                    "shape": shape,
                    "noise": noise.name,
                    "steps": outcome.steps,
                    "alarms": alarms,
                    "five_percent": outcome.five_percent,
                }
                rows.append(row)
                print_quiet(row)
    return rows


def print_quiet(row: dict[str, Any]) -> None:
    per = 1e4 / row["steps"]
    alarms = (
        ", ".join(f"{count * per:.2g} {LOAD_RULES[rule]}" for rule, count in row["alarms"].items()) or "0"
    )
    print(
        f"  {row['scenario']:<18} {named(row['shape']):<10} {row['noise']:<6} {row['steps']:>8,} steps   "
        f"{alarms:<28} 5% rule {row['five_percent'] * per:.0f}",
        flush=True,
    )


def run_loud(replicates: int, seed: int) -> list[dict[str, Any]]:
    """Delays of every scenario that should alarm, with clustered noise, printed as they come."""
    rows = []
    for name, (make, after) in LOUD.items():
        for shape in CONFIGURATIONS:
            truth = make(shape[0], shape[1])
            outcome = simulate(truth, NOISES[1], shape, replicates, ONSET + after, seed)
            row = {
                "scenario": name,
                "shape": shape,
                "delays": delays(outcome, replicates),
                "critical_max": max((step - ONSET for step in outcome.critical.values()), default=None),
                "true_crossing": true_crossing(truth, shape[0], ONSET + after),
                "lead": drift_lead(outcome),
            }
            rows.append(row)
            print_loud(row)
    return rows


def print_loud(row: dict[str, Any]) -> None:
    cells = []
    for rule in LOAD_RULES:
        cell = row["delays"].get(rule)
        text = "–" if cell is None else f"{cell['median']:.0f} ({cell['max']:.0f})"
        cells.append(text + (f" [{cell['found']:.0%}]" if cell and cell["found"] < 1 else ""))
    print(
        f"  {row['scenario']:<10} {named(row['shape']):<10}"
        + "".join(f"{cell:>19}" for cell in cells)
        + f"   true {row['true_crossing']}",
        flush=True,
    )


def named(shape: Shape) -> str:
    return "{},{},{}".format(*shape)


def run_scalars(steps: int, seed: int) -> dict[str, Any]:
    """The scalar rules: false alarms and delays, printed."""
    false_alarms, found = scalar_false_alarms(steps, seed), scalar_delays(seed)
    print("\nScalar rules: false alarms per 10,000 steps, then steps to detection")
    for kind, row in false_alarms.items():
        print(f"  {kind:<6}" + "  ".join(f"{rule} {count:.2f}" for rule, count in row.items()))
    for name, delay in found.items():
        print(f"  {name:<36} {delay}")
    return {"false_alarms_per_10k": false_alarms, "delays": found}


def published_folder(wish: Path | None) -> Path | None:
    """Folder of the published loads, or None (said aloud) where there is none."""
    root = Path(os.environ.get("MOEVIZ_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    folder = wish or root / "olmoe_routing"
    if (folder / "expert_counts.json").exists():
        return folder
    print("expert_counts.json not found (--data): scenarios with published loads are left out")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8_000, help="steps of a healthy scenario")
    parser.add_argument("--replicates", type=int, default=25, help="independent copies of each scenario")
    parser.add_argument("--seed", type=int, default=0, help="another one draws everything anew")
    parser.add_argument("--part", choices=("all", "quiet", "loud", "scalars"), default="all")
    parser.add_argument("--data", type=Path, help="folder with the published expert_counts.json")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    arguments = parser.parse_args()
    steps, replicates, seed, part = arguments.steps, arguments.replicates, arguments.seed, arguments.part
    before, started = machine(), time.process_time()
    result: dict[str, Any] = {"machine": before, "seed": seed, "quiet": [], "loud": []}
    if part in ("all", "quiet"):
        print("False alarms per 10,000 steps in healthy scenarios (E,k,N)")
        result["quiet"] = run_quiet(steps, replicates, published_folder(arguments.data), seed)
    if part in ("all", "loud"):
        print("\nSteps from onset to alert: median (largest) [share found]")
        print(" " * 23 + "".join(f"{title:>19}" for title in LOAD_RULES.values()))
        result["loud"] = run_loud(replicates, seed)
    if part in ("all", "scalars"):
        result["scalars"] = run_scalars(2 * steps, seed)
    bars = alert_bars(result["quiet"], result["loud"])
    result["bars"] = [{**asdict(bar), "holds": bar.holds} for bar in bars]
    result["cpu_seconds"] = time.process_time() - started
    if bars:
        Console().print(bar_table(bars))
    print(f"{result['cpu_seconds']:.0f} s of processor time")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
