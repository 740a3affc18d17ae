"""Three ways to balance a small MoE: what collapses, what the alerts say, what the loss hides.

Without balancing, with an auxiliary loss of 1e-3, with a selection bias in steps of 1e-3 (Wang et al. 2024,
https://arxiv.org/abs/2408.15664, whose MaxVio this is); the wider study adds ten times the loss and a bias step of 0.1.
A byte-level model of 383k parameters reads four domains, one to a sequence, all alike often. The expected bands were
set on seeds 0 to 2 of a prototype before these runs. They are about this model, AdamW's defaults and a rate that falls
to zero: with gated experts of the same width (half as many weights again), or with beta2 0.95 and a last rate of a
tenth, an auxiliary loss of 1e-3 balances less.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeviz.errors import MoevizError
from moeviz.store import queries
from moeviz.store.reader import open_run
from trainer.corpus import build_corpus
from trainer.corpus.standard_library import language_reference
from trainer.studies.outcome import Outcome
from trainer.studies.study import Finding, Study, finished
from trainer.studies.trials import Trial

ARMS: Mapping[str, tuple[str, ...]] = {
    "none": ("--balance", "none"),
    "aux 1e-3": ("--balance", "aux", "--aux-coef", "1e-3"),
    "bias 1e-3": ("--balance", "bias", "--bias-step", "1e-3"),
    "aux 1e-2": ("--balance", "aux", "--aux-coef", "1e-2"),
    "bias 0.1": ("--balance", "bias", "--bias-step", "0.1"),
}
"""Flags of `moeviz train` of each arm."""
MAIN = ("none", "aux 1e-3", "bias 1e-3")
SEEDS = (3, 4, 5)
STEPS = 800
PROSE = "prose"
DOMAINS = (PROSE, "python", "arithmetic", "json")
"""Python's language reference, code, mathematics and logs."""
TEXT = "text"
"""Folder of the domains' files, beside the runs."""
_MODEL = (
    "--preset smoke --vocab-size 257 --dim 64 --num-layers 3 --num-heads 4 --max-seq-len 64 --num-experts 8 --top-k 2 "
    "--expert-dim 96 --expert-activation gelu --positions learned --score sigmoid"
)
"""Every byte and the end of a document; 3 MoE layers of 8 experts of two matrices, top-2, sigmoid gates."""
_TRAINING = (
    "--seq-len 64 --batch-size 16 --domain-weights uniform --validation-fraction 0.1 --learning-rate 2e-3 "
    "--beta2 0.999 --warmup-steps 100 --min-lr-ratio 0 --z-coef 0 --route-every 0 --attention-every 0 "
    "--eval-sequences 64 --probe-sequences 16 --save-every 0 --threads 1"
)


def balance_study(
    folder: Path, seeds: Sequence[int] = SEEDS, steps: int = STEPS, every_arm: bool = False
) -> Study:
    """The study in `folder`: an arm's runs are named by arm, seed and steps.

    Args:
        every_arm: also the two arms that are not among the three ways.
    """
    arms = tuple(ARMS) if every_arm else MAIN
    return Study(
        name="balance",
        about="Three ways to balance experts: MaxVio, alerts, validation loss, what experts know about domains "
        "(Wang et al. 2024, arXiv:2408.15664).",
        trials=tuple(_trial(folder, arm, seed, steps) for seed in seeds for arm in arms),
        findings=findings,
        prepare=lambda into: write_text(into / TEXT),
    )


