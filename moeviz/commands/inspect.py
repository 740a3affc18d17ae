"""`moeviz inspect`: open a checkpoint, follow a text through it, and leave a run that every view opens."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import FlagCreatePairsOff, Positional

from moeviz.errors import MoevizError, require

if TYPE_CHECKING:
    from moeviz.inspection.checkpoint import OpenedCheckpoint

DEFAULT_TEXT = "The little fox ran to the river. def area(width, height): return width * height"


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Which experts does each token of a text take, layer by layer, in a finished checkpoint?

    CHECKPOINT is a run of `moeviz train` (its newest checkpoint is taken), one checkpoint folder, or a local
    Hugging Face folder. What the routers did is printed as a table and kept as a run for `moeviz tui`, `moeviz dash`
    and `moeviz query`.
    """

    checkpoint: Positional[Path]
    """A run, a checkpoint folder, or a Hugging Face folder."""
    text: tuple[str, ...] = ()
    """Texts to follow; each becomes a sequence. Default: a sentence of prose and a line of code."""
    file: Path | None = None
    """Read a further text from this file."""
    run: Path | None = None
    """Run folder to make (default: runs/inspect-CHECKPOINT-DATE-TIME)."""
    layers: tuple[int, ...] = ()
    """Print these MoE layers only (all are recorded)."""
    json: bool = False
    """Print the decisions as JSON Lines instead of a table."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0."""
    import tyro

    arguments = tyro.cli(InspectArguments, args=argv, prog="moeviz inspect", config=(FlagCreatePairsOff,))
    require("torch", "train", "inspecting a checkpoint")
    texts = _texts(arguments)
    checkpoint = open_checkpoint(arguments.checkpoint)
    run = arguments.run or _free_run(checkpoint.name)

    from moeviz.inspection.report import print_json, print_report
    from moeviz.inspection.trace import trace
    from moeviz.store.reader import open_run

    trace(checkpoint, texts, run)
    with open_run(run) as store:
        if arguments.json:
            print_json(store, arguments.layers)
        else:
            print_report(store, checkpoint, arguments.layers)
    return 0


def _texts(arguments: InspectArguments) -> list[str]:
    texts = list(arguments.text)
    if arguments.file is not None:
        try:
            texts.append(arguments.file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise MoevizError(
                f"cannot read the text of {arguments.file} ({error}); give a UTF-8 file"
            ) from error
    return texts or [DEFAULT_TEXT]


def _free_run(name: str) -> Path:
    return Path("runs") / f"inspect-{name}-{datetime.now():%Y%m%d-%H%M%S}"


def open_checkpoint(path: Path) -> OpenedCheckpoint:
    """Open a moeviz run or checkpoint, or a Hugging Face folder.

    Raises:
        MoevizError: nothing there, nothing that can be opened, or a damaged file.
    """
    if not path.exists():
        raise MoevizError(
            f"no checkpoint at {path}: no such folder; give a run, a checkpoint or a model folder"
        )
    if path.is_dir() and (path / "config.json").exists():
        return _open_huggingface(path)
    return _open_own(path)


def _open_own(path: Path) -> OpenedCheckpoint:
    from moeviz.inspection.checkpoint import OpenedCheckpoint
    from trainer.checkpoint import load_checkpoint
    from trainer.resume import find_checkpoint, run_of

    found = find_checkpoint(str(path), None, note=lambda text: print(text, file=sys.stderr))
    model, tokenizer, config, step = load_checkpoint(found.path)
    if tokenizer is None:
        raise MoevizError(
            f"{found.path} was trained on token ids and has no tokenizer, so a text cannot be followed through it; "
            "train with text, or with --tokenizer, to inspect text"
        )
    return OpenedCheckpoint(
        path=found.path,
        name=f"{run_of(found).name}-{step}",
        model=model,
        encode=tokenizer.encode,
        token_texts=tokenizer.token_texts(),
        max_seq_len=model.config.max_seq_len,
        step=step,
        config={"trained": config.to_dict()},
    )


def _open_huggingface(path: Path) -> OpenedCheckpoint:
    require("transformers", "hf", "opening a Hugging Face folder")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moeviz.inspection.checkpoint import OpenedCheckpoint

    try:
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise MoevizError(
            f"transformers cannot open {path} ({error}); it needs config.json, weights and a tokenizer"
        ) from error
    vocab_size = max(len(tokenizer), model.config.get_text_config().vocab_size)
    return OpenedCheckpoint(
        path=path,
        name=path.resolve().name,
        model=model.eval(),
        encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        token_texts=[str(tokenizer.decode([token])) for token in range(vocab_size)],
        max_seq_len=getattr(model.config.get_text_config(), "max_position_embeddings", 2048),
    )
