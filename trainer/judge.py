"""The alert rules once more, in the training loop: what a run is to act on must not depend on a thread's timing.

Every rank sees the same sums and comes to the same verdict at the same step. The state of the rules is part of each
checkpoint, so a resumed run acts when the uninterrupted one would have.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from torch import Tensor

from model.lm import MoELanguageModel
from model.router import routers
from moeviz.alerts import SEVERITIES, AlertConfig, RouterDetector, RunPlan, ScalarDetector, rule
from moeviz.records import AlertRecord, LoadRecord, ModelInfo, ScalarRecord

JUDGE_FILE = "alerts.state"
_NUMPY = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("collections", "deque"),
}
"""What else the state of the rules is made of."""


class Judge:
    """Judges every step."""

    def __init__(self, info: ModelInfo, rules: AlertConfig, plan: RunPlan) -> None:
        self._routers = RouterDetector(info, rules, plan) if info.layers else None
        self._scalars = ScalarDetector(rules, plan)

    def observe(
        self,
        step: int,
        *,
        counts_LE: Tensor,
        z_L: Tensor,
        tokens: int,
        loss: float,
        grad_norm: float,
        model: MoELanguageModel,
    ) -> None:
        """Look at a step.

        Args:
            counts_LE: assignments of all ranks.
            z_L: mean squared logsumexp of the router's logits.
            tokens: of all ranks.
            loss: nats per token.
            grad_norm: before clipping.
            model: its selection biases are looked at.
        """
        if self._routers is not None:
            self._routers.observe(
                LoadRecord(
                    step=step,
                    rank=0,
                    ts=0.0,
                    tokens=tokens,
                    counts_LE=counts_LE.cpu().numpy(),
                    bias_LE=_bias_LE(model),
                    token_sums={"lse_squared": (z_L * tokens).float().cpu().numpy()},
                )
            )
        values = {"loss": loss, "grad_norm": grad_norm}
        self._scalars.observe(ScalarRecord(step=step, rank=0, ts=0.0, values=values))

    @property
    def grave(self) -> list[AlertRecord]:
        """Open alerts at the full severity of their rule: not those that the start of a run excuses."""
        alerts = self._scalars.episodes.open_alerts
        if self._routers is not None:
            alerts = self._routers.episodes.open_alerts + alerts
        return [
            alert
            for alert in alerts
            if SEVERITIES.index(alert.severity) >= SEVERITIES.index(rule(alert.rule).severity)
        ]

    def dump(self) -> bytes:
        """The state of all rules, for a checkpoint."""
        return pickle.dumps((self._routers, self._scalars))

    def load(self, state: bytes) -> None:
        """The inverse, which builds nothing but rules, records and arrays."""
        self._routers, self._scalars = _Reader(io.BytesIO(state)).load()


class _Reader(pickle.Unpickler):
    """Reads classes of the alert rules and plain containers; a pickle can call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        ours = module == "moeviz.records" or (
            module.startswith("moeviz.alerts.") and module != "moeviz.alerts.notify"
        )
        if not ours and (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"{JUDGE_FILE} asks for {module}.{name}, which is no part of it")
        found = super().find_class(module, name)
        if ours and not isinstance(found, type):
            raise pickle.UnpicklingError(f"{JUDGE_FILE} asks for {module}.{name}, which is no class")
        return found


def _bias_LE(model: MoELanguageModel) -> np.ndarray | None:
    biases = [router.e_score_correction_bias for router in routers(model)]
    kept = [bias.detach().cpu().numpy() for bias in biases if bias is not None]
    return np.stack(kept) if kept and len(kept) == len(biases) else None
