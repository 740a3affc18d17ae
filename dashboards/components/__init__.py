"""Drawings that the browser makes itself: a folder of small canvas components, each with its own .html, .css and .js.

A figure that changes every second must keep its DOM node, its selection and its focus, and must not ship a plotting
library: so these are Streamlit components of the second kind, keyed, fed with packed bytes. Beside each one stands a
pure function from facts to the dictionary that the browser reads, which tests check without a browser.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from moeviz.colors import EXPERT_HUES, load_ramp, sequential_ramp

_FOLDER = Path(__file__).parent


@cache
def component(name: str) -> Callable[..., Any]:
    """Register `name`.html, .css and .js (with what canvas.css and canvas.js share) once; returns its mount."""
    css, script = (_read("canvas", kind) + "\n" + _read(name, kind) for kind in ("css", "js"))
    return st.components.v2.component(
        f"moeviz_{name}", html=_read(name, "html"), css=css, js=f"{_constants()}\n{script}"
    )


def pack(array: np.ndarray, dtype: str) -> str:
    """Array -> base64 of its little-endian bytes, which the browser reads back as a typed array."""
    return base64.b64encode(
        np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    ).decode()


def pack_unit(array: np.ndarray) -> str:
    """Numbers 0 to 1 -> one byte each, 0 to 254; NaN becomes 255."""
    with np.errstate(invalid="ignore"):
        codes = np.rint(np.clip(array, 0, 1) * 254)
    return pack(np.where(np.isnan(array), 255, codes), "u1")


def duration(seconds: float) -> str:
    """Seconds as one or two units: `12 s`, `3 min`, `2 h 05 min`, `4 d`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d"


def grouped(value: float) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{int(value):,}".replace(",", "\u202f")


def _read(name: str, kind: str) -> str:
    return (_FOLDER / f"{name}.{kind}").read_text(encoding="utf-8")


def _constants() -> str:
    """The colours of moeviz.colors as JavaScript."""
    ramps = {
        "load_dark": load_ramp("dark"),
        "load_light": load_ramp("light"),
        "sequential": sequential_ramp(),
    }
    tables = {name: base64.b64encode(ramp.tobytes()).decode() for name, ramp in ramps.items()}
    return f"const TABLES = {json.dumps(tables)}, HUES = {json.dumps(EXPERT_HUES[:7])};"
