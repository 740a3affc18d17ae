"""From the names of sources to shards and a tokenizer: the one call that training makes.

    open_data(DataConfig(), quiet=False) -> TrainingData
    TrainingData: .shards .tokenizer .vocab_size .paths

A source is `builtin` (the embedded corpus), `generated` (its generated layer alone, the same bytes everywhere), a
path, or `hf:NAME` (a data set of the Hugging Face hub). A path is a text file, a folder of them, JSON Lines (`text` or
`content`, and `domain` or `source`; .gz and .zst too), token files (.npy, .bin), or a folder of `moeviz prepare`.
Several sources are read as one; NAME=SOURCE makes NAME the domain of all that is in it. `tokenizer` is `auto` (train
one on the source), a name that tiktoken knows, a file that a run saved, or a tokenizer.json of Hugging Face.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from moeviz.errors import MoevizError
from trainer.corpus import CorpusConfig, Split, build_corpus
from trainer.corpus.build import check_fraction
from trainer.corpus.documents import split_of
from trainer.data_cache import cache_folder, cached, digest
from trainer.data_hub import PREFIX, hub_source
from trainer.data_mixed import JoinedSource, LabelledSource, SidedSource
from trainer.data_prepared import free_folder, is_prepared, prepare, prepared_tokenizer
from trainer.data_progress import progress
from trainer.data_shards import Shards, build_shards, load_shards
from trainer.data_shards_merged import labelled, merged, one_sided
from trainer.data_sources import CorpusSource, Source, file_source
from trainer.data_tokens import TokenFormat, is_token_path, token_shards
from trainer.tokenizer import Tokenizer, load_tokenizer, named_tokenizer, train_tokenizer

EMBEDDED = ("builtin", "generated")
"""Sources that need no file."""
_SAMPLE_BYTES = 10_000_000
_LABEL = re.compile(r"([\w.-]+)=(.+)")

Kind = Literal["text", "tokens", "prepared"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on."""

    source: str | tuple[str, ...] = "builtin"
    """One source or several, see above."""
    validation_source: str | None = None
    """Path of what to evaluate on instead; then all documents of `source` are trained on."""
    all_held_out: bool = False
    """Evaluate on every document of `source`, train on none; of prepared shards on what they held out."""
    tokenizer: str = "auto"
    """`auto` trains a byte-level BPE on the source; else the name of a tiktoken encoding, a saved tokenizer, or a
    tokenizer.json.
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
    workers: int | None = None
    """Threads that tokenise. None: one for each CPU of this process."""

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)
        if not self.names:
            raise MoevizError("no source; name a file or folder, or 'builtin'")

    @property
    def names(self) -> tuple[str, ...]:
        """The sources, one or several."""
        return (self.source,) if isinstance(self.source, str) else self.source


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


class Named(NamedTuple):
    """A source as it was named."""

    label: str | None
    """Domain of all that is in it; None: as it says itself."""
    name: str
    kind: Kind
    side: Split | None
    """Where all of it goes; None: both sides."""

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    @classmethod
    def parse(cls, text: str, side: Split | None) -> Named:
        label, name = None, text
        match = _LABEL.fullmatch(text)
        if match and not Path(text).expanduser().exists():
            label, name = match[1], match[2]
        path = Path(name).expanduser()
        kind: Kind = "text"
        if name not in EMBEDDED and not name.startswith(PREFIX):
            kind = "prepared" if is_prepared(path) else "tokens" if is_token_path(path) else "text"
        return cls(label, name, kind, side)


def open_data(
    config: DataConfig | None = None, *, quiet: bool = False, root: Path | None = None
) -> TrainingData:
    """Build or find everything for some sources. `root` replaces the cache folder.

    Raises:
        MoevizError: no such source, an empty, malformed or damaged one, an unknown tokenizer, prepared shards of
            another one, or a cache that cannot be written.
    """
    return _Opening(config or DataConfig(), quiet, root).run()


def open_tokenizer(name: str, *, root: Path | None = None) -> Tokenizer:
    """A saved tokenizer or a tokenizer.json by its path, or a tiktoken encoding by its name.

    Raises:
        MoevizError: neither exists, or the encoding's file is not at hand and cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json" or path.exists():
        return load_tokenizer(path)
    return named_tokenizer(name, cache=(root or cache_folder()) / "tiktoken")


def open_prepared(
    config: DataConfig, folder: Path, *, quiet: bool = False, root: Path | None = None
) -> Shards:
    """Tokenise sources of text into a folder, which a later `DataConfig.source` may name.

    Raises:
        MoevizError: the folder exists, no such source, an empty one, or one that holds tokens already.
    """
    opening = _Opening(config, quiet, root)
    for each in opening.named:
        if each.kind != "text":
            raise MoevizError(f"{each.name} holds tokens already; name text to tokenise")
    free_folder(folder)
    source = opening.text()
    tokenizer = opening.tokenizer(source)
    assert tokenizer is not None
    fraction, workers = config.validation_fraction, config.workers
    return prepare(folder, source, tokenizer, validation_fraction=fraction, quiet=quiet, workers=workers)


