"""From a recorded file to a run folder that every view opens.

The records go the way that those of a probe go (metrics are derived, segments written), but without alerts: their
rules judge training over time, and an imported recording is not that. The run is built under a hidden name,
packed, and renamed when it is whole.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

from moeviz.derive import TOGETHER, DeriveSink
from moeviz.errors import MoevizError
from moeviz.imports.lines import LineReader, read_megatron, read_routes, trace_files
from moeviz.imports.published import read_published
from moeviz.imports.recording import FaultyLine
from moeviz.imports.sglang import dump_files, read_dumps
from moeviz.records import AlertRecord, EventRecord, ModelInfo, Record
from moeviz.store.pack import pack_run
from moeviz.store.run import RunInfo, create_run
from moeviz.store.writer import SegmentWriter

RecordingFormat = Literal["route-jsonl", "megatron-jsonl", "olmoe-counts", "sglang-dump"]

_SNIFFED_LINES = 50
_NAMED_FAULTS = 100
"""Faulty lines that the run itself keeps; the rest is counted."""


class Recording(NamedTuple):
    """A file, read and checked."""

    format: RecordingFormat
    model: ModelInfo
    steps: list[int]
    records: Callable[[int, float], Iterator[Record]]
    """(step, time) -> the records of that step."""
    facts: dict[str, Any]
    """What the file says about itself."""
    faults: list[FaultyLine]
    notes: list[str]
    """What the file does not say, and what was put in its place."""


class Imported(NamedTuple):
    """What an import made."""

    run: Path
    recording: Recording


def import_recording(
    path: str | Path,
    run: str | Path,
    recording_format: RecordingFormat | None = None,
    *,
    model_name: str | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Imported:
    """Make a run of routing that another program recorded.

    Args:
        path: the file, or the folder of a Megatron trace or of SGLang's dumps.
        run: folder of the run, made here.
        recording_format: None: by what the file holds.
        model_name: olmoe-counts: which of the file's models.
        num_experts: of a layer, where the file does not say it.
        top_k: experts of a token, where the file does not say it (sglang-dump).
        progress: called with what is done, how far it is and how far it goes.

    Raises:
        MoevizError: the run exists, or the file holds no routing.
    """
    path, run = Path(path), Path(run)
    if run.exists():
        raise MoevizError(
            f"{run} exists and is not overwritten; give another folder with --run, or delete it"
        )
    recording = read_recording(
        path,
        recording_format or sniff(path),
        model_name=model_name,
        num_experts=num_experts,
        top_k=top_k,
        progress=lambda done, total: progress("read", done, total),
    )
    run.parent.mkdir(parents=True, exist_ok=True)
    temporary = run.parent / f".{run.name}.importing"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(recording, path.name, temporary, run.resolve().name, progress)
        progress("pack", 0, 1)
        pack_run(temporary)
        temporary.rename(run)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    progress("pack", 1, 1)
    return Imported(run, recording)


def sniff(path: Path) -> RecordingFormat:
    """The format of a file, by what its first lines hold.

    Raises:
        MoevizError: none that is known.
    """
    if dump_files(path):
        return "sglang-dump"
    with open(trace_files(path)[0], "rb") as file:
        for _, line in zip(range(_SNIFFED_LINES), file, strict=False):
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(value, dict):
                if "top_indices" in value:
                    return "megatron-jsonl"
                if "topk_ids" in value or value.get("type") == "meta":
                    return "route-jsonl"
                if any(isinstance(one, dict) and "expert_counts" in one for one in value.values()):
                    return "olmoe-counts"
    if path.suffix == ".json":
        return "olmoe-counts"
    raise MoevizError(
        f"{path} begins with no line that a known format has; name it with --format route-jsonl, "
        "megatron-jsonl, olmoe-counts or sglang-dump"
    )


def read_recording(
    path: Path,
    recording_format: RecordingFormat,
    *,
    model_name: str | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Recording:
    """Read and check a file of a format.

    Raises:
        MoevizError: it holds not one decision; the message says what is wrong with its first line.
    """
    if recording_format == "sglang-dump":
        return _dumped(path, top_k, progress)
    files = trace_files(path)
    if recording_format == "olmoe-counts":
        published = read_published(files[0], model_name)
        domains = list(published.counts_LE)
        facts = {"model": published.model_name, "domains": domains}
        notes = [f"step {step} is domain {domain}" for step, domain in enumerate(domains)]
        steps = list(range(len(domains)))
        return Recording(recording_format, published.model, steps, published.records, facts, [], notes)
    lines = LineReader(files, progress)
    read = read_routes if recording_format == "route-jsonl" else read_megatron
    decisions, meta = read(lines, num_experts)
    if not decisions.steps:
        first = f"; the first fault: {lines.faults[0]}" if lines.faults else ""
        raise MoevizError(f"{path} holds no decision in the form of {recording_format}{first}")
    notes = []
    if decisions.num_experts is None:
        notes.append("the number of experts is taken as the largest id plus one; --num-experts tells it")
    if not decisions.weighted:
        notes.append("gate weights are missing: equal shares of 1/K stand in their place")
    uneven = decisions.uneven_steps()
    if uneven:
        notes.append(
            f"layers saw different numbers of tokens in {len(uneven)} steps, first in step {uneven[0]}"
        )
    model = decisions.model(str(meta.get("model_id", recording_format)))
    return Recording(recording_format, model, decisions.steps, decisions.records, meta, lines.faults, notes)


def _dumped(path: Path, top_k: int | None, progress: Callable[[int, int], None]) -> Recording:
    files = dump_files(path)
    if not files:
        raise MoevizError(
            f"{path} has no expert_distribution_recorder_*.pt; give the file or folder of a dump"
        )
    dumps = read_dumps(files, top_k, progress)
    facts = {"files": [file.name for file in files], "modes": sorted(set(dumps.modes))}
    return Recording(
        "sglang-dump", dumps.model(), dumps.steps, dumps.records, facts, dumps.faults, dumps.doubts()
    )


def _write(
    recording: Recording,
    file_name: str,
    folder: Path,
    name: str,
    progress: Callable[[str, int, int], None],
) -> None:
    imported = {
        "file": file_name,
        "format": recording.format,
        "notes": recording.notes,
        "meta": recording.facts,
    }
    create_run(
        folder,
        RunInfo(
            name=name,
            model=recording.model,
            config={"imported": imported},
            planned_steps=len(recording.steps),
        ),
    )
    sink = DeriveSink(
        _WithoutAlerts(SegmentWriter(folder, sidecar=False)), recording.model, together=TOGETHER
    )
    first, last = recording.steps[0], recording.steps[-1]
    detail = {
        **imported,
        "faulty_lines": len(recording.faults),
        "faults": [str(fault) for fault in recording.faults[:_NAMED_FAULTS]],
    }
    sink.write(EventRecord(step=first, rank=0, ts=time.time(), kind="started", detail={"by": "import"}))
    sink.write(EventRecord(step=first, rank=0, ts=time.time(), kind="imported", detail=detail))
    for done, step in enumerate(recording.steps):
        progress("write", done, len(recording.steps))
        for record in recording.records(step, time.time()):
            sink.write(record)
    sink.write(EventRecord(step=last, rank=0, ts=time.time(), kind="ended", detail={"status": "finished"}))
    sink.close()


class _WithoutAlerts:
    """A sink that leaves alerts out."""

    def __init__(self, inner: SegmentWriter) -> None:
        self._inner = inner
        self.flush, self.close = inner.flush, inner.close

    def write(self, record: Record) -> None:
        if not isinstance(record, AlertRecord):
            self._inner.write(record)
