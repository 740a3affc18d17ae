"""The state of a view, kept twice: in the session, where widgets hold it, and in the address, so any view is a link.

The address is read only when a person changed it (opened a link, went back) and written after every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import streamlit as st

from moeviz.colors import Theme
from moeviz.records import ModelInfo

_T = TypeVar("_T")
_BETWEEN = "|"
"""Between names in a link: names of runs hold dashes and commas."""
_LAST, _NAMES = "link_written", "link_names"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("-"))


_READ: dict[str, Callable[[str], Any]] = {
    "run": str,
    "layer": int,
    "expert": int,
    "live": lambda text: text != "0",
    "step": int,
    "sample": str,
    "at": int,
    "domain": str,
    "layers": _numbers,
    "lift": float,
    "pair": str,
    "metric": str,
    "map": int,
    "seq": int,
    "block": int,
    "head": int,
    "part": str,
    "measure": str,
    "runs": lambda text: text.split(_BETWEEN),
}


@dataclass(frozen=True, kw_only=True)
class View:
    """What every page is asked to show."""

    path: str
    """Folder of the run."""
    info: ModelInfo
    layer: int
    expert: int | None
    live: bool
    step: int
    """Newest step, or the chosen one when the view is frozen."""

    @property
    def width(self) -> int:
        """Number of experts of the chosen layer."""
        return self.info.layers[self.layer].num_experts

    @property
    def top_k(self) -> int:
        """Experts per token of the chosen layer."""
        return self.info.layers[self.layer].top_k


def current() -> View:
    """The view that the sidebar of this run of the page picked."""
    return st.session_state["view"]


def theme() -> Theme:
    """Of this browser, for figures that are drawn here; components ask the page themselves."""
    return "light" if st.context.theme.type == "light" else "dark"


def adopt_link() -> None:
    """Take what the address says into the session, unless this code wrote it."""
    asked = dict(st.query_params)
    if not asked or asked == st.session_state.get(_LAST):
        return
    for name, read in _READ.items():
        if name in asked:
            with suppress(ValueError):
                st.session_state[name] = read(asked[name])
        elif name == "expert":
            st.session_state[name] = None


def link(*names: str) -> None:
    """Say which parts of the session belong into the address of this page."""
    st.session_state.setdefault(_NAMES, []).extend(name for name in names)


def write_link() -> None:
    """Put them there, once everything has been drawn; what is None stays out."""
    names = st.session_state.pop(_NAMES, [])
    written = {
        name: _text(st.session_state[name]) for name in names if st.session_state.get(name) is not None
    }
    st.session_state[_LAST] = written
    if dict(st.query_params) != written:
        st.query_params.from_dict(written)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, list | tuple):
        between = _BETWEEN if any(isinstance(one, str) for one in value) else "-"
        return between.join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def keep_valid(name: str, options: Sequence[_T], default: _T) -> None:
    """Before a widget with this key is made: what the session (or a stale link) holds must be one of its options."""
    if st.session_state.get(name, default) not in options or name not in st.session_state:
        st.session_state[name] = default


def keep_valid_many(name: str, options: Sequence[_T], default: Sequence[_T]) -> None:
    """The same for a widget that holds several options."""
    held = [one for one in st.session_state.get(name, default) if one in options]
    st.session_state[name] = held or list(default)


def select(component_key: str, state: str, **names: str) -> Callable[[], None]:
    """A callback for a component that reports a place: put its parts into the session and draw the page anew.

    Args:
        component_key, state: where the component reports.
        names: part of the place -> name in the session; by default the layer and expert of the view.
    """

    def take() -> None:
        place = st.session_state[component_key][state]
        if place:
            for part, name in (names or {"layer": "layer", "expert": "expert"}).items():
                st.session_state[name] = place[part]
            st.rerun()

    return take
