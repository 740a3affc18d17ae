"""moeviz: see inside a Mixture-of-Experts language model while it trains, and after.

Names are resolved on first use, so that `import moeviz` costs nothing: no torch, duckdb, plotly, streamlit, textual.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeviz.capture.probe import Probe
    from moeviz.errors import MoevizError
    from moeviz.policy import EVERYTHING, SamplingPolicy
    from moeviz.session import watch
    from moeviz.store.reader import Store, open_run

__version__ = "0.1.0"

_LAZY = {
    "EVERYTHING": "moeviz.policy",
    "MoevizError": "moeviz.errors",
    "Probe": "moeviz.capture.probe",
    "SamplingPolicy": "moeviz.policy",
    "Store": "moeviz.store.reader",
    "open_run": "moeviz.store.reader",
    "watch": "moeviz.session",
}

__all__ = [
    "EVERYTHING",
    "MoevizError",
    "Probe",
    "SamplingPolicy",
    "Store",
    "__version__",
    "open_run",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'moeviz' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
