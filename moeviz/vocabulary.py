"""The text of every token id, from whatever tokenizer a project uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeviz.errors import MoevizError


def token_texts(tokenizer: Any, vocab: Sequence[str] | None = None) -> list[str]:
    """Text of token id i at position i; empty when nobody can tell.

    Args:
        tokenizer: a tiktoken Encoding, a transformers or tokenizers tokenizer, a note (str), or None.
        vocab: the texts themselves, which take precedence.

    Raises:
        MoevizError: an object that is none of these.
    """
    if vocab is not None:
        return list(vocab)
    if tokenizer is None or isinstance(tokenizer, str):
        return []
    if hasattr(tokenizer, "decode_single_token_bytes"):  # tiktoken
        return [_tiktoken_text(tokenizer, token_id) for token_id in range(tokenizer.n_vocab)]
    if hasattr(tokenizer, "decode"):  # transformers, tokenizers
        size = len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.get_vocab_size()
        return [tokenizer.decode([token_id]) for token_id in range(size)]
    raise MoevizError(
        f"tokenizer is a {type(tokenizer).__name__}, which has no decode(); hand over vocab=[text of id 0, ...]"
    )


def describe_tokenizer(tokenizer: Any) -> str:
    """A note for people: which tokenizer the token ids belong to."""
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer or ""
    return str(
        getattr(tokenizer, "name", None)
        or getattr(tokenizer, "name_or_path", None)
        or type(tokenizer).__name__
    )


def _tiktoken_text(encoding: Any, token_id: int) -> str:
    try:
        return encoding.decode_single_token_bytes(token_id).decode("utf-8", errors="replace")
    except KeyError:  # ids between the ordinary and the special tokens may be unused
        return ""
