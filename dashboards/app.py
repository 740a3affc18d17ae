"""The dashboards: `streamlit run dashboards/app.py`, or `moeviz dash`. Navigation, and what all pages share.

A page is three things: pick (here and in its own widgets), ask (dashboards.data), draw (components and moeviz.plots).
"""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.append(
        str(HERE.parent)
    )  # so that a bare checkout works; after an install the packages are found anyway

from dashboards import sidebar, view  # noqa: E402
from dashboards.figure import empty  # noqa: E402
from moeviz.errors import MoevizError, RunNotFoundError  # noqa: E402

PAGES = (
    (
        "overview",
        "Live overview",
        "monitoring",
        "How the run fares now: loads of all experts, entropy, alerts.",
    ),
    (
        "loads",
        "Loads",
        "stacked_bar_chart",
        "One layer over time: who takes over, when, and is it more than noise.",
    ),
    (
        "experts",
        "Experts",
        "person_search",
        "One expert: its tokens and domains, its life, and whom it works with.",
    ),
    (
        "tokens",
        "Tokens",
        "format_color_text",
        "Text coloured by the expert each token went to, layer by layer.",
    ),
    ("flow", "Flow", "account_tree", "Paths that tokens take from layer to layer, beyond chance."),
    ("attention", "Attention", "grid_view", "What each head reads: all heads small, one large."),
    (
        "latents",
        "Latents",
        "compress",
        "What attention keeps in latents: how much of them is used, and by whom.",
    ),
    (
        "compare",
        "Compare",
        "compare_arrows",
        "Runs side by side: validation loss, MaxVio, open alerts.",
    ),
)


def main() -> None:
    st.set_page_config(page_title="moeviz", page_icon=str(HERE / "icon.svg"), layout="wide")
    st.html(HERE / "style.css")
    st.logo(HERE / f"logo-{view.theme()}.svg", icon_image=HERE / "icon.svg", size="large")
    pages = [
        st.Page(
            HERE / "app_pages" / f"{name}.py",
            title=title,
            icon=f":material/{icon}:",
            help=help,
            default=not at,
        )
        for at, (name, title, icon, help) in enumerate(PAGES)
    ]
    page = st.navigation(pages)
    view.adopt_link()
    try:
        st.session_state["view"] = sidebar.pick_view()
        page.run()
    except sidebar.DenseRunError as error:
        if page.url_path == "compare":
            page.run()
        else:
            st.error(str(error), icon=":material/error:")
    except RunNotFoundError as error:
        empty(str(error), "moeviz demo")
    except MoevizError as error:
        st.error(str(error), icon=":material/error:")
    finally:
        view.write_link()  # also when a page stopped early


main()
