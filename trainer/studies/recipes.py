"""Three studies of the field, ready to run on a laptop: architecture, learning rate, expert configuration.

All are sized by the demo: 4 blocks of width 128, the built-in corpus, sequences of 128 tokens. What must be equal for a
comparison to mean something (what a token costs, the data, the steps) is a finding of its own, computed from the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from trainer.studies.outcome import Outcome
from trainer.studies.study import Finding, Study, finished
from trainer.studies.trials import Trial, slug

STEPS = 300
_TRAINING = (
    "--seq-len 128 --batch-size 8 --warmup-steps 20 --eval-sequences 16 --save-every 0 --route-every 0 "
    "--attention-every 0 --latent-every 0 --threads 1"
)
_DENSE = ("--first-dense-layers", "4", "--balance", "none")
"""Every feed-forward layer dense and as wide as the experts that a token uses."""

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "GPT-2": ("--preset", "gpt2-tiny", "--balance", "none"),
    "dense": ("--preset", "demo", *_DENSE),
    "MLA + dense": ("--preset", "demo-mla", *_DENSE),
    "MoE": ("--preset", "demo"),
    "MLA + MoE": ("--preset", "demo-mla"),
}
LEARNING_RATES = ("3e-4", "1e-3", "3e-3", "1e-2", "3e-2")
EXPERTS = ((4, 1, 256), (8, 2, 128), (16, 4, 64), (32, 8, 32), (4, 2, 128), (16, 2, 128), (32, 2, 128))
"""Experts, experts a token uses, width of one. Always K * F = 256: a token costs the same but for the router."""


def architecture_study(seeds: Sequence[int] = (0,), steps: int = STEPS) -> Study:
    """Dense, MLA, MoE, both, and GPT-2, at equal cost of a token."""
    arms = [
        ({"architecture": name}, (*words, "--learning-rate", "3e-3")) for name, words in ARCHITECTURES.items()
    ]
    return Study(
        name="architecture",
        about="Five architectures of 4 blocks, equal in active parameters and FLOPs of a token: GPT-2 (Radford et al. "
        "2019), dense Llama blocks, MLA (DeepSeek-V2, arXiv:2405.04434), experts, and both.",
        trials=_trials(arms, seeds, steps),
        findings=lambda outcomes: [*_equal_cost(outcomes, 0.05), *_ranking(outcomes, "architecture")],
    )


def learning_rate_study(seeds: Sequence[int] = (0,), steps: int = STEPS) -> Study:
    """The demo's model over two decades of the learning rate."""
    arms = [
        ({"learning-rate": rate}, ("--preset", "demo", "--learning-rate", rate)) for rate in LEARNING_RATES
    ]
    return Study(
        name="learning-rate",
        about="The demo's MoE at five learning rates, half a decade apart, all else equal. A best rate at an edge "
        "means that the range must be moved.",
        trials=_trials(arms, seeds, steps),
        findings=lambda outcomes: [*_ranking(outcomes, "learning-rate"), *_inside(outcomes)],
    )


def expert_study(seeds: Sequence[int] = (0,), steps: int = STEPS) -> Study:
    """Granularity and sparsity at equal active parameters."""
    arms = [
        (
            {"experts": f"{num} of {width}, top-{top}"},
            (
                *("--preset", "demo", "--learning-rate", "3e-3", "--shared-expert-dim", "128"),
                *("--num-experts", str(num), "--top-k", str(top), "--expert-dim", str(width)),
            ),
        )
        for num, top, width in EXPERTS
    ]
    return Study(
        name="experts",
        about="Experts at equal active parameters: finer ones at equal total parameters (4 of 256 to 32 of 32, after "
        "Krajewski et al. 2024, arXiv:2402.07871), and more of them (4 to 32 of 128), which only adds parameters.",
        trials=_trials(arms, seeds, steps),
        findings=lambda outcomes: [*_equal_cost(outcomes, 0.05), *_ranking(outcomes, "experts")],
    )


RECIPES: Mapping[str, Callable[[Sequence[int], int], Study]] = {
    "architecture": architecture_study,
    "learning-rate": learning_rate_study,
    "experts": expert_study,
}


def _trials(
    arms: Sequence[tuple[Mapping[str, str], tuple[str, ...]]], seeds: Sequence[int], steps: int
) -> tuple[Trial, ...]:
    """A trial for each arm and seed, all arms of a seed before the next seed."""
    sixth = str(max(1, steps // 6))
    common = (*_TRAINING.split(), "--max-steps", str(steps), "--eval-every", sixth, "--probe-every", sixth)
    found = []
    for seed in seeds:
        for told, words in arms:
            values = {**told, "seed": str(seed)}
            name = f"{slug(values)},steps={steps}"
            found.append(Trial(name=name, words=(*words, *common, "--seed", str(seed)), values=values))
    return tuple(found)


def _equal_cost(outcomes: Sequence[Outcome], tolerance: float) -> list[Finding]:
    """Whether a token cost the same in all runs, by counting."""
    done = finished(outcomes)
    found = []
    for text, name in (
        ("active parameters", "active_parameters"),
        ("FLOPs of a token", "training_flops_per_token"),
    ):
        counts = [getattr(outcome, name) for outcome in done]
        text = f"{text} equal within {tolerance:.0%}"
        if len(counts) < 2:
            found.append(Finding(text, "fewer than two runs"))
            continue
        shown = f"{min(counts) / 1e6:.2f} to {max(counts) / 1e6:.2f} million"
        found.append(Finding(text, shown, max(counts) <= (1 + tolerance) * min(counts)))
    return found


def _ranking(outcomes: Sequence[Outcome], axis: str) -> list[Finding]:
    """Mean validation loss of each arm, the least first, beside what seeds alone do."""
    losses = _losses(outcomes, axis)
    if not losses:
        return [Finding("validation loss, best first", "no finished run")]
    order = sorted(losses, key=lambda arm: mean(losses[arm]))
    shown = ", ".join(f"{arm} {mean(losses[arm]):.3f}" for arm in order)
    spreads = [max(each) - min(each) for each in losses.values() if len(each) > 1]
    noise = f"{max(spreads):.3f} nats" if spreads else "unknown with one seed; give --seeds 0 1 2"
    return [
        Finding("validation loss, mean over seeds, best first", shown),
        Finding("largest difference between seeds of one arm", noise),
    ]


def _inside(outcomes: Sequence[Outcome]) -> list[Finding]:
    losses = _losses(outcomes, "learning-rate")
    text = "the best learning rate is not at an edge of those that were tried"
    if len(losses) < len(LEARNING_RATES):
        return [Finding(text, "not all rates finished")]
    best = min(losses, key=lambda rate: mean(losses[rate]))
    return [Finding(text, best, best not in (LEARNING_RATES[0], LEARNING_RATES[-1]))]


def _losses(outcomes: Sequence[Outcome], axis: str) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {}
    for outcome in finished(outcomes):
        if outcome.val_loss == outcome.val_loss:
            losses.setdefault(outcome.values[axis], []).append(outcome.val_loss)
    return losses
