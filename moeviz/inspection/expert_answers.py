"""One expert's answer to tokens of the probe: its output without gate weight, and how strongly its hidden units fire.

The hidden activation is what the last product of an expert is given. It has no hook of its own in experts that are
stored as stacked matrices, so the products themselves are watched.

Shapes: T tokens, D width, F hidden width of an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeviz.inspection.readings import LayerReading


class ExpertAnswer(NamedTuple):
    outputs_TD: Tensor
    hidden_norm_T: Tensor | None
    """Norm of the hidden activation; None where it cannot be told from outside."""


def expert_answer(layer: LayerReading, expert_ids_T: Tensor, tokens: slice = slice(None)) -> ExpertAnswer:
    """What one expert per token makes of its input.

    Args:
        expert_ids_T: the expert of each token.
        tokens: which tokens of the probe.
    """
    assert layer.experts is not None
    assert layer.inputs_TD is not None
    x_TD = layer.inputs_TD[tokens]
    ids_T1 = expert_ids_T.to(x_TD.device)[:, None]
    one_T1 = torch.ones_like(ids_T1, dtype=x_TD.dtype)
    hidden = _hidden_width(layer, x_TD.shape[-1])
    alone = len(x_TD) > 0 and bool((ids_T1 == ids_T1[:1]).all())
    with torch.no_grad():
        if hidden is None or not alone:
            return ExpertAnswer(layer.experts(x_TD, ids_T1, one_T1), None)
        with _LastProduct(hidden, x_TD.shape[-1]) as seen:
            outputs_TD = layer.experts(x_TD, ids_T1, one_T1)
    return ExpertAnswer(outputs_TD, seen.norms(outputs_TD))


def _hidden_width(layer: LayerReading, width: int) -> int | None:
    """F, from the down projection [E, D, F] or [E, F, D]."""
    down = getattr(layer.experts, "down_proj", None)
    if not isinstance(down, Tensor) or down.ndim != 3 or width not in down.shape[1:]:
        return None
    return int(down.shape[1] * down.shape[2] // width)


class _LastProduct(TorchDispatchMode):
    """Remembers the rows that went into the last matrix product F -> D, and what came out."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self._hidden, self._width = hidden, width
        self._rows: tuple[Tensor, Tensor] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if "mm" in str(func) and isinstance(result, Tensor) and result.shape[-1] == self._width:
            rows = [each for each in args if isinstance(each, Tensor) and each.shape[-1] == self._hidden]
            rows = [each for each in rows if each.ndim == 2 and len(each) == len(result)]
            if rows and result.ndim == 2:
                self._rows = rows[0], result
        return result

    def norms(self, outputs_TD: Tensor) -> Tensor | None:
        """Norms of the remembered rows, in the order of the tokens; None unless they are known to be in it."""
        if self._rows is None or self._rows[1].shape != outputs_TD.shape:
            return None
        rows_TF, products_TD = self._rows
        shift_TD = outputs_TD.float() - products_TD.float()
        # A bias moves all rows alike; rows in another order would differ from the outputs by more.
        if not torch.allclose(shift_TD, shift_TD[:1].expand_as(shift_TD), rtol=1e-2, atol=1e-4):
            return None
        return rows_TF.float().norm(dim=-1)
