"""From the name of a source to shards and a tokenizer: the one call that training makes.

    open_data(DataConfig(), quiet=False) -> TrainingData
    TrainingData: .shards .tokenizer .vocab_size .paths

`source` is `builtin` (the embedded corpus), `generated` (its generated layer alone, the same bytes
everywhere), or a path: a text file, a folder of them, JSON Lines (`text`, and `domain` or `source`; .gz too),
or token files (.npy, .bin). `tokenizer` is `auto` (train one on the source), a name that tiktoken knows, or a
file that a run saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from moeviz.errors import MoevizError
from trainer.corpus import CorpusConfig, build_corpus
from trainer.corpus.build import check_fraction
from trainer.corpus.documents import split_of
from trainer.data_cache import cache_folder, cached, digest
from trainer.data_progress import progress
from trainer.data_shards import Shards, build_shards
from trainer.data_sources import CorpusSource, PairSource, Source, file_source
from trainer.data_tokens import TokenFormat, is_token_path, token_shards
from trainer.tokenizer import Tokenizer, load_tokenizer, named_tokenizer, train_tokenizer

EMBEDDED = ("builtin", "generated")
"""Sources that need no file."""
_SAMPLE_BYTES = 10_000_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    source: str = "builtin"
    """`builtin`, `generated`, or the path of a file or folder of text, JSON Lines or tokens."""
    validation_source: str | None = None
    """Path of what to evaluate on instead; then all documents of `source` are trained on."""
    tokenizer: str = "auto"
    """`auto` trains a byte-level BPE on the source; else the name of a tiktoken encoding, or a saved
    tokenizer.
    """
    vocab_size: int = 4096
    """Vocabulary of an `auto` tokenizer; for token files without a tokenizer, the bound of their ids."""
    validation_fraction: float = 0.05
    """Share of the documents held out, by the hash of their content."""
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """How a .bin file stores its ids; auto: in 16 bits when the vocabulary fits, else in 32."""
    bytes_per_domain: int = 560_000
    """Size of each domain of the embedded corpus, in UTF-8 bytes."""
    corpus_seed: int = 0
    """Seed of the generated domains."""

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)


@dataclass(frozen=True)
class TrainingData:
    """Everything that batches need."""

    shards: Shards
    tokenizer: Tokenizer | None
    """None for token files whose tokenizer was not named: no text can be shown."""
    paths: tuple[Path, ...] = ()
    """Cache entries in use: corpus, tokenizer, shards."""

    @property
    def vocab_size(self) -> int:
        return self.shards.vocab_size


def open_data(
    config: DataConfig | None = None, *, quiet: bool = False, root: Path | None = None
) -> TrainingData:
    """Build or find everything for a source. `root` replaces the cache folder.

    Raises:
        MoevizError: no such source, an empty or malformed one, an unknown tokenizer, or a cache that cannot
            be written.
    """
    config = config or DataConfig()
    path = Path(config.source).expanduser()
    if config.source not in EMBEDDED and is_token_path(path):
        return _open_tokens(config, path, root)
    source, paths = _open_source(config, quiet, root)
    if config.tokenizer == "auto":
        tokenizer, tokenizer_path = _trained(source, config, quiet, root)
        paths = (*paths, tokenizer_path)
    else:
        tokenizer = open_tokenizer(config.tokenizer, root=root)
    shards = build_shards(
        source, tokenizer, validation_fraction=config.validation_fraction, quiet=quiet, root=root
    )
    assert shards.path is not None
    return TrainingData(shards, tokenizer, (*paths, shards.path))


def open_tokenizer(name: str, *, root: Path | None = None) -> Tokenizer:
    """A saved tokenizer by its path, or a tiktoken encoding by its name.

    Raises:
        MoevizError: neither exists, or the encoding's file is not at hand and cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json" or path.exists():
        return load_tokenizer(path)
    return named_tokenizer(name, cache=(root or cache_folder()) / "tiktoken")


def _open_tokens(config: DataConfig, path: Path, root: Path | None) -> TrainingData:
    tokenizer = None if config.tokenizer == "auto" else open_tokenizer(config.tokenizer, root=root)
    validation = None if config.validation_source is None else Path(config.validation_source).expanduser()
    if validation is not None and not is_token_path(validation):
        raise MoevizError(
            f"{validation} is no token file but {path} is; evaluate on tokens of the same tokenizer"
        )
    token_format = TokenFormat(
        vocab_size=tokenizer.vocab_size if tokenizer else config.vocab_size,
        eos_id=tokenizer.eos_id if tokenizer else None,
        dtype=config.token_dtype,
    )
    fraction = config.validation_fraction
    shards = token_shards(path, token_format, validation=validation, validation_fraction=fraction)
    return TrainingData(shards, tokenizer)


def _open_source(config: DataConfig, quiet: bool, root: Path | None) -> tuple[Source, tuple[Path, ...]]:
    source, paths = _open_named(config, config.source, quiet, root)
    if config.validation_source is None:
        return source, paths
    held_out, more = _open_named(config, config.validation_source, quiet, root)
    return PairSource(source, held_out), tuple(dict.fromkeys(paths + more))


def _open_named(
    config: DataConfig, name: str, quiet: bool, root: Path | None
) -> tuple[Source, tuple[Path, ...]]:
    if name not in EMBEDDED:
        return file_source(Path(name).expanduser()), ()
    corpus_config = CorpusConfig(
        bytes_per_domain=config.bytes_per_domain,
        seed=config.corpus_seed,
        generated_only=name == "generated",
        validation_fraction=config.validation_fraction,
    )
    corpus = build_corpus(corpus_config, quiet=quiet, root=root)
    return CorpusSource(corpus), (corpus.path,)


def _trained(source: Source, config: DataConfig, quiet: bool, root: Path | None) -> tuple[Tokenizer, Path]:
    key = digest(["moeviz-bpe/1", source.key, config.vocab_size, config.validation_fraction])

    def build(folder: Path) -> None:
        with progress(
            "training the tokenizer", total=min(source.num_bytes, _SAMPLE_BYTES), quiet=quiet
        ) as advance:

            def counted() -> Iterator[str]:
                for text in training_sample(source, config.validation_fraction):
                    advance(len(text.encode("utf-8", "surrogatepass")))
                    yield text

            tokenizer = train_tokenizer(counted(), vocab_size=config.vocab_size)
        tokenizer.save(folder / "tokenizer.json")

    path = cached("tokenizers", key, build, root=root)
    return load_tokenizer(path / "tokenizer.json"), path


def training_sample(source: Source, validation_fraction: float) -> Iterator[str]:
    """About ten megabytes of training text, evenly from the whole source; never a held-out document.

    Raises:
        MoevizError: the source holds no text.
    """
    stride = max(1, round(source.num_bytes / _SAMPLE_BYTES))
    documents = (
        document
        for document in source.documents()
        if (document.split or split_of(document.id, validation_fraction)) == "train"
    )
    empty = True
    for document in islice(documents, 0, None, stride):
        empty = empty and not document.text.strip()
        yield document.text
    if empty:
        raise MoevizError("the corpus is empty: no document with any text; check the path or use 'builtin'")
