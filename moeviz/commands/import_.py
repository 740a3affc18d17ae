"""`moeviz import`: routing that another program recorded, as a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff, Positional

_PRINTED_FAULTS = 10


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Make a run of routing that was recorded elsewhere; it opens in every view that its data allows.

    moeviz import moe_routes.jsonl --run runs/vllm

    route-jsonl: a token a line, {"type": "route", "layer", "token_idx", "topk_ids", "topk_weights"}, after a meta
    line, as loggers for vLLM write it. megatron-jsonl: Megatron Core's router trace, a file or its folder of
    router_trace_rank*.jsonl. olmoe-counts: published tokens per expert by domain; a domain becomes a step.
    sglang-dump: what SGLang's expert distribution recorder dumped, a file or its folder of
    expert_distribution_recorder_*.pt, in any of its modes; a forward pass becomes a step.
    A faulty line is left out and named; all others count.
    """

    file: Positional[Path]
    """The recording."""
    format: Literal["auto", "route-jsonl", "megatron-jsonl", "olmoe-counts", "sglang-dump"] = "auto"
    """auto: by what the file holds."""
    run: Path | None = None
    """Folder of the run to make; runs/ and the file's name when left out."""
    model: str | None = None
    """olmoe-counts: which of the file's models; its first when left out."""
    num_experts: int | None = None
    """Experts of a layer, where the file does not say it."""
    top_k: int | None = None
    """sglang-dump: experts of a token; only dumps of mode per_token say it themselves."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0, also when faulty lines were left out."""
    import tyro

    arguments = tyro.cli(ImportArguments, args=argv, prog="moeviz import", config=(FlagCreatePairsOff,))
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from moeviz.imports.importing import import_recording

    run = arguments.run or Path("runs") / arguments.file.resolve().stem
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("read")
        made = import_recording(
            arguments.file,
            run,
            None if arguments.format == "auto" else arguments.format,
            model_name=arguments.model,
            num_experts=arguments.num_experts,
            top_k=arguments.top_k,
            progress=lambda phase, done, total: bar.update(
                task, description=phase, completed=done, total=total
            ),
        )
    recording = made.recording
    for fault in recording.faults[:_PRINTED_FAULTS]:
        print(f"moeviz import: left out {fault}", file=sys.stderr)
    if len(recording.faults) > _PRINTED_FAULTS:
        print(f"moeviz import: {len(recording.faults):,} faulty lines in all", file=sys.stderr)
    for note in recording.notes:
        print(f"moeviz import: {note}", file=sys.stderr)
    layers = recording.model.layers
    print(
        f"{made.run}: {recording.format}, {len(recording.steps):,} steps, {len(layers)} layers x "
        f"{layers[0].num_experts} experts, top-{layers[0].top_k}; `moeviz show {made.run}` summarises it"
    )
    return 0
