"""A finished checkpoint as something that can be run: the model, its tokenizer, and what to call it.

moeviz's own checkpoints and Hugging Face folders open alike. Who knows how to load which is handed in by the caller
(`OPENERS` of the command): this package knows neither the trainer nor a hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedCheckpoint:
    """A model in evaluation mode with what is needed to feed it text."""

    path: Path
    name: str
    model: nn.Module
    encode: Encode
    """Text -> token ids."""
    token_texts: Sequence[str]
    """Text of each token id."""
    max_seq_len: int
    """Longest sequence that the model takes."""
    step: int | None = None
    """Optimizer steps it was trained for, where that is known."""
    config: Mapping[str, Any] = field(default_factory=dict)
