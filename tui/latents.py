"""The latents of one attention block as the Latents screen shows them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

LatentKind = Literal["mla", "two-stage"]
LatentScale = Literal["signed", "even", "weight"]
PARTS: dict[LatentKind, tuple[str, str]] = {"mla": ("kv", "q"), "two-stage": ("read", "write")}
"""What there is to see of a kind: latents of keys and values, or of queries; slots that read, or are read."""


class LatentValue(NamedTuple):
    """One number about the block."""

    name: str
    value: float
    unit: str
    help: str


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentSheet:
    """One part of one block at one step. S tokens (or blocks of them), C numbers of a latent or slots."""

    kind: LatentKind
    part: str
    blocks: tuple[int, ...]
    """Those that were recorded at this step."""
    block: int
    step: int
    heads: tuple[int, ...]
    """Recorded heads of this part; empty where all share the latent."""
    head: int
    """Place in `heads`."""
    tokens: int
    """Tokens behind profile and values."""
    first: int
    """Which token of the sequence the first row is."""
    length: int
    """Tokens behind the rows of the picture."""
    texts: tuple[str, ...]
    """Of the rows; empty where they are not known, or rows are blocks of tokens."""
    grid_SC: np.ndarray
    singular_R: np.ndarray
    steps_T: np.ndarray
    profile_TC: np.ndarray
    """Standard deviation of each number, entropy or mass of each slot, over steps; mean over heads."""
    values: tuple[LatentValue, ...]

    @property
    def scale(self) -> LatentScale:
        """How the picture becomes colours: around 0, compared with an even share of the tokens, or from 0."""
        return "signed" if self.kind == "mla" else "even" if self.part == "read" else "weight"

    @property
    def place(self) -> str:
        """What a column is."""
        return "dim" if self.kind == "mla" else "slot"

    @property
    def key(self) -> Hashable:
        return (self.part, self.block, self.step, self.head, len(self.steps_T))


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentView:
    """What the screen shows: a sheet, or why there is none; the first token of the picture."""

    sheet: LatentSheet | None
    first_row: int = 0
    message: str = ""

    @property
    def key(self) -> Hashable:
        return (None if self.sheet is None else self.sheet.key, self.first_row, self.message)
