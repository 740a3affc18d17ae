"""What a run of a study came to, read back from its folder: the same numbers for every study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.flops import training_flops
from moeviz.errors import MoevizError
from moeviz.store import queries
from moeviz.store.reader import Store, open_run
from trainer.checkpoint import CONFIG_FILE
from trainer.checkpoint_folder import list_checkpoints
from trainer.resume import CHECKPOINTS
from trainer.studies.trials import PRUNED_FILE, State, Trial, failure, state_of

WINDOW = 200
"""Last steps whose summed loads give MaxVio, or a quarter of a run that is shorter than four times this."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run; NaN where it does not say."""

    run: str
    path: str
    state: State
    why: str = ""
    """Why it did not finish."""
    values: Mapping[str, str] = field(default_factory=dict)
    """What distinguishes it from the others."""
    steps: int = 0
    """Optimizer steps done."""
    val_loss: float = float("nan")
    """Held-out loss after the last step, nats per token."""
    maxvio_global: float = float("nan")
    """Most loaded expert over the even share, minus 1: loads summed over the last steps, mean over layers."""
    min_load: float = float("nan")
    """Least loaded expert of all layers, over the even share, by the same loads."""
    tokens_per_second: float = float("nan")
    """Median over steps, while other runs of the study may have trained beside it."""
    parameters: float = float("nan")
    active_parameters: float = float("nan")
    training_flops_per_token: float = float("nan")
    alerts_open: tuple[str, ...] = ()
    """RULE, layer, severity of each alert open at the end."""

    def row(self) -> dict[str, object]:
        """Flat, for a table: the varied values are columns."""
        flat = asdict(self)
        values = flat.pop("values")
        return {"run": flat.pop("run"), **values, **flat, "alerts_open": ", ".join(self.alerts_open)}


def outcome_of(trial: Trial, folder: Path, state: State | None = None) -> Outcome:
    """The outcome of a trial in `folder`, of one that did not finish as far as it came.

    Args:
        state: what is known about it; None: what its folder says.
    """
    run = folder / trial.name
    state = state or state_of(trial, run)
    why = trial.problem
    if state == "pruned":
        why = json.loads((run / PRUNED_FILE).read_text())["why"]
    elif state == "failed":
        why = failure(run)
    try:
        with open_run(run) as store:
            numbers = _numbers(store)
    except MoevizError:
        numbers = {}
    told = Outcome(run=trial.name, path=str(run), state=state, why=why, values=trial.values)
    return replace(told, **numbers, **_size(run, trial))


def global_loads(store: Store, window: int = WINDOW) -> np.ndarray:
    """Loads over the even share, [L, E], summed over the last `window` steps, or a quarter of all if those are less.

    Empty, [0, 0], without routing.
    """
    last = int(store.sql("SELECT coalesce(max(step), -1) AS last FROM expert_load")["last"].iloc[0])
    if last < 0:
        return np.zeros((0, 0))
    window = min(window, max(1, (last + 1) // 4))
    rows = store.sql(
        "SELECT layer, counts FROM expert_load WHERE step > ? ORDER BY layer, step", [last - window]
    )
    sums_LE = np.stack(
        [np.stack(list(each)).astype(np.int64).sum(axis=0) for _, each in rows.groupby("layer")["counts"]]
    )
    return sums_LE / sums_LE.mean(axis=-1, keepdims=True)


def _numbers(store: Store) -> dict[str, Any]:
    loads_LE = global_loads(store)
    found = store.sql(
        """SELECT coalesce(arg_max(value, step) FILTER (name = 'val_loss'), 'nan') AS val_loss,
                  coalesce(median(value) FILTER (name = 'tokens_per_second'), 'nan') AS tokens_per_second,
                  coalesce(max(step) FILTER (name = 'loss') + 1, 0) AS steps FROM scalars"""
    ).iloc[0]
    open_alerts = [alert for alert in queries.alert_records(store) if alert.cleared_step is None]
    return {
        "steps": int(found["steps"]),
        "val_loss": float(found["val_loss"]),
        "tokens_per_second": float(found["tokens_per_second"]),
        "maxvio_global": float(np.mean(loads_LE.max(-1) - 1)) if loads_LE.size else float("nan"),
        "min_load": float(loads_LE.min()) if loads_LE.size else float("nan"),
        "alerts_open": tuple(sorted({f"{a.rule}{_where(a.layer)} {a.severity}" for a in open_alerts})),
    }


def _where(layer: int | None) -> str:
    return "" if layer is None else f" L{layer}"


def _size(run: Path, trial: Trial) -> dict[str, Any]:
    """Counts of the model as it was trained, with the vocabulary of its tokenizer; as its flags say before that."""
    checkpoints = list_checkpoints(run / CHECKPOINTS)
    model = trial.config.architecture if trial.config else None
    if checkpoints:
        model = ModelConfig.from_dict(json.loads((checkpoints[-1] / CONFIG_FILE).read_text())["model"])
    if model is None or trial.config is None:
        return {}
    return {
        "parameters": float(model.num_parameters()),
        "active_parameters": float(model.num_active_parameters()),
        "training_flops_per_token": training_flops(model, trial.config.data.seq_len),
    }
