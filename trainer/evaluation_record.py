"""Scores of a checkpoint as part of its run: scalars at its step, and an event that says how they were made.

The run may have ended and be packed, or still be training: rows go into segments of a writer number that no rank
has, under the attempt that made the checkpoint, so they stand and fall with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeviz.errors import MoevizError
from moeviz.records import EventRecord, ScalarRecord
from moeviz.store.pack import pack_run, unpack_run
from moeviz.store.run import read_info
from moeviz.store.writer import SegmentWriter

_WRITER = 9_999
"""Number of the writer: ranks count from 0."""


def record_evaluation(run: Path, step: int, values: Mapping[str, float], detail: Mapping[str, Any]) -> None:
    """Add the results of an evaluation to a run folder.

    Args:
        run: the folder.
        step: optimizer steps that the checkpoint had done.
        values: scalars, for example `eval/hellaswag/acc_norm`.
        detail: of the event: which task, how many questions, the tool's options.

    Raises:
        MoevizError: no run there, one that cannot be written, or one that another process is packing.
    """
    packed = read_info(run).packed
    if packed:
        unpack_run(run)
    try:
        _write(run, step, values, detail)
    except OSError as error:
        raise MoevizError(f"the results were not kept: {run} cannot be written ({error})") from error
    finally:
        if packed:
            pack_run(run, force=True)


def _write(run: Path, step: int, values: Mapping[str, float], detail: Mapping[str, Any]) -> None:
    info = read_info(run)
    made_by = [attempt.number for attempt in info.attempts if attempt.from_step <= step]
    writer = SegmentWriter(run, rank=_WRITER, attempt=made_by[-1] if made_by else None, sidecar=False)
    now = time.time()
    writer.write(ScalarRecord(step=step, rank=0, ts=now, values=dict(values)))
    writer.write(EventRecord(step=step, rank=0, ts=now, kind="evaluated", detail=dict(detail)))
    writer.close()
