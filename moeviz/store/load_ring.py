"""The last steps of a run's loads, as arrays that a screen can draw: what a feed remembers.

Shapes: T steps kept, L MoE layers, E experts of the widest layer; columns past a layer's own are NaN.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moeviz.metrics.capacity import drop_rate
from moeviz.metrics.live import layer_shapes
from moeviz.metrics.load import expert_mask, load_entropy, load_imbalance, load_rel, load_share, n_eff
from moeviz.records import ModelInfo

EMA_STEPS = 20
"""Steps over which the moving average of the load forgets: weight 2 / (EMA_STEPS + 1)."""


class LoadRing:
    """Newest loads, their moving average, and the history of three quantities per layer."""

    def __init__(self, info: ModelInfo, history: int) -> None:
        self._history = history
        self._experts_L, _ = layer_shapes(info)
        shape = (len(self._experts_L), info.max_experts)
        self._own_LE = expert_mask(self._experts_L, shape[1])
        self.steps_T = np.zeros(0, dtype=np.int64)
        self.times_T = np.zeros(0)
        self.load_entropy_TL = np.zeros((0, shape[0]), dtype=np.float32)
        self.route_entropy_TL = np.zeros((0, shape[0]), dtype=np.float32)
        self.max_load_TL = np.zeros((0, shape[0]), dtype=np.float32)
        self.load_rel_LE = np.full(shape, np.nan, dtype=np.float32)
        self.load_rel_ema_LE = np.full(shape, np.nan, dtype=np.float32)
        self.n_eff_L = np.full(shape[0], np.nan, dtype=np.float32)
        self.drop_rate_L = np.zeros(shape[0], dtype=np.float32)
        self.tokens = 0

    @property
    def step(self) -> int:
        """Newest step, -1 before the first."""
        return int(self.steps_T[-1]) if len(self.steps_T) else -1

    @property
    def interval(self) -> float:
        """Median seconds between the kept steps; 0 with fewer than two."""
        return float(np.median(np.diff(self.times_T))) if len(self.times_T) > 1 else 0.0

    def extend(self, rows: pd.DataFrame) -> None:
        """Append newer steps.

        Args: rows: as `queries.load_history` gives them: step, layer, ts, tokens, counts, dropped,
            entropy_nats.
        """
        if rows.empty:
            return
        steps_T, at_T = np.unique(rows["step"].to_numpy(), return_inverse=True)
        layer = rows["layer"].to_numpy()
        shape = (len(steps_T), *self._own_LE.shape)
        counts_TLE = np.zeros(shape)
        for t, one, counts in zip(at_T, layer, rows["counts"], strict=True):
            counts_TLE[t, one, : len(counts)] = counts
        entropy_TL, dropped_TL = np.full(shape[:2], np.nan), np.zeros(shape[:2])
        entropy_TL[at_T, layer] = rows["entropy_nats"].to_numpy(dtype=np.float64, na_value=np.nan)
        dropped_TL[at_T, layer] = rows["dropped"].to_numpy()
        share_TLE = load_share(counts_TLE)
        rel_TLE = np.where(self._own_LE, load_rel(share_TLE, self._experts_L), np.nan).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            route_entropy_TL = entropy_TL / np.log(self._experts_L)
        self._keep("steps_T", steps_T)
        self._keep("times_T", rows.groupby(at_T)["ts"].max().to_numpy())
        self._keep("load_entropy_TL", load_entropy(share_TLE, self._experts_L))
        self._keep("route_entropy_TL", route_entropy_TL)
        self._keep("max_load_TL", load_imbalance(share_TLE, self._experts_L))
        for rel_LE in rel_TLE:
            self._average(rel_LE)
        self.load_rel_LE = rel_TLE[-1]
        self.n_eff_L = n_eff(share_TLE[-1]).astype(np.float32)
        self.drop_rate_L = np.nan_to_num(drop_rate(dropped_TL[-1][:, None], counts_TLE[-1])).astype(
            np.float32
        )
        self.tokens = int(rows["tokens"].to_numpy()[at_T == len(steps_T) - 1].max())

    def _keep(self, name: str, newer: np.ndarray) -> None:
        """A new array each time: snapshots hold on to the old one."""
        older = getattr(self, name)
        setattr(self, name, np.concatenate((older, newer.astype(older.dtype)))[-self._history :])

    def _average(self, rel_LE: np.ndarray) -> None:
        alpha = np.float32(2 / (EMA_STEPS + 1))
        known = ~np.isnan(self.load_rel_ema_LE)
        moved_LE = np.where(known, self.load_rel_ema_LE + alpha * (rel_LE - self.load_rel_ema_LE), rel_LE)
        self.load_rel_ema_LE = np.where(np.isnan(rel_LE), self.load_rel_ema_LE, moved_LE)
