"""The output matrix, and the cross-entropy fused with it.

Logits are the largest tensor of a small language model (T x V), needed only to be summed. So with labels
the head walks over chunks of tokens and computes loss and gradients of a chunk while its logits are still
in cache: T x V is never stored, and backward has nothing left to multiply but a scalar.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.linear import linear, onednn_pays, rows_times
from model.precision import matmul_dtype

IGNORE = -100
"""Label of a position that counts for nothing."""
_CHUNK_LOGITS_CPU = 1 << 21
"""Logits of one chunk: 8 MB in float32. Fewer rows make slower products, more leave the last cache."""
_CHUNK_LOGITS_GPU = 1 << 25
"""128 MB in float32: enough rows to fill a GPU."""


class HeadOutput(NamedTuple):
    """Logits without labels, the two losses with them."""

    logits_BSV: Tensor | None
    ce: Tensor | None
    """Scalar, nats: mean over the labels that are not IGNORE; 0 where there are none."""
    token_loss_BS: Tensor | None
    """float32, nats, detached; 0 at ignored positions."""
    correct_BS: Tensor | None
    """Bool: whether the label is the most probable token; False at ignored positions. None with gradients."""


class TokenLosses(NamedTuple):
    """What `linear_cross_entropy` says of T tokens."""

    ce: Tensor
    """Scalar, nats: mean over labels that are not IGNORE."""
    token_loss_T: Tensor
    """Nats, detached."""
    correct_T: Tensor | None
    """Whether the label has the largest logit. None where gradients are wanted: training does not ask."""


class LMHead(nn.Linear):
    """hidden W^T, or its cross-entropy."""

    _columns_DV: Tensor | None

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)
        self._columns_DV = None

    def forward(self, hidden_BSD: Tensor, labels_BS: Tensor | None = None) -> HeadOutput:  # type: ignore[override]
        if labels_BS is None:
            if self._columns_DV is not None:
                return HeadOutput(hidden_BSD @ self._columns_DV, None, None, None)
            return HeadOutput(linear(hidden_BSD, self.weight), None, None, None)
        dtype = matmul_dtype(hidden_BSD)
        ce, token_loss_T, correct_T = linear_cross_entropy(
            hidden_BSD.flatten(0, 1).to(dtype), self.weight.to(dtype), labels_BS.flatten()
        )
        correct_BS = None if correct_T is None else correct_T.view_as(labels_BS)
        return HeadOutput(None, ce, token_loss_T.view_as(labels_BS), correct_BS)

    def columns(self) -> Tensor:
        """[D, V], a copy: the weight as `by_columns` wants it."""
        return self.weight.detach().t().contiguous()

    @contextmanager
    def by_columns(self, columns_DV: Tensor) -> Iterator[None]:
        """Inside, logits come from `columns_DV`, what `columns` returned since the weight last changed.

        One token's product is then a sum of columns instead of V dot products, which MKL computes 1.3 to 2.7 times
        as fast (4,096 x 128 to 32,000 x 512 in float32, one thread).
        """
        self._columns_DV = columns_DV
        try:
            yield
        finally:
            self._columns_DV = None


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> TokenLosses:
    """Cross-entropy of softmax(hidden W^T) in nats. Only the mean has gradients, and only first ones."""
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    ce, token_loss_T, _, _, correct_T = _fused_cross_entropy(hidden_TD, weight_VD, labels_T, needs_grad)
    return TokenLosses(ce, token_loss_T.detach(), None if needs_grad else correct_T)


@torch.library.custom_op("moe_model::linear_cross_entropy", mutates_args=())
def _fused_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean loss, token losses, and with `needs_grad` the gradients of hidden and weight; without it whether
    each label is the most probable token. What is not asked for is empty.
    """
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    valid_T = labels_T != IGNORE
    scale_T = valid_T.to(wide) / valid_T.sum().clamp_min(1)
    targets_T = labels_T.masked_fill(~valid_T, 0)
    token_loss_T = torch.empty_like(scale_T)
    grad_hidden_TD = torch.empty_like(hidden_TD) if needs_grad else hidden_TD.new_empty(0)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_grad else hidden_TD.new_empty(0)
    correct_T = torch.empty_like(valid_T if not needs_grad else valid_T[:0])
    buffer_TV = None
    with torch.autocast(hidden_TD.device.type, enabled=False):
        for rows in _chunks(hidden_TD, weight_VD):
            logits_TV = _product(hidden_TD[rows], weight_VD)
            own_T = logits_TV.gather(1, targets_T[rows][:, None]).squeeze(1)
            largest_T = logits_TV.amax(dim=-1)
            if not needs_grad:  # a maximum costs a fourteenth of what torch's argmax does on a CPU
                correct_T[rows] = (own_T >= largest_T) & valid_T[rows]
            if logits_TV.dtype == wide:
                probs_TV = logits_TV
            else:
                buffer_TV = torch.empty_like(logits_TV, dtype=wide) if buffer_TV is None else buffer_TV
                probs_TV = buffer_TV[: len(logits_TV)].copy_(logits_TV)
            # In place, here and below: fresh memory of this size costs as much as the exponentials.
            torch.softmax(probs_TV, dim=-1, out=probs_TV)
            token_loss_T[rows] = _losses(probs_TV, largest_T, own_T)
            if needs_grad:
                errors_TV = logits_TV.copy_(_logit_gradients(probs_TV, targets_T[rows], scale_T[rows]))
                grad_hidden_TD[rows] = _product(errors_TV, weight_VD.t())
                _add_product(grad_weight_VD, errors_TV.t(), hidden_TD[rows])
        ce = token_loss_T @ scale_T
    token_loss_T.masked_fill_(~valid_T, 0)
    return ce, token_loss_T, grad_hidden_TD, grad_weight_VD.to(weight_VD.dtype), correct_T


