"""Byte-level BPE that is trained here, needs no download, and reloads exactly.

Training is done by the `tokenizers` library, encoding by tiktoken: both are fast and neither is asked to
touch the network. A tokenizer is one JSON file beside the run, with every token's bytes, so a checkpoint
never depends on a cache or on a name that somebody else may change. Sennrich et al. 2016
(https://arxiv.org/abs/1508.07909); byte level as in GPT-2.

    train_tokenizer(texts, vocab_size=4096) -> BytePairTokenizer
    load_tokenizer(path) -> Tokenizer                     what Tokenizer.save wrote, or any tokenizer.json
    named_tokenizer("o200k_base") -> BytePairTokenizer    any tiktoken encoding whose file can be had
    Tokenizer: .vocab_size .eos_id .name .key .encode(text) .encode_batch(texts) .decode(ids)
               .token_texts() -> list[str]  .token_lengths() -> [V]  .save(path)
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from moeviz.errors import MoevizError, require
from trainer.data_cache import writable

tiktoken = require("tiktoken", "train", "tokenizing")

EOS = "<|eos|>"
_FORMAT = "moeviz-tokenizer/1"
_RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
"""What tiktoken names its cached files after (their sha1)."""

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""How text is cut before merging: GPT-4's rule, but digits in pairs, which a small vocabulary covers."""


class Tokenizer(Protocol):
    """Text to ids and back, and the id that ends a document."""

    @property
    def eos_id(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """V: one more than the largest id."""

    @property
    def key(self) -> str:
        """Changes when any token or the cutting rule does."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; whatever looks like a special token in it is text."""

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[np.ndarray]:
        """Ids of many texts, uint32."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""

    def token_texts(self) -> list[str]:
        """What each id 0 to V-1 shows as."""

    def token_lengths(self) -> np.ndarray | None:
        """int64 [V]: bytes of text that each token spells, 0 for special ones; None where that is not fixed."""

    def save(self, path: Path) -> None:
        """Write the whole tokenizer as one JSON file, which `load_tokenizer` reads."""


@dataclass(frozen=True)
class BytePairTokenizer:
    """A tiktoken encoding and the token that ends a document."""

    encoding: Any
    """tiktoken.Encoding."""
    eos_id: int

    @property
    def name(self) -> str:
        return str(self.encoding.name)

    @property
    def vocab_size(self) -> int:
        """V: one more than the largest id."""
        return int(self.encoding.n_vocab)

    @cached_property
    def key(self) -> str:
        """Twenty hex digits that change when any token or the cutting rule does."""
        return hashlib.sha256(orjson.dumps(self._content(), option=orjson.OPT_SORT_KEYS)).hexdigest()[:20]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; whatever looks like a special token in it is text."""
        return list(self.encoding.encode_ordinary(text))

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[np.ndarray]:
        """Ids of many texts, uint32."""
        ids = self.encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)
        return [np.array(row, dtype=np.uint32) for row in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self.encoding.decode([int(i) for i in ids]))

    def token_texts(self) -> list[str]:
        """What each id 0 to V-1 shows as: its text, `\\xe2` for bytes that are no UTF-8 alone, a name for the
        rest.
        """
        texts = [f"<|unused {i}|>" for i in range(self.vocab_size)]
        for token, rank in self.encoding._mergeable_ranks.items():
            texts[rank] = token.decode("utf-8", "backslashreplace")
        for token, rank in self.encoding._special_tokens.items():
            texts[rank] = token
        return texts

    def token_lengths(self) -> np.ndarray:
        """int64 [V]: bytes that each token spells; 0 for special ones and unused ids."""
        lengths_V = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self.encoding._mergeable_ranks.items():
            lengths_V[rank] = len(token)
        return lengths_V

    def save(self, path: Path) -> None:
        """Write the whole tokenizer as one JSON file.

        Raises:
            MoevizError: the place cannot be written.
        """
        with writable(path):
            path.write_bytes(orjson.dumps(self._content()))

    def _content(self) -> dict[str, Any]:
        ranks = self.encoding._mergeable_ranks
        return {
            "format": _FORMAT,
            "name": self.name,
            "pattern": self.encoding._pat_str,
            "eos_id": self.eos_id,
            "special_tokens": dict(self.encoding._special_tokens),
            "tokens": {base64.b64encode(token).decode(): rank for token, rank in ranks.items()},
        }


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 4096, name: str = "moeviz", quiet: bool = True
) -> BytePairTokenizer:
    """Learn a byte-level BPE; a corpus too small for `vocab_size` gives a smaller vocabulary.

    Raises:
        MoevizError: `vocab_size` leaves no room for the 256 bytes and the end of a document.
    """
    if vocab_size < 257:
        raise MoevizError(f"vocab_size={vocab_size} is below 257 (256 bytes and {EOS}); use 4096")
    tokenizers = require("tokenizers", "train", "training a tokenizer")
    from tokenizers import models, pre_tokenizers, trainers

    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=not quiet
    )
    learner.train_from_iterator(texts, trainer)
    return _from_ranks(_ranks(orjson.loads(learner.to_str())["model"]["merges"]), name)


