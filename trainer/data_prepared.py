"""Folders that `moeviz prepare` makes: shards and their tokenizer, to be trained on here or elsewhere.

FOLDER/
  manifest.json               what is in it: domains, sizes, checksums, the identity of text and tokenizer
  tokenizer.json              the tokenizer
  train-0000.bin ...          tokens of one domain on one side, 16 or 32 bits each, documents ended by EOS
  train-0000.starts.npy ...   where each document begins
"""

from __future__ import annotations

from pathlib import Path

from moeviz.errors import MoevizError
from trainer.data_cache import cached
from trainer.data_shards import MANIFEST, Shards, load_shards, verify_shards, write_shards
from trainer.data_sources import Source
from trainer.tokenizer import Tokenizer, load_tokenizer

_TOKENIZER = "tokenizer.json"


def is_prepared(path: Path) -> bool:
    """Whether a path is a folder that `prepare` made, or a cache entry with its tokenizer."""
    return (path / MANIFEST).is_file() and (path / _TOKENIZER).is_file()


def prepared_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a prepared folder."""
    return load_tokenizer(path / _TOKENIZER)


def prepare(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = 0.05,
    quiet: bool = False,
    workers: int | None = None,
) -> Shards:
    """Tokenise a source into a folder, which appears when it is complete.

    Raises:
        MoevizError: the folder exists, the source is empty or malformed, or the place cannot be written.
    """
    folder = free_folder(folder)

    def build(work: Path) -> None:
        write_shards(work, source, tokenizer, validation_fraction, quiet=quiet, workers=workers)
        tokenizer.save(work / _TOKENIZER)

    return load_shards(cached(folder.parent.name, folder.name, build, root=folder.parent.parent))


def free_folder(folder: Path) -> Path:
    """Where a folder is to be made. Raises MoevizError if something is there."""
    if folder.exists():
        raise MoevizError(f"{folder} exists; name another folder, or delete it first")
    return folder.absolute()


def check_prepared(folder: Path) -> Shards:
    """Compare every token of a prepared folder with its checksums.

    Raises:
        MoevizError: it is damaged, or no such folder.
    """
    if not is_prepared(folder):
        raise MoevizError(
            f"{folder} is no folder that `moeviz prepare` made: it lacks {MANIFEST} or {_TOKENIZER}"
        )
    shards = load_shards(folder)
    verify_shards(shards)
    return shards
