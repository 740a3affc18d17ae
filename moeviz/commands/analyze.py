"""`moeviz analyze`: what experts specialise on, who works with whom, and what the model loses without each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional

from moeviz.errors import MoevizError, require

if TYPE_CHECKING:
    import numpy as np

    from moeviz.inspection.checkpoint import OpenedCheckpoint
    from moeviz.inspection.probe_batch import ProbeBatch

_LONGEST = 256
"""Tokens of one window at most: more windows say more about domains than longer ones."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeArguments:
    """Run a fixed probe with domain labels through a checkpoint and say what its experts and heads are for.

    CHECKPOINT is a run of `moeviz train` (its newest checkpoint is taken), one checkpoint folder, or a local Hugging
    Face folder. Every value is printed beside what chance alone would show, and dimmed where chance explains it. The
    result is kept as a run for `moeviz dash` and `moeviz query RUN "SELECT * FROM analysis"`.
    """

    checkpoint: Positional[Path]
    """A run, a checkpoint folder, or a Hugging Face folder."""
    tokens: int = 4096
    """Tokens of the probe, the same number from every domain."""
    domains: tuple[str, ...] = ()
    """Only these domains (default: all)."""
    data: str | None = None
    """Text to take the probe from: a file, a folder, `builtin` or `generated`. Default: the checkpoint's own
    held-out text; `generated` for a Hugging Face folder."""
    against: tuple[Path, ...] = ()
    """Earlier checkpoints of the same run: how many decisions have changed since. With two or more, also what share
    of the tokens was still moving at each."""
    gradients: bool = False
    """Also run the probe backwards once: the gradient that every expert gets."""
    knockout: bool = False
    """Also remove every expert in turn: one forward pass of the probe per expert and mode."""
    modes: tuple[Literal["reroute", "zero"], ...] = ("reroute", "zero")
    """How to remove an expert: let the next one take over, or drop what it adds."""
    run: Path | None = None
    """Run folder to make (default: runs/analyze-CHECKPOINT-DATE-TIME)."""
    json: bool = False
    """Print every value as JSON Lines instead of tables."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0."""
    import tyro

    arguments = tyro.cli(AnalyzeArguments, args=argv, prog="moeviz analyze", config=(FlagCreatePairsOff,))
    require("torch", "train", "analysing a checkpoint")
    if arguments.tokens < 1:
        raise MoevizError(f"--tokens {arguments.tokens} must be at least 1; 4096 is the default")

    from moeviz.commands.inspect import open_checkpoint
    from moeviz.inspection.analysis import analyze, num_ticks
    from moeviz.inspection.findings_report import print_findings, print_findings_json
    from trainer.allocator import keep_freed_memory

    keep_freed_memory()
    checkpoint = open_checkpoint(arguments.checkpoint)
    against = [open_checkpoint(path) for path in arguments.against]
    probe = probe_of(checkpoint, arguments)
    run = arguments.run or Path("runs") / f"analyze-{checkpoint.name}-{datetime.now():%Y%m%d-%H%M%S}"
    modes = arguments.modes if arguments.knockout else ()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("probe", total=num_ticks(checkpoint.model, modes))
        values = analyze(
            checkpoint,
            probe,
            run,
            modes=modes,
            against=against,
            gradients=arguments.gradients,
            progress=lambda text: bar.update(task, advance=1, description=text),
        )
    if arguments.json:
        print_findings_json(values)
    else:
        print_findings(values, checkpoint, probe, run)
    return 0


def probe_of(checkpoint: OpenedCheckpoint, arguments: AnalyzeArguments) -> ProbeBatch:
    """The probe that the arguments ask for.

    Raises:
        MoevizError: no such data, an unknown domain, or too little text for one window of each domain.
    """
    from moeviz.inspection.probe_batch import probe_of_windows, window_length, windows_of

    trained = checkpoint.config.get("trained")
    if arguments.data is None and isinstance(trained, Mapping):
        streams = _held_out(checkpoint, trained)
    else:
        streams = _of_texts(checkpoint, arguments)
    unknown = sorted({*arguments.domains} - {*streams})
    if unknown:
        raise MoevizError(
            f"--domains {' '.join(unknown)}: the text has no such domain; it has {', '.join(sorted(streams))}"
        )
    chosen = {
        name: ids for name, ids in streams.items() if not arguments.domains or name in arguments.domains
    }
    length = window_length(arguments.tokens, len(chosen), min(checkpoint.max_seq_len, _LONGEST))
    windows = {name: windows_of(ids, length) for name, ids in chosen.items()}
    empty = [name for name, rows in windows.items() if not rows]
    if empty:
        print(f"left out, less than {length} tokens of text: {', '.join(empty)}", file=sys.stderr)
    return probe_of_windows(windows, arguments.tokens)


def _held_out(checkpoint: OpenedCheckpoint, trained: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The validation text that the checkpoint's own run was evaluated on, by domain."""
    from trainer.checkpoint import TOKENIZER_FILE
    from trainer.config import TrainConfig
    from trainer.text import open_text

    config = TrainConfig.from_dict(dict(trained))
    shards = open_text(config, tokenizer_file=checkpoint.path / TOKENIZER_FILE, quiet=True).batches.shards
    return {domain: shards.tokens("validation", domain) for domain in shards.domains}


def _of_texts(checkpoint: OpenedCheckpoint, arguments: AnalyzeArguments) -> dict[str, np.ndarray]:
    from moeviz.inspection.probe_batch import streams_of

    texts = _texts(arguments.data or "generated")
    return streams_of(texts, checkpoint.encode, tokens_per_domain=arguments.tokens, domains=arguments.domains)


def _texts(source: str) -> Iterator[tuple[str, str]]:
    """(domain, text) of a file, a folder or the embedded corpus."""
    from trainer.corpus import CorpusConfig, build_corpus
    from trainer.data import EMBEDDED
    from trainer.data_sources import CorpusSource, Source, file_source

    found: Source
    if source in EMBEDDED:
        found = CorpusSource(build_corpus(CorpusConfig(generated_only=source == "generated"), quiet=True))
    else:
        found = file_source(Path(source).expanduser())
    for document in found.documents():
        yield document.domain, document.text