def _ranks(merges: Iterable[tuple[str, str] | str]) -> dict[bytes, int]:
    """Bytes 0 to 255, then one token a merge, in the order in which they were learned."""
    byte_of = printable_bytes()
    ranks = {bytes([value]): value for value in range(256)}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(bytes(byte_of[c] for c in left + right), len(ranks))
    return ranks


@functools.cache
def printable_bytes() -> dict[str, int]:
    """GPT-2's table: the character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in printable]
    return {chr(v): v for v in printable} | {chr(256 + i): v for i, v in enumerate(hidden)}


def _from_ranks(ranks: dict[bytes, int], name: str) -> BytePairTokenizer:
    eos_id = len(ranks)
    encoding = tiktoken.Encoding(
        name=name,
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={EOS: eos_id},
        explicit_n_vocab=eos_id + 1,
    )
    return BytePairTokenizer(encoding, eos_id)


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that `Tokenizer.save` wrote, exactly as it was; or a tokenizer.json of Hugging Face.

    Args:
        path: the file, or a folder with a tokenizer.json in it.

    Raises:
        MoevizError: no such file, or not a tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = orjson.loads(file.read_bytes())
        if content.get("format") == _FORMAT:
            return _from_content(content)
        from trainer.tokenizer_hub import is_hub_tokenizer, load_hub_tokenizer

        if not is_hub_tokenizer(content):
            raise KeyError("format")
        return load_hub_tokenizer(content, file)
    except FileNotFoundError as error:
        raise MoevizError(
            f"no tokenizer at {file}; name a file that a run has saved or a tokenizer.json, or leave it out"
        ) from error
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, IsADirectoryError) as error:
        raise MoevizError(
            f"{file} is no tokenizer of moeviz ({_FORMAT}) and no tokenizer.json of Hugging Face; "
            "train one by leaving the option out"
        ) from error


def _from_content(content: dict[str, Any]) -> BytePairTokenizer:
    ranks = {base64.b64decode(token): rank for token, rank in content["tokens"].items()}
    encoding = tiktoken.Encoding(
        name=content["name"],
        pat_str=content["pattern"],
        mergeable_ranks=ranks,
        special_tokens=content["special_tokens"],
    )
    return BytePairTokenizer(encoding, content["eos_id"])


def named_tokenizer(name: str, *, cache: Path) -> BytePairTokenizer:
    """A tiktoken encoding: from tiktoken's cache, from the package bpe-openai, or from the network.

    Args:
        cache: folder where a file unpacked from bpe-openai is kept.

    Raises:
        MoevizError: tiktoken knows no such name, or its file is not here and cannot be fetched.
    """
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise MoevizError(
            f"no tokenizer {name!r}: neither a file nor one of {', '.join(known)}; 'auto' trains one"
        )
    try:
        encoding = _get_encoding(name, cache)
    except Exception as error:  # requests, ssl and tiktoken each raise their own kinds
        raise MoevizError(
            f"the file of tokenizer {name!r} is not here and cannot be fetched ({type(error).__name__}); "
            "run: pip install bpe-openai (cl100k_base, o200k_base), or use the tokenizer 'auto'"
        ) from error
    return BytePairTokenizer(encoding, encoding.eot_token)


def _get_encoding(name: str, cache: Path) -> Any:
    packed = _packed_ranks(name)
    if packed is None or os.environ.get("TIKTOKEN_CACHE_DIR"):
        return tiktoken.get_encoding(name)
    file = cache / hashlib.sha1(_RANKS_URL.format(name=name).encode()).hexdigest()
    if not file.exists():
        with writable(file):
            cache.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_bytes(gzip.decompress(packed.read_bytes()))
            part.replace(file)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    try:
        return tiktoken.get_encoding(name)
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]


def _packed_ranks(name: str) -> Path | None:
    """The encoding's file inside the package bpe-openai, where that is installed."""
    spec = importlib.util.find_spec("bpe_openai")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations)), "data", f"{name}.tiktoken.gz")
    return file if file.is_file() else None
