"""`moeviz prepare`: tokenise ahead of training, once, into a folder that any machine trains on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from moeviz.errors import MoevizError

if TYPE_CHECKING:
    from trainer.data_shards import Shards

_DESCRIPTION = """Tokenise text ahead of training.

    moeviz prepare my-texts/ --out shards/mine                   text, JSON Lines (.gz, .zst): one BPE trained on them
    moeviz prepare code=repos/ prose=books.jsonl.zst --out shards/mix --tokenizer starcoder2/tokenizer.json
    moeviz prepare hf:HuggingFaceFW/fineweb-edu:sample-10BT@50000 --out shards/fineweb --tokenizer o200k_base
    moeviz prepare hf:codeparrot/codeparrot-clean@20000 --out shards/code --tokenizer shards/fineweb
    moeviz train --train-data shards/fineweb code=shards/code --mixture code=0.3 fineweb-edu=0.7
    moeviz prepare --check shards/mine                           compare every token with its checksum

SOURCE is a file, a folder, builtin, generated, or hf:NAME[:CONFIG][@DOCUMENTS] (needs `pip install datasets`).
NAME=SOURCE makes NAME the domain of all of it; otherwise a file's domain is its folder, its name, or what the field
`domain` or `source` of a row says. Exact copies are dropped, and held-out documents that repeat training text too.
Without --out the shards go into the cache, where `moeviz train --train-data SOURCE` finds them.
"""


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Tokenise text ahead of training."""

    sources: Positional[tuple[str, ...]] = ()
    """What to tokenise, one or several."""
    out: Path | None = None
    """Folder to make. Default: the cache."""
    tokenizer: str = "auto"
    """auto (a byte-level BPE trained on the text), a tokenizer.json or its folder, a prepared folder, or the name of a
    tiktoken encoding."""
    vocab_size: int = 4096
    """Vocabulary of an auto tokenizer."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out, by the hash of their content."""
    workers: int | None = None
    """Threads that tokenise. Default: one for each CPU."""
    check: Path | None = None
    """Compare every token of this prepared folder with its checksum, and make nothing."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0."""
    import logging

    import tyro

    arguments = tyro.cli(PrepareArguments, args=argv, prog="moeviz prepare", description=_DESCRIPTION)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    if arguments.check is not None:
        from trainer.data_prepared import check_prepared

        print(_said(arguments.check, check_prepared(arguments.check)))
        return 0
    if not arguments.sources:
        raise MoevizError("nothing to prepare; name a file, a folder or hf:NAME, see `moeviz prepare --help`")
    if arguments.workers is not None and arguments.workers < 1:
        raise MoevizError(f"--workers {arguments.workers} is below 1; leave it out for all CPUs")
    folder, shards = _prepared(arguments)
    print(_said(folder, shards))
    print(f"  moeviz train --train-data {folder if arguments.out else _as_asked(arguments)}")
    return 0


def _prepared(arguments: PrepareArguments) -> tuple[Path, Shards]:
    from trainer.data import DataConfig, open_data, open_prepared

    config = DataConfig(
        source=arguments.sources,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        validation_fraction=arguments.validation_fraction,
        workers=arguments.workers,
    )
    shards = open_data(config).shards if arguments.out is None else open_prepared(config, arguments.out)
    folder = arguments.out or shards.path
    if folder is None:
        raise MoevizError(f"{' '.join(arguments.sources)} holds tokens already; nothing to prepare")
    return folder, shards


def _as_asked(arguments: PrepareArguments) -> str:
    """The flags with which `moeviz train` finds the same shards in the cache."""
    words = list(arguments.sources)
    if arguments.tokenizer != "auto":
        words += ["--tokenizer", arguments.tokenizer]
    else:
        words += ["--vocab-size", str(arguments.vocab_size)]
    if arguments.validation_fraction != PrepareArguments.validation_fraction:
        words += ["--validation-fraction", str(arguments.validation_fraction)]
    return " ".join(words)


def _said(folder: Path, shards: Shards) -> str:
    from trainer.corpus import SPLITS

    training, held_out = (shards.num_tokens(split) for split in SPLITS)
    lines = [f"{folder}: {training:,} training and {held_out:,} held-out tokens"]
    width = max(len("domain"), *(len(domain) for domain in shards.domains))
    lines.append(f"  {'domain':<{width}}  {'training':>14}  {'held out':>12}  {'documents':>9}")
    for domain in shards.domains:
        training, held_out = (shards.num_tokens(split, domain) for split in SPLITS)
        documents = len(shards.starts("train", domain))
        lines.append(f"  {domain:<{width}}  {training:>14,}  {held_out:>12,}  {documents:>9,}")
    return "\n".join(lines)
