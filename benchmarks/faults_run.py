"""A made-up run whose every row follows from its step and rank, and the processes that write, read and merge it.

A checker recomputes what it reads: nothing torn, nothing twice, nothing missing that was acknowledged (a `flush()`
returned). Processes are forked from one that has imported what they need, so that 200 of them take minutes.

Shapes: L layers, E experts, T steps.
"""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet  # noqa: F401  (imported once, before the fork)

from moeviz.records import LayerInfo, LoadRecord, ModelInfo, TokenRoutingRecord
from moeviz.store import BackgroundSink, RunInfo, SegmentWriter, Store, create_run, open_run
from moeviz.store.compact import Rules, compact_run
from moeviz.store.presence import Presence

L, E, K = 4, 8, 2
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["faults_run"])
_LOOK_BACK = 200
"""Steps that a reader looks at again at every poll; every 20th poll looks at all."""


def counts(steps_T: np.ndarray, layers_T: np.ndarray, rank: int) -> np.ndarray:
    """What the rows of these steps and layers hold, int64 [T, E]."""
    return layers_T[:, None] * E + np.arange(E) + steps_T[:, None] % 1000 + 7 * rank


def load(step: int, rank: int) -> LoadRecord:
    counts_LE = counts(np.full(L, step), np.arange(L), rank)
    return LoadRecord(step=step, rank=rank, ts=time.time(), tokens=100, counts_LE=counts_LE)


def sample(step: int, tokens: int = 64) -> TokenRoutingRecord:
    experts_LNSK = (np.arange(L * tokens * K).reshape(L, 1, tokens, K) + step) % E
    return TokenRoutingRecord(
        step=step,
        rank=0,
        layers=np.arange(L),
        seqs=np.array([0]),
        experts_LNSK=experts_LNSK.astype(np.uint16),
        weights_LNSK=np.full(experts_LNSK.shape, 0.5, dtype=np.float32),
        lengths_N=np.array([tokens]),
    )


def new_run(path: Path, ranks: int = 1) -> Path:
    layers = tuple(
        LayerInfo(layer=at, name=f"layers.{at}.gate", block=at, num_experts=E, top_k=K) for at in range(L)
    )
    return create_run(
        path, RunInfo(name="faults", model=ModelInfo(family="faults", layers=layers), ranks=ranks)
    )


def wrong_steps(store: Store, rank: int, acknowledged: int) -> int:
    """Steps 0..acknowledged of a rank that are missing, repeated or not what was written."""
    rows = store.arrow(
        lambda: (
            f"SELECT step, layer, counts FROM {store.source('expert_load')} "
            f"WHERE rank = {rank} AND step BETWEEN 0 AND {acknowledged}"
        )
    )
    steps_R, layers_R = (rows[name].to_numpy().astype(np.int64) for name in ("step", "layer"))
    lists = rows["counts"].combine_chunks()
    whole = bool((lists.value_lengths().to_numpy(zero_copy_only=False) == E).all())
    if not whole:
        return acknowledged + 1
    right_R = (lists.flatten().to_numpy().reshape(-1, E) == counts(steps_R, layers_R, rank)).all(1)
    right_R &= layers_R < L
    rows_T = np.bincount(steps_R, minlength=acknowledged + 1)
    seen_TL = np.zeros((acknowledged + 1, L), dtype=bool)
    seen_TL[steps_R[right_R], layers_R[right_R]] = True
    return int((~(seen_TL.all(1) & (rows_T == L))).sum())


def start(role: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
    """A process in `role(connection, *arguments)`, and what it sends."""
    receiving, sending = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=role, args=(sending, *arguments), daemon=True)
    process.start()
    sending.close()
    return process, receiving


def received(connection: Connection) -> list[Any]:
    """Everything that a process sent, once it is gone; a message that was cut off says nothing."""
    told = []
    try:
        while True:
            told.append(connection.recv())
    except (EOFError, OSError):
        return told
    finally:
        connection.close()


