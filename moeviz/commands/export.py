"""`moeviz export`: hand a trained model, or what was recorded of it, on to other tools."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff, Positional

from moeviz.errors import MoevizError, require


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Save a checkpoint for transformers, or the recorded tables of a run as Parquet, CSV or DuckDB.

    hf: the folder opens with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`. The family is the first one
    that computes exactly what the model computes: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, GLM4-MoE, DeepSeek-V2,
    DeepSeek-V3 or GPT-OSS. A model that no family computes is refused, and the message names what is in the way.
    safetensors: the weights of any model under our names, with its config and tokenizer.

    moeviz export runs/mine --format parquet --tables expert_load metrics --out mine-loads
    """

    run: Positional[Path]
    """A run; for hf and safetensors its newest checkpoint is taken, or name one checkpoint folder."""
    folder: Positional[Path | None] = None
    """Folder to make; RUN-FORMAT in the current folder when left out."""
    out: Path | None = None
    """The same, by name."""
    format: Literal["hf", "safetensors", "parquet", "csv", "duckdb"] = "hf"
    """hf: config.json, safetensors and tokenizer.json of a checkpoint. safetensors: its weights under our names.
    parquet, csv: a file a table. duckdb: one file."""
    tables: tuple[str, ...] = ()
    """Tables to export (not hf); all but `decisions` when left out. `moeviz query RUN` lists them."""
    family: str | None = None
    """Name the family yourself, by transformers' model_type (hf only): mixtral, olmoe, qwen3_moe ..."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the saved weights (hf and safetensors)."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0."""
    import tyro

    arguments = tyro.cli(ExportArguments, args=argv, prog="moeviz export", config=(FlagCreatePairsOff,))
    if arguments.out is not None and arguments.folder is not None:
        raise MoevizError(f"two folders, {arguments.folder} and --out {arguments.out}; give one of them")
    if arguments.format in ("hf", "safetensors"):
        if arguments.tables:
            raise MoevizError(
                "--tables goes with --format parquet, csv or duckdb; hf and safetensors save a checkpoint"
            )
        return _export_checkpoint(arguments)
    if arguments.family is not None:
        raise MoevizError(f"--family goes with --format hf; {arguments.format} exports recorded tables")
    return _export_tables(arguments)


def _folder(arguments: ExportArguments, name: str) -> Path:
    return arguments.out or arguments.folder or Path(f"{name}-{arguments.format}")


def _export_checkpoint(arguments: ExportArguments) -> int:
    require("torch", "train", "exporting a checkpoint")

    import torch

    from trainer.checkpoint import load_checkpoint
    from trainer.export import export_hf, export_safetensors
    from trainer.resume import find_checkpoint

    folder = _folder(arguments, arguments.run.resolve().name)
    found = find_checkpoint(str(arguments.run), None, note=lambda text: print(text, file=sys.stderr))
    loaded = load_checkpoint(found.path)
    loaded.model.to(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
    try:
        if arguments.format == "safetensors":
            export_safetensors(loaded, folder)
        else:
            export_hf(loaded, folder, arguments.family)
    except ValueError as error:
        raise MoevizError(f"{found.path} was not exported: {error}") from error
    print(f"{folder}: step {found.step} of {arguments.run}, {arguments.dtype}")
    return 0


def _export_tables(arguments: ExportArguments) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from moeviz.store.catalog import resolve_run
    from moeviz.store.export import export_run
    from moeviz.store.queries import has_ended
    from moeviz.store.reader import open_run

    assert arguments.format != "hf"
    assert arguments.format != "safetensors"
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with open_run(resolve_run(str(arguments.run))) as store:
        folder = _folder(arguments, store.info.name)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("export")

            def advance(table: str, done: int, total: int) -> None:
                bar.update(task, description=table or "export", completed=done, total=total)

            made = export_run(store, folder, arguments.format, arguments.tables, advance)
        for note in store.notes:
            print(f"moeviz export: {note}", file=sys.stderr)
        if not has_ended(store):
            print(
                "moeviz export: the run did not say that it ended; export again for later steps",
                file=sys.stderr,
            )
    print(
        f"{made.folder}: {sum(made.rows.values()):,} rows of {len(made.rows)} tables, {made.bytes / 1e6:,.1f} MB"
    )
    return 0
