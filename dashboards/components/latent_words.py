"""What the latents page says in words: which parts there are, what a picture shows, one line of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from moeviz.metrics import by_id
from moeviz.metrics.latent import TELLING
from moeviz.records import LatentInfo, ModelInfo

if TYPE_CHECKING:  # words need no plotly
    from moeviz.plots.latents import LatentScale


class Part(NamedTuple):
    """One kind of latent of a block."""

    title: str
    place: str
    """What a column of its picture is."""
    profile: str
    """What its profile says, for a colour bar."""
    over_time: str
    """How to read the profile over steps."""
    picture: str
    """How to read its picture."""
    scale: LatentScale
    """Of the picture."""
    profile_scale: LatentScale
    least: float = 0.0
    """End of the colours of the profile at least."""


PARTS = {
    "kv": Part(
        "Keys and values",
        "dimension",
        "std",
        "Standard deviation of each number of the latent over tokens. A row that stays dark carries nothing.",
        "One row per token of the sequence, one column per number of its latent: blue negative, orange positive. "
        "Columns that never change are dead; columns that change with the word carry it.",
        "signed",
        "weight",
    ),
    "q": Part(
        "Queries",
        "dimension",
        "std",
        "Standard deviation of each number of the latent over tokens. A row that stays dark carries nothing.",
        "One row per token of the sequence, one column per number of its query latent: blue negative, orange positive.",
        "signed",
        "weight",
    ),
    "read": Part(
        "Slots read tokens",
        "slot",
        "focus",
        "1 minus the entropy of what each slot reads: 0 all tokens alike, 1 a single one. Rows light up as slots find "
        "what they look for.",
        "Stage 1. One column per slot: the weight of each token, as the last whole chunk finds it, compared with an "
        "even share, which is not seen: blue less, orange more. Columns that look alike are copies of each other.",
        "even",
        "weight",
        0.1,
    ),
    "write": Part(
        "Tokens read slots",
        "slot",
        "mass",
        "Share of the attention to slots that each slot gets, compared with an even share, which is not seen: blue "
        "less, orange more, × none.",
        "Stage 2. One row per token: how much it reads of each slot; the rest of its attention goes to near tokens.",
        "weight",
        "even",
    ),
}


def shown_profile(frame: pd.DataFrame, part: str) -> pd.DataFrame:
    """The profile over steps as it is drawn: of what slots read 1 minus the entropy, else as stored."""
    return frame.assign(value=1 - frame["value"]) if part == "read" else frame


def parts_of(kind: str) -> tuple[str, ...]:
    """Names of the parts of a kind of latent attention, in the order of the page."""
    return ("kv", "q") if kind == "mla" else ("read", "write")


def where_words(info: LatentInfo, step: int, tokens: int) -> str:
    """Which latents these are, how large, and from how many tokens their numbers come."""
    seen = f"step {step:,}, {tokens:,} tokens"
    if info.kind == "two-stage":
        return f"Block {info.layer}: {info.width} slots of each key head, {info.num_heads} heads; {seen}."
    few = (
        " Fewer than ten tokens for each number: ranks look lower than they are; raise --latent-tokens."
        if tokens < 10 * info.width
        else ""
    )
    return f"Block {info.layer}: latents of {info.width} numbers for {info.num_heads} heads; {seen}.{few}"


def numbers(metrics: pd.DataFrame, info: LatentInfo, step: int) -> list[tuple[str, str, str]]:
    """(name, value, how to read it) of a block at a step, the most telling first.

    Args:
        metrics: step, layer, name, value.
    """
    here = metrics[(metrics["layer"] == info.layer) & (metrics["step"] == step)]
    values = dict(zip(here["name"], here["value"], strict=True))
    return [
        (by_id(name).name, _shown(name, values[name], info.width), by_id(name).how_to_read)
        for name in TELLING[info.kind]
        if name in values
    ]


def _shown(name: str, value: float, width: int) -> str:
    unit = by_id(name).unit
    if unit.startswith("fraction"):
        return f"{value:.0%}"
    whole = name in ("latent_dim90", "latent_dead")
    of = f" of {width}" if unit in ("dimensions", "slots") else ""
    return (
        f"{value:.0f}{of}"
        if whole
        else f"{value:.1f}{of}"
        if value >= 1 or value == 0
        else f"{value:.2f}{of}"
    )


def has_none(info: ModelInfo) -> tuple[str, str]:
    """(what is missing, the next command) when nothing was recorded up to this step."""
    if info.latents:
        return (
            "No latents were recorded up to this step: they are recorded every n steps",
            "moeviz train --preset demo-mla --log-routing --latent-every 10",
        )
    return (
        "The attention of this model has no latents: it keeps the keys and values of every head",
        "moeviz train --preset demo-mla --log-routing     # multi-head latent attention, as in DeepSeek-V3\n"
        "moeviz train --preset demo-slots --log-routing   # two stages: slots read tokens, tokens read slots",
    )