def _chunks(hidden_TD: Tensor, weight_VD: Tensor) -> list[slice]:
    """Slices of tokens whose logits fit the budget of the device."""
    budget = _CHUNK_LOGITS_CPU if hidden_TD.device.type == "cpu" else _CHUNK_LOGITS_GPU
    step = max(1, budget // len(weight_VD))
    return [slice(start, start + step) for start in range(0, len(hidden_TD), step)]


def _losses(probs_TV: Tensor, largest_T: Tensor, own_T: Tensor) -> Tensor:
    """-log of the target's probability, without another exponential for each logit.

    The largest probability is exp(largest logit) / sum of exponentials, at least 1 / V: its logarithm never
    underflows and gives the normaliser, which a second pass of `log_softmax` or `exp` would cost as much
    again.
    """
    return largest_T.to(probs_TV.dtype) - probs_TV.amax(dim=-1).log() - own_T


def _logit_gradients(probs_TV: Tensor, targets_T: Tensor, scale_T: Tensor) -> Tensor:
    """(softmax - one-hot) * scale, in place."""
    minus_one_T1 = torch.full_like(scale_T, -1)[:, None]
    return probs_TV.scatter_add_(1, targets_T[:, None], minus_one_T1).mul_(scale_T[:, None])


def _product(rows: Tensor, weight_OI: Tensor) -> Tensor:
    return rows_times(rows, weight_OI) if onednn_pays(rows, weight_OI) else rows @ weight_OI.t()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, also where the total is wider than its factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


@_fused_cross_entropy.register_fake
def _(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    token_loss_T = torch.empty_like(labels_T, dtype=wide)
    shapes = (hidden_TD, weight_VD) if needs_grad else (hidden_TD.new_empty(0), hidden_TD.new_empty(0))
    grad_hidden_TD, grad_weight_VD = torch.empty_like(shapes[0]), torch.empty_like(shapes[1])
    correct_T = torch.empty_like(labels_T[:0] if needs_grad else labels_T, dtype=torch.bool)
    return token_loss_T.new_empty(()), token_loss_T, grad_hidden_TD, grad_weight_VD, correct_T


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:4])


def _scale_gradients(ctx: Any, grad_ce: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
    return (
        grad_hidden_TD * grad_ce.to(grad_hidden_TD.dtype),
        grad_weight_VD * grad_ce.to(grad_weight_VD.dtype),
        None,
        None,
    )


_fused_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)
