"""What the root model was called with: token ids, padding, shape, read from the arguments by their names.

One call of the root in training is one micro-batch. Names may carry a shape suffix (`input_ids_BS`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_IDS = ("input_ids", "inputs", "input", "tokens", "token_ids", "ids", "idx", "x")
_EMBEDS = ("inputs_embeds", "input_embeds", "inputs", "x")
_MASK = ("attention_mask", "padding_mask", "valid", "mask")


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """One call of the root model."""

    index: int
    """0-based within the optimizer step."""
    batch_size: int
    length: int
    """S. `batch_size` x `length` is T, the tokens that every router sees."""
    ids_BS: Tensor | None
    valid_BS: Tensor | None
    """bool, False at padding; None: every token counts."""

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.batch_size * self.length

    @property
    def valid_T(self) -> Tensor | None:
        return None if self.valid_BS is None else self.valid_BS.reshape(-1)


def parameter_names(root: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of the root's forward."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(root.forward).parameters.values() if p.kind in positional)


def read_call(
    index: int, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> MicroBatch | None:
    """The micro-batch of a call, or None when no argument tells its shape."""
    given: dict[str, Tensor] = {}
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if isinstance(value, Tensor):
            given.setdefault(name.partition("_B")[0], value)
    ids_BS = _first(
        given, _IDS, lambda t: t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool
    )
    embeds_BSD = _first(given, _EMBEDS, lambda t: t.dim() == 3 and t.is_floating_point())
    shaped = embeds_BSD if ids_BS is None else ids_BS
    if shaped is None:
        return None
    batch_size, length = shaped.shape[:2]
    mask = _first(given, _MASK, lambda t: t.dim() == 2 and t.shape[0] == batch_size and t.shape[1] >= length)
    return MicroBatch(
        index=index,
        batch_size=batch_size,
        length=length,
        ids_BS=ids_BS,
        # With a cache the mask covers earlier positions too; the tokens of this call are the last ones.
        valid_BS=None if mask is None else mask[:, -length:].bool(),
    )


def _first(given: Mapping[str, Tensor], stems: Sequence[str], fits: Any) -> Tensor | None:
    """The first of these arguments, by their names without shape, that fits."""
    for stem in stems:
        value = given.get(stem)
        if value is not None and fits(value):
            return value
    return None