def _trial(folder: Path, arm: str, seed: int, steps: int) -> Trial:
    eighth = str(max(1, steps // 8))
    return Trial(
        name=f"{arm.replace(' ', '-')}-seed{seed}-{steps}",
        words=(
            *_MODEL.split(),
            *_TRAINING.split(),
            *(
                "--max-steps",
                str(steps),
                "--eval-every",
                eighth,
                "--probe-every",
                eighth,
                "--seed",
                str(seed),
            ),
            *ARMS[arm],
        ),
        places=("--train-data", str((folder / TEXT).resolve())),
        values={"arm": arm, "seed": str(seed)},
    )


def write_text(folder: Path) -> None:
    """The four domains as files of `folder`, where they are not yet.

    Raises:
        MoevizError: a Python without its language reference.
    """
    if all((folder / f"{domain}.jsonl").exists() for domain in DOMAINS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    texts[PROSE].extend(language_reference())
    if not texts[PROSE]:
        raise MoevizError("this Python has no pydoc_data.topics, the study's prose; use one from python.org")
    for document in build_corpus(quiet=True).documents():
        if document.domain in texts:
            texts[document.domain].append(document.text)
    for domain, found in texts.items():
        lines = [json.dumps({"text": text, "domain": domain}) for text in found]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """A finished run of an arm, with what only this study asks."""

    arm: str
    seed: int
    outcome: Outcome
    nmi_domain: float
    """Largest over layers at the end: information between domain and expert, normalised."""
    nmi_null: float
    """The same with domains dealt anew to the sequences, mean."""
    raised: Mapping[tuple[str, int | None], int]
    """First step of every alert that was ever raised, by rule and layer."""

    @property
    def open_rules(self) -> set[str]:
        return {alert.split()[0] for alert in self.outcome.alerts_open}


def arm_run(outcome: Outcome) -> ArmRun:
    """Read what only this study asks from the run's folder."""
    with open_run(outcome.path) as store:
        domains = store.sql(
            """SELECT coalesce(max(value) FILTER (name = 'nmi_domain'), 'nan') AS nmi,
                      coalesce(max(value) FILTER (name = 'nmi_domain/null_mean'), 'nan') AS null_mean
            FROM metrics WHERE step = (SELECT max(step) FROM metrics WHERE name = 'nmi_domain')"""
        ).iloc[0]
        raised: dict[tuple[str, int | None], int] = {}
        for alert in queries.alert_records(store):
            key = (alert.rule, alert.layer)
            raised[key] = min(alert.raised_step, raised.get(key, alert.raised_step))
    return ArmRun(
        arm=outcome.values["arm"],
        seed=int(outcome.values["seed"]),
        outcome=outcome,
        nmi_domain=float(domains["nmi"]),
        nmi_null=float(domains["null_mean"]),
        raised=raised,
    )


def findings(outcomes: Sequence[Outcome]) -> list[Finding]:
    """Whether each expected band holds, on every seed that finished."""
    return judge([arm_run(outcome) for outcome in finished(outcomes)])


def judge(runs: Sequence[ArmRun]) -> list[Finding]:
    """The bands, one by one; one that no run tests holds neither way."""
    by_arm = {arm: sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed) for arm in ARMS}
    none, aux, bias = (by_arm[arm] for arm in MAIN)
    return [
        _each("no balancing: MaxVio_global above 0.9", none, _maxvio, lambda run: _value(run) > 0.9),
        _each(
            "auxiliary loss 1e-3: MaxVio_global from 0.2 to 1.1",
            aux,
            _maxvio,
            lambda run: 0.2 <= _value(run) <= 1.1,
        ),
        _each("bias 1e-3: MaxVio_global below 0.1", bias, _maxvio, lambda run: _value(run) < 0.1),
        _ratio(aux, bias),
        _each(
            "no balancing: EXPERT_DEAD or ROUTING_COLLAPSE open at the end",
            none,
            _open,
            lambda run: bool(run.open_rules & {"EXPERT_DEAD", "ROUTING_COLLAPSE"}),
        ),
        _each("no balancing: LOAD_SKEW by step 100", none, _skew, lambda run: _skew_step(run) <= 100),
        _each("bias 1e-3: no alert open at the end", bias, _open, lambda run: not run.open_rules),
        *_oscillation(by_arm),
        _each(
            "every arm: domain information above 0.1, that of dealt domains below 0.02",
            runs,
            lambda run: f"{run.nmi_domain:.2f} ({run.nmi_null:.3f})",
            lambda run: run.nmi_domain > 0.1 and run.nmi_null < 0.02,
        ),
        _spread([none, aux, bias]),
    ]


def _each(
    text: str, runs: Sequence[ArmRun], shown: Callable[[ArmRun], str], holds: Callable[[ArmRun], bool]
) -> Finding:
    if not runs:
        return Finding(text, "no run")
    return Finding(text, ", ".join(shown(run) for run in runs), all(holds(run) for run in runs))


def _value(run: ArmRun) -> float:
    return run.outcome.maxvio_global


def _maxvio(run: ArmRun) -> str:
    return f"{_value(run):.3f}"


def _open(run: ArmRun) -> str:
    return " + ".join(sorted(run.open_rules)) or "none"


def _skew_step(run: ArmRun) -> float:
    return min((step for (rule, _), step in run.raised.items() if rule == "LOAD_SKEW"), default=float("inf"))


def _skew(run: ArmRun) -> str:
    return "never" if _skew_step(run) == float("inf") else f"step {_skew_step(run):g}"


def _by_seed(arms: Sequence[Sequence[ArmRun]]) -> list[list[ArmRun]]:
    """Runs of one seed side by side, for the seeds that all arms have."""
    tables = [{run.seed: run for run in arm} for arm in arms]
    seeds = sorted(set.intersection(*(set(table) for table in tables)))
    return [[table[seed] for table in tables] for seed in seeds]


def _ratio(aux: Sequence[ArmRun], bias: Sequence[ArmRun]) -> Finding:
    text = "MaxVio_global of the auxiliary loss at least 5 times that of the bias"
    ratios = [_value(one) / _value(other) for one, other in _by_seed([aux, bias])]
    if not ratios:
        return Finding(text, "no seed has both")
    return Finding(text, ", ".join(f"{ratio:.0f}x" for ratio in ratios), min(ratios) >= 5)


def _spread(arms: Sequence[Sequence[ArmRun]]) -> Finding:
    text = "validation losses of the three ways within 3 % of each other, seed by seed"
    losses = [[run.outcome.val_loss for run in row] for row in _by_seed(arms)]
    if not losses:
        return Finding(text, "no seed has all three")
    spreads = [max(row) / min(row) - 1 for row in losses]
    return Finding(text, ", ".join(f"{spread:.1%}" for spread in spreads), max(spreads) < 0.03)


def _oscillation(by_arm: Mapping[str, Sequence[ArmRun]]) -> list[Finding]:
    """A bias step far too large swings, and only that does."""

    large = by_arm["bias 0.1"]
    others = [run for arm, runs in by_arm.items() if arm != "bias 0.1" for run in runs]
    swinging = sorted({run.arm for run in others if _swings(run)})
    text = "no other arm raises BIAS_OSCILLATION"
    return [
        _each(
            "bias 0.1: BIAS_OSCILLATION raised in every layer",
            large,
            lambda run: f"{len(_swings(run))} of 3",
            lambda run: _swings(run) == {0, 1, 2},
        ),
        Finding(text, ", ".join(swinging) or "none did", not swinging) if others else Finding(text, "no run"),
    ]


def _swings(run: ArmRun) -> set[int | None]:
    """Layers whose bias was told to swing, ever."""
    return {layer for rule, layer in run.raised if rule == "BIAS_OSCILLATION"}
