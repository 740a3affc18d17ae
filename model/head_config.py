"""The part of a model's config that says what is predicted beside the next token, as plain data without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Heads for auxiliary training losses; none by default."""

    contrastive_width: int = 0
    """Width of the vector that a contrastive head makes of a sequence. 0: no such head."""
    contrastive_temperature: float = 0.1
    """What cosines of those vectors are divided by."""
    hard_negatives: int | None = None
    """Compare a sequence with its so many most similar negatives only. None: with all of the batch."""

    mtp_depth: int = 0
    """Tokens beyond the next one that are predicted too, each by a block of its own (DeepSeek-V3). 0: none."""

    def __post_init__(self) -> None:
        if self.mtp_depth < 0:
            raise ValueError(f"mtp_depth={self.mtp_depth} is negative; 0 predicts the next token only")
        if self.contrastive_width < 0:
            raise ValueError(f"contrastive_width={self.contrastive_width} is negative; 0 means no head")
        if self.contrastive_temperature <= 0:
            raise ValueError(
                f"contrastive_temperature={self.contrastive_temperature} is not positive; 0.1 is usual"
            )
        if self.hard_negatives is not None and self.hard_negatives < 1:
            raise ValueError(f"hard_negatives={self.hard_negatives} is below 1; None takes all")