# Roles: what a process does.


def write_forever(told: Connection, path: Path, rank: int, first: int, pause: float) -> None:
    """Write steps from `first` on; tell each one that is acknowledged."""
    sink = BackgroundSink(SegmentWriter(path, rank, flush_seconds=0.02, sidecar=False), flush_seconds=0.02)
    for step in itertools.count(first):
        sink.write(load(step, rank))
        if step % 5 == 4 and sink.flush():
            told.send(step)
        time.sleep(pause)


def write_for(told: Connection, path: Path, rank: int, seconds: float, pause: float, ahead: float) -> None:
    """Write a step every `pause` seconds as training does: nobody waits for a flush. Tell the last one at the end.

    The clock of this process is `ahead` seconds ahead.
    """
    set_clock(ahead)
    presence = Presence(path)  # all of this as `watch` does
    writer = SegmentWriter(path, rank, flush_seconds=math.inf, sidecar=False)
    sink = BackgroundSink(writer, is_read=presence.is_read)
    step, end = -1, time.monotonic() + seconds
    while time.monotonic() < end:
        step += 1
        sink.write(load(step, rank))
        time.sleep(pause)
    sink.close()
    told.send({"last": step, "errors": sink.stats.errors, "lost": sink.stats.lost})


def read_for(told: Connection, path: Path, seconds: float, ranks: int, ahead: float) -> None:
    """Ask again and again; tell what was wrong, and how old a step was when it was first seen."""
    real = time.time
    set_clock(ahead)
    newest = dict.fromkeys(range(ranks), -1)
    seen: dict[str, Any] = {"polls": 0, "steps": 0, "errors": 0, "repeated": 0, "holes": 0, "lags": []}
    end = time.monotonic() + seconds
    with open_run(path) as store:
        while time.monotonic() < end + (60 if not seen["steps"] else 0):
            try:
                _poll(store, newest, seen, real)
            except Exception:
                logging.exception("a reader failed")
                seen["errors"] += 1
            time.sleep(0.2)
    told.send(seen)


def _poll(store: Store, newest: dict[int, int], seen: dict[str, Any], clock: Callable[[], float]) -> None:
    first = 0 if seen["polls"] % 20 == 0 else max(0, min(newest.values()) - _LOOK_BACK)
    rows = store.frame(
        lambda: (
            f"SELECT rank, step, ts FROM {store.source('expert_load', first)} "
            f"WHERE layer = 0 AND step >= {first} ORDER BY ALL"
        )
    )
    now = clock()
    seen["polls"] += 1
    seen["steps"] += len(rows)
    for rank, group in rows.groupby("rank"):
        steps, known = group["step"].to_numpy(), newest[int(rank)]
        seen["repeated"] += len(steps) - len(np.unique(steps))
        seen["holes"] += int(steps.max()) + 1 - first - len(np.unique(steps))
        seen["holes"] += max(0, known - int(steps.max()))
        if known >= 0:  # what was there before the first look says nothing about lag
            seen["lags"] += [round(now - ts, 3) for ts in group["ts"][steps > known]]
        newest[int(rank)] = int(steps.max())
    seen["holes"] += sum(known >= first and rank not in set(rows["rank"]) for rank, known in newest.items())


def merge_forever(told: Connection, path: Path, sync_seconds: float, pause: float) -> None:
    """A sidecar on a disk that takes `sync_seconds` to sync: its merges stay half done for that long."""
    real = os.fsync

    def slow(descriptor: Any) -> None:
        time.sleep(sync_seconds)
        real(descriptor)

    os.fsync = slow
    while True:
        merged = compact_run(path, Rules(fan_in=4, delay_seconds=0.5, grace_seconds=2))
        told.send(merged.merged)
        time.sleep(pause)


def set_clock(ahead: float) -> None:
    """From now on the clock of this process is `ahead` seconds ahead of the machine's."""
    real = time.time
    if ahead:
        time.time = lambda: real() + ahead
