"""The vocabulary between adapters and the probe: what a router and an attention core say, and where they sit.

An adapter knows one family of models; the probe knows none. Between them pass only the types below.

Shapes: T = B*S tokens of a micro-batch, E experts, K experts per token, H query heads, G key heads, S
queries, C keys, D width of a head, N chosen sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from moeviz.records import ScoreFunction


class Reading(NamedTuple):
    """What one router decided about the tokens of one forward pass; everything detached."""

    logits_TE: Tensor
    """Raw logits, without selection bias and before any mask."""
    weights_TK: Tensor
    """Gate weights; 0 for a slot that a capacity limit dropped."""
    expert_ids_TK: Tensor
    """The model's own choice, never recomputed from the logits: 0 <= id < E, also for dropped slots."""
    dropped_TK: Tensor | None = None
    """bool. Slots dropped by a capacity limit; None for a dropless layer."""
    unused_TK: Tensor | None = None
    """bool. Slots that are no assignment at all, where experts choose tokens; None: every slot is one."""
    counts_E: Tensor | None = None
    """Assignments per expert before any drop, where the model knows them better than the ids do."""


class AttentionCall(NamedTuple):
    """The arguments of one attention, as far as they decide its pattern."""

    q_BHSD: Tensor
    k_BGCD: Tensor
    """Query head h reads key head h // (H // G)."""
    scale: float
    mask: Tensor | None = None
    """[B or 1, H or 1, S, C], bool (True: may be read) or additive; or bool [B, C] over the keys."""
    causal: bool = True
    """Whether queries stand at the last S of the C positions and read nothing after themselves."""
    window: int | None = None
    """A query reads the last `window` positions only, itself included."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks_H: Tensor | None = None
    """A logit per head that takes part in the softmax and is dropped from the pattern."""
    heads: tuple[int, ...] = ()
    """Which query heads these are, once some were chosen."""


ReadRouter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Reading]
"""(module, args, kwargs, output) of a forward hook -> Reading. torch.compile traces it: tensor operations only."""
Observe = Callable[[AttentionCall], None]
"""What a core adapter calls with the arguments of every attention."""


class Handle(Protocol):
    """Undoes an attachment."""

    def remove(self) -> None: ...


def always() -> bool:
    return True


class AttachCore(Protocol):
    """Call an observer with every attention of a core for which `wanted()` is true at that moment."""

    def __call__(self, observe: Observe, wanted: Callable[[], bool] = always) -> Handle: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterSite:
    """A router in the watched model."""

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    score: ScoreFunction
    read: ReadRouter
    bias: Callable[[], Tensor | None]
    """The selection bias [E] as it is now, or None."""
    experts_choose: bool = False
    """Whether experts choose tokens: then a token has any number of experts, `top_k` on average."""
    grouped: bool = False
    """Whether experts compete within groups first, so that the best unselected score means nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CoreSite:
    """An attention core in the watched model."""

    name: str
    module: nn.Module
    num_heads: int
    attach: AttachCore
    """Start calling an observer with the attentions of this core."""


class Adapter(Protocol):
    """Knows the modules of one family. `parent` is the module that holds `module`."""

    def find_router(self, name: str, module: nn.Module, parent: nn.Module | None) -> RouterSite | None: ...

    def find_core(self, name: str, module: nn.Module, parent: nn.Module | None) -> CoreSite | None: ...