class _Opening:
    """One call of `open_data`."""

    def __init__(self, config: DataConfig, quiet: bool, root: Path | None) -> None:
        self.config, self.quiet, self.root = config, quiet, root
        side: Split | None = "validation" if config.all_held_out else None
        if config.validation_source is not None:
            side = "train"
        self.named = [Named.parse(text, side) for text in config.names]
        if config.validation_source is not None:
            self.named.append(Named.parse(config.validation_source, "validation"))
        self.paths: list[Path] = []

    def run(self) -> TrainingData:
        texts = [each for each in self.named if each.kind == "text"]
        source = self.text() if texts else None
        tokenizer = self.tokenizer(source)
        parts: list[Shards] = []
        if source is not None:
            assert tokenizer is not None
            fraction, workers = self.config.validation_fraction, self.config.workers
            parts.append(
                build_shards(
                    source,
                    tokenizer,
                    validation_fraction=fraction,
                    quiet=self.quiet,
                    workers=workers,
                    root=self.root,
                )
            )
        parts += self._token_files(tokenizer)
        parts += [self._prepared(each, tokenizer) for each in self.named if each.kind == "prepared"]
        shards = merged(parts)
        paths = [*self.paths, *(part.path for part in parts if part.path is not None)]
        return TrainingData(shards, tokenizer, tuple(dict.fromkeys(paths)))

    def text(self) -> Source:
        """All sources of text as one."""
        sources = tuple(self._source(each) for each in self.named if each.kind == "text")
        return sources[0] if len(sources) == 1 else JoinedSource(sources)

    def tokenizer(self, source: Source | None) -> Tokenizer | None:
        """The one that was named, else that of prepared shards, else one trained on the text."""
        if self.config.tokenizer != "auto":
            return open_tokenizer(self.config.tokenizer, root=self.root)
        for each in self.named:
            if each.kind == "prepared":
                return prepared_tokenizer(each.path)
        if source is None:
            return None
        if any(each.kind == "tokens" for each in self.named):
            raise MoevizError(
                "text beside token files needs the tokenizer that made them; name it (tokenizer)"
            )
        tokenizer, path = _trained(source, self.config, self.quiet, self.root)
        self.paths.append(path)
        return tokenizer

    def _source(self, each: Named) -> Source:
        source: Source
        if each.name in EMBEDDED:
            corpus = build_corpus(
                CorpusConfig(
                    bytes_per_domain=self.config.bytes_per_domain,
                    seed=self.config.corpus_seed,
                    generated_only=each.name == "generated",
                    validation_fraction=self.config.validation_fraction,
                ),
                quiet=self.quiet,
                root=self.root,
            )
            self.paths.append(corpus.path)
            source = CorpusSource(corpus)
        elif each.name.startswith(PREFIX):
            source = hub_source(each.name, quiet=self.quiet, root=self.root)
        else:
            source = file_source(each.path)
        if each.label is not None:
            source = LabelledSource(source, each.label)
        return source if each.side is None else SidedSource(source, each.side)

    def _token_files(self, tokenizer: Tokenizer | None) -> list[Shards]:
        token_format = TokenFormat(
            vocab_size=tokenizer.vocab_size if tokenizer else self.config.vocab_size,
            eos_id=tokenizer.eos_id if tokenizer else None,
            dtype=self.config.token_dtype,
        )
        found = []
        for each in self.named:
            if each.kind == "tokens":
                fraction = self.config.validation_fraction if each.side is None else 0.0
                shards = token_shards(each.path, token_format, validation_fraction=fraction)
                shards = shards if each.side is None else one_sided(shards, each.side)
                found.append(labelled(shards, each.label))
            elif each.side == "validation" and tokenizer is None:
                raise MoevizError(
                    f"{each.name} is no token file; evaluate on tokens of the same tokenizer, or name it"
                )
        return found

    def _prepared(self, each: Named, tokenizer: Tokenizer | None) -> Shards:
        shards = load_shards(each.path)
        own = prepared_tokenizer(each.path)
        if tokenizer is None or own.key != tokenizer.key:
            raise MoevizError(
                f"{each.path} was prepared with the tokenizer {own.name}, and another one is asked for; "
                "leave the tokenizer out, or prepare it again with that one"
            )
        if each.side is not None:
            shards = replace(shards, arrays={**shards.only(each.side)})
        return labelled(shards, each.label)


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
