"""What attention keeps in latents: how much of them is used, over training, and one sequence from inside."""

from __future__ import annotations

import streamlit as st

from dashboards import data, view
from dashboards.components.latent_words import PARTS, has_none, numbers, parts_of, shown_profile, where_words
from dashboards.figure import draw, empty
from dashboards.pickers import pick_latents, pick_measure
from moeviz import plots

picked, theme = view.current(), view.theme()
st.header("Latents", anchor=False)
index = data.until(data.ask(picked.path, picked.step, "latent_index"), picked).frame
if index.empty:
    empty(*has_none(picked.info))
    st.stop()

chosen = pick_latents(index, picked.info, data.latent_heads(picked, index))
series = data.until(data.ask(picked.path, picked.step, "latent_metrics"), picked)
st.caption(where_words(chosen.info, chosen.step, chosen.tokens))
tiles = numbers(series.frame, chosen.info, chosen.step)
for column, (name, value, help) in zip(st.columns(max(len(tiles), 1)), tiles, strict=True):
    column.metric(name, value, help=help)

question = {"layer": chosen.info.layer, "name": chosen.part}
spectra = data.until(data.ask(picked.path, picked.step, "latent_spectra", **question), picked)
profiles = data.until(data.ask(picked.path, picked.step, "latent_profiles", **question), picked)
part = PARTS[chosen.part]
left, right = st.columns(2)
with left:
    draw(
        f"{part.title}: directions in use",
        "Singular values as shares of their sum, the strongest first. Orange: this step; faint: other steps; dashed: "
        "all alike. The sooner it falls, the fewer directions are used.",
        plots.latent_spectrum(spectra.frame, step=chosen.step, theme=theme),
        alt=f"Spectrum of the latents of block {chosen.info.layer} at step {chosen.step}.",
        answer=spectra,
        key="latent_spectrum",
    )
with right:
    draw(
        f"{part.title}: each {part.place} over training",
        part.over_time,
        plots.latent_time_map(
            shown_profile(profiles.frame, chosen.part),
            what=part.profile,
            place=part.place,
            scale=part.profile_scale,
            least=part.least,
            step=chosen.step,
            theme=theme,
        ),
        alt=f"{part.profile} of each {part.place} of block {chosen.info.layer} over steps.",
        answer=profiles,
        key="latent_time_map",
    )

for name in [chosen.part] if chosen.info.kind == "mla" else parts_of(chosen.info.kind):
    found = data.latents(picked.path, chosen.step, chosen.info.layer, name)
    if found is None:
        continue
    one, block = PARTS[name], max(1, -(-found.length // found.grid_XSC.shape[1]))
    at = chosen.head_at(found.heads_X, name)
    head, grid_SC = found.heads_X[at], found.grid_XSC[at]
    draw(
        f"{one.title}{'' if head is None else f', head {head}'}: sequence {found.seq}",
        one.picture,
        plots.latent_picture(
            grid_SC,
            place=one.place,
            texts=data.trace(picked.path, chosen.step, found.seq, 0).texts[found.first :][: found.length],
            first=found.first,
            scale=one.scale,
            block=block,
            theme=theme,
        ),
        alt=f"{one.title} of block {chosen.info.layer}: {len(grid_SC)} tokens by {grid_SC.shape[1]}.",
        answer=data.latent_answer(grid_SC, chosen.step, chosen.info.layer, name),
        key=f"latent_picture_{name}",
    )

measure = pick_measure(series.frame)
if measure is not None:
    curve = series._replace(frame=series.frame[series.frame["name"] == measure.id])
    draw(
        f"{measure.name} of all blocks",
        f"{measure.how_to_read} Range: {measure.range}. Orange: block {chosen.info.layer}.",
        plots.metric_curves(
            curve.frame, label=measure.unit, layer=chosen.info.layer, noun="block", theme=theme
        ),
        alt=f"{measure.name} of every recorded block over steps.",
        answer=curve,
        key="latent_curves",
    )
