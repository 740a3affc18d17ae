"""Acting on alerts, where a person asked for it: through the trainer's own verbs, and told as an event each time.

The one way back from what is measured to what is trained. Factors stay within 1/16 and 16 of what was configured;
a run that needs more needs a person.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from model.router import TopKRouter
from moeviz.records import AlertRecord
from trainer.assembly import Assembly
from trainer.progress import Progress
from trainer.response_config import Response
from trainer.standing import Standing
from trainer.step import StepTaken

_MOST = 16.0
_NOISE = 0.5
"""Standard deviation of a new router row around the mean of the others, over theirs."""
_FACTORS = {
    "raise_bias": ("bias_factor", 2.0),
    "raise_aux": ("aux_factor", 2.0),
    "lower_lr": ("rate_factor", 0.5),
}


def respond(parts: Assembly, step: int, taken: StepTaken, progress: Progress) -> str | None:
    """Judge a step and do what was asked for. Every rank must call it.

    Returns:
        Why the run is to stop, if it is.
    """
    judge = parts.judge
    if judge is None:
        return None
    judge.observe(
        step,
        counts_LE=taken.counts_LE,
        z_L=taken.z_L,
        tokens=parts.tokens_per_step,
        loss=taken.loss,
        grad_norm=taken.update.grad_norm,
        model=parts.engine.module,
    )
    stop: str | None = None
    for alert, response in _due(parts, step, judge.grave):
        told = _act(parts, step, alert, response)
        where = "" if alert.layer is None else f" in layer {alert.layer}"
        progress.note(", ".join([f"step {step}: {alert.rule}{where}, so {response.action}", *told]))
        if response.action == "stop":
            stop = f"{alert.rule}{where} at step {step}: {alert.message}"
    return stop


def _due(parts: Assembly, step: int, alerts: Iterable[AlertRecord]) -> list[tuple[AlertRecord, Response]]:
    """What is to be done about open alerts now, noted as done: at first, and again after a while."""
    config, before = parts.config.response, parts.standing.responded
    due, now = [], {}
    for alert in alerts:
        for number, response in enumerate(config.responses):
            if response.rule != alert.rule:
                continue
            key = f"{alert.episode}/{number}"
            now[key] = before.get(key, step)
            if key not in before or step - before[key] >= config.respond_every:
                due.append((alert, response))
                now[key] = step
    # What is no longer open is forgotten.
    parts.standing.responded = now
    return due


def _act(parts: Assembly, step: int, alert: AlertRecord, response: Response) -> list[str]:
    """Do it and record it. Returns what changed, for people."""
    detail: dict[str, Any] = {"rule": alert.rule, "layer": alert.layer, "action": response.action}
    if response.action in _FACTORS:
        detail |= _change_factor(parts.standing, *_FACTORS[response.action])
    elif response.action == "reinit_router":
        assert alert.layer is not None
        detail |= {"experts": list(alert.experts)}
        begin_experts_anew(parts, step, alert.layer, alert.experts)
    elif response in parts.responders:
        parts.responders[response](alert)
    parts.recorder.event("intervention", step=step, **detail)
    return [f"{name} {value}" for name, value in detail.items() if name not in ("rule", "layer", "action")]


def _change_factor(standing: Standing, name: str, factor: float) -> Mapping[str, float]:
    before = getattr(standing, name)
    setattr(standing, name, min(max(before * factor, 1 / _MOST), _MOST))
    return {"factor_before": before, "factor": getattr(standing, name)}


@torch.no_grad()
def begin_experts_anew(parts: Assembly, step: int, layer: int, experts: tuple[int, ...]) -> None:
    """New router rows near the mean of the other experts' for these, with their bias at the mean and no momentum.

    The same on every rank, and the same in a resumed run: the noise follows from seed, step, layer and expert.
    """
    routers = [
        (n, module) for n, module in parts.engine.module.named_modules() if isinstance(module, TopKRouter)
    ]
    name, router = routers[layer]
    weight_ED = router.weight.detach().float().cpu()
    others = [expert for expert in range(len(weight_ED)) if expert not in experts] or list(
        range(len(weight_ED))
    )
    mean_D, spread_D = weight_ED[others].mean(dim=0), weight_ED[others].std(dim=0, correction=0)
    rows_ED = torch.stack(
        [mean_D + _NOISE * spread_D * _noise(parts, step, layer, e, mean_D) for e in experts]
    )
    parts.engine.replace_rows(f"{name}.weight", list(experts), rows_ED)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias[list(experts)] = router.e_score_correction_bias[others].mean()


def _noise(parts: Assembly, step: int, layer: int, expert: int, like: Tensor) -> Tensor:
    seed = ((parts.config.seed * 1_000_003 + step) * 1_009 + layer) * 4_099 + expert
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed % (1 << 63)))
