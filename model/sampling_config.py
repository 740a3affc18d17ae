"""How text is chosen and when it ends, as plain data the command line can read without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when a text ends."""

    max_new_tokens: int = 64
    """Tokens to add at most; the model's max_seq_len is a limit as well, unless its cache forgets."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Choose among the k most likely tokens only."""
    top_p: float | None = None
    """Choose among the fewest most likely tokens whose probabilities reach this sum (arXiv:1904.09751)."""
    min_p: float | None = None
    """Choose among tokens at least this share as likely as the most likely one (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are in the text already become less likely (arXiv:1909.05858)."""
    seed: int = 0
    """Same seed, same text."""
    eos_id: int | None = None
    """Token that ends a sequence. None: none does."""
    stop: tuple[str, ...] = ()
    """Texts that end a sequence as soon as it contains one; needs a way to decode tokens."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is below 1; ask for at least one token")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is below 1; give 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 1 or None keeps all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} is not in [0, 1]; 0 or None keeps all tokens")
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} is not positive; 1 leaves the logits alone"
            )
        if "" in self.stop:
            raise ValueError(f"stop={self.stop} has an empty text, which every text contains; leave it out")
