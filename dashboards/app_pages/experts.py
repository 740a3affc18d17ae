"""One expert of the chosen layer: what it takes, how its load went, and whom its layer works with."""

from __future__ import annotations

import streamlit as st

from dashboards import data, noise, view
from dashboards.figure import draw, empty
from dashboards.knockouts import draw_knockouts
from moeviz import plots

RECENT = 1000  # steps that count as now: token-level samples of these are looked at

picked, theme = view.current(), view.theme()
if picked.step < 0:
    st.header("Experts", anchor=False)
    empty("No step of this run has been written yet", "moeviz train --log-routing")
    st.stop()

now = data.ask(picked.path, picked.step, "load_matrix", step=picked.step).frame
here = now[now["layer"] == picked.layer]
expert = int(here.loc[here["load_rel"].idxmax(), "expert"]) if picked.expert is None else picked.expert
mine = here[here["expert"] == expert]
st.header(f"Expert {expert} of layer {picked.layer}", anchor=False)
st.caption(
    f"{mine['load_rel'].sum():.2f}× the even share at step {picked.step:,}"
    + ("; the busiest one, as none is chosen" if picked.expert is None else "")
    + f". Tokens are those sampled in the last {RECENT:,} steps."
)

recent = {"first": max(0, picked.step - RECENT), "last": picked.step}
tokens = data.ask(
    picked.path, picked.step, "expert_tokens", layer=picked.layer, expert=expert, limit=16, **recent
)
found = data.ask(picked.path, picked.step, "analysis", part="expert", layer=picked.layer)
special = found.frame[(found.frame["unit"] == expert) & (found.frame["name"] == "domain_spec")]
probed = data.ask(picked.path, picked.step, "probe_domains", layer=picked.layer, last=picked.step + 1)
over_time = probed._replace(frame=probed.frame[probed.frame["expert"] == expert])


def draw_domains(answer: data.Answer) -> None:
    """What the expert takes of each domain of the fixed probe, over training."""
    draw(
        "Domains over training",
        "Share of each domain's tokens that come here, in a fixed set of held-out text, over what shuffled domains "
        "show: orange more, blue less, faint where chance explains it.",
        plots.domain_time_map(answer.frame, theme=theme),
        alt=f"Heat map of {answer.frame['domain'].nunique()} domains over steps.",
        answer=answer,
        key="domain_time_map",
    )


left, right = st.columns(2)
with left:
    if tokens.frame.empty:
        empty("No token-level routing was recorded", "moeviz train --log-routing")
    else:
        draw(
            "Tokens it takes beyond its share",
            "How much more often than any token. Only tokens seen five times or more: a rare one reaches any value.",
            plots.token_lifts(tokens.frame, theme=theme),
            alt=f"Bars of the {len(tokens.frame)} tokens with the highest lift.",
            answer=tokens,
            key="token_lifts",
        )
with right:
    if special.empty and not over_time.frame.empty:
        draw_domains(over_time)
    elif special.empty:
        empty("Domains need a probe with domain labels", "moeviz analyze RUN")
    else:
        draw(
            "Domains",
            "Share of each domain's tokens that come here. Grey: what shuffled domains show, ± three standard "
            "deviations; a faint bar is within them.",
            plots.domain_bars(special, theme=theme),
            alt=f"Bars of {len(special)} domains beside their null.",
            answer=found._replace(frame=special),
            key="domain_bars",
        )
if not special.empty and not over_time.frame.empty:
    draw_domains(over_time)
draw_knockouts(found, picked.layer, expert, theme)
history = data.ask(
    picked.path, picked.step, "load_over_time", layer=picked.layer, points=400, last=picked.step
)
life = history._replace(frame=history.frame[history.frame["expert"] == expert])
if len(life.frame) > 1:
    shape = (noise.tokens_of(here, picked.top_k), picked.top_k, picked.width)
    draw(
        "Its load over time",
        "In units of the even share (line). Inside the grey band a difference is sampling noise.",
        plots.life_line(life.frame, noise=float(noise.band(*shape, data.design_effect(picked))), theme=theme),
        alt=f"Load of expert {expert} over steps.",
        answer=life,
        key="life_line",
    )
pairs = data.coactivation(picked, **recent)
if not pairs.frame.empty:
    draw(
        f"Who works with whom in layer {picked.layer}",
        "Tokens that two experts share, over what choosing experts at random with these loads would give: orange "
        "together, blue apart.",
        plots.coactivation_map(pairs.frame, num_experts=picked.width, expert=expert, theme=theme),
        alt=f"Heat map of {picked.width} by {picked.width} experts.",
        answer=pairs,
        key="coactivation_map",
    )
