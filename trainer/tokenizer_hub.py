"""Tokenizers of other models: any tokenizer.json of Hugging Face, run by the `tokenizers` library.

Such a file does not say which of its special tokens ends a document. The tokenizer_config.json beside it does;
without one the usual names are tried, and where none is there the file is refused rather than guessed at.
What is saved with a run holds both, so a checkpoint needs neither file again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from moeviz.errors import MoevizError, require
from trainer.data_cache import writable
from trainer.tokenizer import printable_bytes

_FORMAT = "moeviz-hub-tokenizer/1"
_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eos|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
_SPACE = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True, eq=False)
class HubTokenizer:
    """A `tokenizers.Tokenizer` and the token that ends a document."""

    inner: Any
    """tokenizers.Tokenizer."""
    eos_id: int
    name: str

    @cached_property
    def vocab_size(self) -> int:
        """V: one more than the largest id, tokens that were added later included."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values())

    @cached_property
    def key(self) -> str:
        """Twenty hex digits that change when any token or rule does."""
        content = {"eos_id": self.eos_id, "tokenizer": self._content}
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:20]

    @cached_property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = orjson.loads(self.inner.to_str())
        return content

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing put before or after; whatever looks like a special token in it is text."""
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[np.ndarray]:
        """Ids of many texts, uint32. The library decides about threads (RAYON_NUM_THREADS)."""
        rows = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(row.ids, dtype=np.uint32) for row in rows]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self.inner.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_texts(self) -> list[str]:
        """What each id 0 to V-1 shows as: its text, `\\xe2` for bytes that are no UTF-8 alone."""
        texts = [f"<|unused {i}|>" for i in range(self.vocab_size)]
        added = self._added()
        for token, i in self.inner.get_vocab(with_added_tokens=True).items():
            texts[i] = token if token in added else self._spelled(token).decode("utf-8", "backslashreplace")
        return texts

    def token_lengths(self) -> np.ndarray | None:
        """int64 [V]: bytes that each token spells, 0 for special ones.

        None for vocabularies that do not keep spaces (WordPiece): there the bytes of a text are not the sum of
        its tokens'.
        """
        if self._byte_level is None:
            return None
        lengths_V = np.zeros(self.vocab_size, dtype=np.int64)
        added = self._added()
        for token, i in self.inner.get_vocab(with_added_tokens=True).items():
            if token not in added:
                lengths_V[i] = len(self._spelled(token))
            elif not added[token]:
                lengths_V[i] = len(token.encode())
        return lengths_V

    def save(self, path: Path) -> None:
        """Write the whole tokenizer as one JSON file.

        Raises:
            MoevizError: the place cannot be written.
        """
        content = {"format": _FORMAT, "name": self.name, "eos_id": self.eos_id, "tokenizer": self._content}
        with writable(path):
            path.write_bytes(orjson.dumps(content))

    def _added(self) -> dict[str, bool]:
        """Tokens that stand for their own text, or are special."""
        return {token["content"]: token["special"] for token in self._content["added_tokens"]}

    @cached_property
    def _byte_level(self) -> bool | None:
        """Whether a character of a token is a byte (GPT-2); False: SentencePiece; None: neither."""
        rules = orjson.dumps([self._content[name] for name in ("pre_tokenizer", "decoder", "normalizer")])
        if b'"ByteLevel"' in rules:
            return True
        return False if _SPACE.encode() in rules or b'"Metaspace"' in rules else None

    def _spelled(self, token: str) -> bytes:
        if self._byte_level:
            byte_of = printable_bytes()
            if all(character in byte_of for character in token):
                return bytes(byte_of[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode()


def is_hub_tokenizer(content: Mapping[str, Any]) -> bool:
    """Whether the JSON of a file is a tokenizer.json, or one that `HubTokenizer.save` wrote."""
    return content.get("format") == _FORMAT or {"model", "pre_tokenizer"} <= content.keys()


def load_hub_tokenizer(content: Mapping[str, Any], file: Path) -> HubTokenizer:
    """The tokenizer in the JSON of a file.

    Args:
        content: what the file holds.
        file: tells the name, and where the tokenizer_config.json may be.

    Raises:
        MoevizError: the library cannot read it, or no token of it ends a document.
    """
    saved = content.get("format") == _FORMAT
    inner = _inner(content["tokenizer"] if saved else content, file)
    if saved:
        return HubTokenizer(inner, content["eos_id"], content["name"])
    generic = file.stem == "tokenizer"
    return HubTokenizer(inner, _eos_id(inner, file), file.resolve().parent.name if generic else file.stem)


def _inner(content: Mapping[str, Any], file: Path) -> Any:
    tokenizers = require("tokenizers", "train", "this tokenizer")
    try:
        inner = tokenizers.Tokenizer.from_str(orjson.dumps(content).decode())
    except Exception as error:  # the library raises bare Exception
        raise MoevizError(
            f"the tokenizers library cannot read {file} ({error}); save it again with a newer version"
        ) from error
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    return inner


def _eos_id(inner: Any, file: Path) -> int:
    names = [*_named_end(file.with_name("tokenizer_config.json")), *_ENDS]
    for name in names:
        found = inner.token_to_id(name)
        if found is not None:
            return int(found)
    raise MoevizError(
        f"{file} has no token that ends a document (tried {', '.join(names)}); name it as eos_token in a "
        "tokenizer_config.json beside it"
    )


def _named_end(config: Path) -> list[str]:
    if not config.is_file():
        return []
    token = orjson.loads(config.read_bytes()).get("eos_token")
    if isinstance(token, Mapping):
        token = token.get("content")
    return [token] if isinstance(token, str) else []
