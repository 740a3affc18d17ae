"""What a pass over the fixed probe shows of one router, its experts and the heads, beside the decisions themselves.

Everything stays on the device as small tensors. The quantities are those of `moeviz.metrics` (`change.probe_drift`,
`similarity.off_diagonal`, `similarity.pes`, `attention.attn_entropy`), said once more for tensors, because the arrays
behind them are too large to leave an accelerator. Weights are read inside hooks: ZeRO-3 has them whole only there.

Shapes: T tokens of a pass, E experts, n tokens that all experts are run on, H heads, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeviz.capture.attention import pattern, select
from moeviz.capture.reading import AttentionCall, CoreSite, Handle, Reading, RouterSite

ALIKE_TOKENS = 64
"""Tokens that every expert of a layer is run on for `pes`."""
_ALIKE_ELEMENTS = 2**24
"""Elements of their outputs at most; wide models use fewer tokens."""
HEAD_SEQUENCES, HEAD_POSITIONS = 4, 128
"""Sequences and positions at most that the entropy of heads is taken over."""


class RouterWatch:
    """Hooks on one router and its experts, for one pass over the probe."""

    def __init__(self, root: nn.Module, site: RouterSite, whole: bool) -> None:
        """`whole`: look at weights and experts as well, not only at decisions."""
        self.site = site
        self.readings: list[Reading] = []
        """One for each forward, in order."""
        self.cosine_mean: Tensor | None = None
        self.cosine_max: Tensor | None = None
        self.alike: Tensor | None = None
        """Scalars, where they could be read."""
        self._handles: list[Handle] = [
            site.module.register_forward_hook(self._decided, with_kwargs=True, prepend=True)
        ]
        experts = experts_beside(root, site)
        if whole:
            self._handles.append(site.module.register_forward_pre_hook(self._rows))
        # Experts that ranks share answer all of them or none.
        if experts is not None and (whole or getattr(experts, "needs_every_rank", False)):
            self._handles.append(experts.register_forward_pre_hook(self._experts))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _decided(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.readings.append(self.site.read(module, args, kwargs, output))

    def _rows(self, module: nn.Module, args: Any) -> None:
        weight = getattr(module, "weight", None)
        if self.cosine_mean is not None or not isinstance(weight, Tensor) or weight.ndim != 2:
            return
        if len(weight) == self.site.num_experts:
            self.cosine_mean, self.cosine_max = pair_cosines(weight)

    def _experts(self, module: nn.Module, args: Any) -> None:
        if self.alike is None and len(args) >= 3 and isinstance(args[0], Tensor):
            self.alike = torch.full((), float("nan"), device=args[0].device)  # asked once, also if it fails
            x_TD = args[0].detach().reshape(-1, args[0].shape[-1])
            self.alike = experts_alike(module, x_TD, self.site.num_experts, args[2].dtype)


def experts_beside(root: nn.Module, site: RouterSite) -> nn.Module | None:
    """The module called `experts` next to a router, if it is called as experts(x, ids, weights)."""
    parent = dict(root.named_modules()).get(site.name.rpartition(".")[0])
    experts = getattr(parent, "experts", None)
    if not isinstance(experts, nn.Module) or isinstance(experts, nn.ModuleList):
        return None
    return experts


def pair_cosines(rows_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and largest cosine of two different rows, float32 scalars; NaN for a single row."""
    unit_ED = nn.functional.normalize(rows_ED.detach().float(), dim=1)
    cos_EE = unit_ED @ unit_ED.t()
    same_EE = torch.eye(len(cos_EE), dtype=torch.bool, device=cos_EE.device)
    pairs = len(cos_EE) * (len(cos_EE) - 1)
    mean = cos_EE.masked_fill(same_EE, 0.0).sum() / (pairs or float("nan"))
    return mean, cos_EE.masked_fill(same_EE, -1.0).max()


