"""A run's tokenizer as transformers reads it: tokenizer.json and tokenizer_config.json, the same ids for the same text.

A tiktoken encoding merges any two neighbours whose union is a token, lowest rank first, and takes a piece that is a
token as it is. The `tokenizers` library wants the pairs spelled out, so every split of every token is listed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeviz.errors import MoevizError, require
from trainer.tokenizer import BytePairTokenizer, Tokenizer, printable_bytes
from trainer.tokenizer_hub import HubTokenizer


def save_for_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` opens.

    Raises:
        MoevizError: a kind of tokenizer that has no such form.
    """
    if isinstance(tokenizer, HubTokenizer):
        inner, end = tokenizer.inner, tokenizer.inner.id_to_token(tokenizer.eos_id)
    elif isinstance(tokenizer, BytePairTokenizer):
        inner, end = as_hub_tokenizer(tokenizer), tokenizer.token_texts()[tokenizer.eos_id]
    else:
        raise MoevizError(f"tokenizer {tokenizer.name} has no tokenizer.json; save it from where it came")
    inner.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def as_hub_tokenizer(tokenizer: BytePairTokenizer) -> Any:
    """A `tokenizers.Tokenizer` that gives the ids of a tiktoken encoding."""
    require("tokenizers", "train", "exporting a tokenizer")
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    ranks: Mapping[bytes, int] = tokenizer.encoding._mergeable_ranks
    special: Mapping[str, int] = tokenizer.encoding._special_tokens
    letter = {value: character for character, value in printable_bytes().items()}

    def spelled(token: bytes) -> str:
        return "".join(letter[value] for value in token)

    vocab = {spelled(token): rank for token, rank in ranks.items()} | dict(special)
    merges = [(spelled(left), spelled(right)) for left, right in _merges(ranks)]
    inner = Inner(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(tokenizer.encoding._pat_str), behavior="isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([cut, whole])  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return inner


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to put a token together from two, in the order of the tokens."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges
