"""How a figure stands on a page: a card with a title, one line on how to read it, and its data within reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from dashboards.data import Answer

if TYPE_CHECKING:  # the live page draws without plotly and must not load it
    import plotly.graph_objects as go

_SHOWN_ROWS = 1000
_TABLE_PIXELS, _ROW_PIXELS = 560, 35


@contextmanager
def card(title: str, caption: str, key: str) -> Iterator[None]:
    """A bordered box. `key` names it in style.css and must be unique on the page."""
    with st.container(border=True, key=f"card_{key}", gap="small"):
        with st.container(gap=None):
            st.markdown(f"###### {title}")
            st.caption(caption)
        yield


def draw(title: str, caption: str, figure: go.Figure, *, alt: str, answer: Answer, key: str) -> None:
    """A plotly figure as a card. Its data may be looked at and taken away as CSV."""
    with card(title, caption, key):
        bar = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}
        st.plotly_chart(figure, theme=None, key=f"plot_{key}", config=bar, alt=alt)
        data_behind(lambda: answer, key)


def draw_table(
    title: str, caption: str, frame: pd.DataFrame, *, formats: dict[str, str], names: dict[str, str], key: str
) -> None:
    """A short table as a card, with number formats and headings by column."""
    columns = {
        column: st.column_config.NumberColumn(names.get(column, column), format=format)
        for column, format in formats.items()
    }
    with card(title, caption, key):
        height = min(_TABLE_PIXELS, _ROW_PIXELS * (len(frame) + 1) + 4)
        st.dataframe(frame, hide_index=True, height=height, column_config=columns, alt=title)


@st.fragment
def data_behind(ask: Callable[[], Answer], key: str) -> None:
    """The table behind a figure, how it was asked for, and a download. Closed, nothing is asked."""
    box = st.expander("Data", type="compact", on_change="rerun", key=f"data_{key}")
    if not box.open:
        return
    answer = ask()
    with box:
        st.code(
            f'from moeviz.store import open_run, queries\nrun = open_run("RUN")\n{answer.asked}',
            language="python",
        )
        st.dataframe(answer.frame.head(_SHOWN_ROWS), hide_index=True, height=260)
        rows = len(answer.frame)
        more = f", the first {_SHOWN_ROWS:,} shown" if rows > _SHOWN_ROWS else ""
        st.caption(f"{rows:,} rows{more}")
        st.download_button(
            "Download CSV",
            lambda: answer.frame.to_csv(index=False).encode(),
            file_name=f"{key}.csv",
            mime="text/csv",
            key=f"csv_{key}",
            icon=":material/download:",
            on_click="ignore",
        )


def empty(what: str, command: str) -> None:
    """Nothing to show yet: say so, and give the next command."""
    with st.container(border=True, key="card_empty"):
        st.markdown(f"###### {what}")
        st.caption("To get there:")
        st.code(command, language="bash")