def experts_alike(experts: nn.Module, x_TD: Tensor, num_experts: int, weight_dtype: torch.dtype) -> Tensor:
    """`pes`, SimBal's pairwise similarity of experts: all of them run on some of the tokens. Float32 scalar.

    `forward` itself is called, not the module: no hook may see these tokens.
    """
    wanted = min(ALIKE_TOKENS, max(1, _ALIKE_ELEMENTS // (num_experts * x_TD.shape[1])), len(x_TD))
    x_nD = x_TD[torch.arange(wanted, device=x_TD.device) * len(x_TD) // wanted]
    ids_T1 = torch.arange(num_experts, device=x_TD.device).repeat_interleave(wanted)[:, None]
    weights_T1 = torch.ones_like(ids_T1, dtype=weight_dtype)
    outputs_EnD = experts.forward(x_nD.repeat(num_experts, 1), ids_T1, weights_T1).float()
    unit_EnD = nn.functional.normalize(outputs_EnD.view(num_experts, wanted, -1), dim=-1, eps=1e-30)
    # The squared length of the sum of unit vectors is E plus twice the sum over pairs.
    squared_n = unit_EnD.sum(dim=0).square().sum(dim=-1)
    return ((squared_n - num_experts) / (num_experts * (num_experts - 1))).mean()


def drift(before_TE: Tensor, after_TE: Tensor) -> Tensor:
    """`probe_drift`: mean Jensen-Shannon divergence of two sets of scores, nats. Scalar, or [L] for [L, T, E]."""
    before_TE, after_TE = before_TE.float(), after_TE.float()
    apart_T = _entropy((before_TE + after_TE) / 2) - (_entropy(before_TE) + _entropy(after_TE)) / 2
    return apart_T.clamp(min=0).mean(dim=-1)


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(dim=-1)


class HeadWatch:
    """Observers on all attention cores, for the first forward of a pass."""

    def __init__(self, cores: tuple[CoreSite, ...], valid_NS: Tensor | None) -> None:
        """`valid_NS`: False at padding of that forward; None: none."""
        self._valid_NS = valid_NS
        self.entropies: dict[int, Tensor] = {}
        """Core -> float32 [H]."""
        self._handles = [core.attach(self._observer(at)) for at, core in enumerate(cores)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _observer(self, at: int) -> Any:
        def observe(call: AttentionCall) -> None:
            if at not in self.entropies:
                found = head_entropy(call, self._valid_NS)
                if found is not None:
                    self.entropies[at] = found

        return observe


def head_entropy(call: AttentionCall, valid_NS: Tensor | None) -> Tensor | None:
    """`attn_entropy` of every head over the first positions of a few sequences, float32 [H], 0 to 1.

    None for attention that is not causal over its own tokens, or where no sequence begins without padding.
    """
    length = min(call.q_BHSD.shape[2], HEAD_POSITIONS)
    if call.k_BGCD.shape[2] != call.q_BHSD.shape[2] or length < 2:
        return None
    rows = list(range(call.q_BHSD.shape[0]))
    if valid_NS is not None:
        whole_N = valid_NS[:, :length].all(dim=1).tolist()
        rows = [row for row in rows if whole_N[row]]
    if not rows:
        return None
    picked_N = torch.tensor(rows[:: max(1, len(rows) // HEAD_SEQUENCES)][:HEAD_SEQUENCES])
    chosen = select(call, picked_N, range(call.q_BHSD.shape[1]))
    mask = chosen.mask
    if mask is not None:
        mask = mask[..., :length] if mask.dim() == 2 else mask[..., :length, :length]
    if mask is not None and mask.dim() == 2:
        mask = None  # the rows that were picked have no padding here
    early = chosen._replace(
        q_BHSD=chosen.q_BHSD[:, :, :length], k_BGCD=chosen.k_BGCD[:, :, :length], mask=mask
    )
    most_S = torch.arange(2, length + 1, device=call.q_BHSD.device).log()
    return (_entropy(pattern(early))[..., 1:] / most_S).mean(dim=(0, 2))
