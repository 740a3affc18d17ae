"""Where a run is kept: segments that never change, names that say what they cover, DuckDB to ask.

Writing needs pyarrow alone; reading adds duckdb and pandas. Names are resolved on first use so that a
training process never imports the query engine.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "BackgroundSink": "moeviz.store.background",
    "RunInfo": "moeviz.store.run",
    "SegmentWriter": "moeviz.store.writer",
    "Store": "moeviz.store.reader",
    "create_run": "moeviz.store.run",
    "open_run": "moeviz.store.reader",
    "pack_run": "moeviz.store.pack",
    "resume_run": "moeviz.store.run",
}

__all__ = [
    "BackgroundSink",
    "RunInfo",
    "SegmentWriter",
    "Store",
    "create_run",
    "open_run",
    "pack_run",
    "resume_run",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moeviz.store' has no attribute {name!r}")
