"""An analysis as a page in the terminal: layers in a table, experts with what they are for, nulls beside the values.

What chance explains is dimmed, never left out without a word.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeviz.inspection.checkpoint import OpenedCheckpoint
from moeviz.inspection.probe_batch import ProbeBatch
from moeviz.metrics import GROUPS
from moeviz.records import AnalysisValue

_LAYER_NAMES = (
    "load_entropy",
    "nmi_domain",
    "mi_token",
    "mi_pos",
    "mi_domain",
    "mi_domain_given_token",
    "vocab_spec_layer",
    "expert_token_entropy",
)
_BETWEEN = (
    "repeat_first",
    "repeat_any",
    "mi_layer",
    "router_cos",
    "expert_w_cos",
    "linear_cka",
    "pes",
    "coupling",
    "rc",
    "coact_lift_max",
)
_DECISIONS = ("margin12", "gate_eff", "gate_mass", "logit_rms", "logit_max", "router_norm", "aux_seq")
_CHANGE = ("saturation", "churn", "flip1", "probe_drift", "router_update_ratio", "last_fluctuation")
_CELL_WIDTH = 25
_EXPERTS = 4
"""Experts of a layer on the page; all are in the run."""


def print_findings_json(values: Sequence[AnalysisValue]) -> None:
    """One JSON object per value; NaN is null, `hidden` says that chance explains it."""
    for value in values:
        row = {
            name: None if isinstance(each, float) and not math.isfinite(each) else each
            for name, each in asdict(value).items()
        }
        sys.stdout.write(json.dumps({**row, "hidden": value.hidden}, ensure_ascii=False) + "\n")


def print_findings(
    values: Sequence[AnalysisValue], checkpoint: OpenedCheckpoint, probe: ProbeBatch, run: Path
) -> None:
    """Print summary, experts and heads, and where everything is kept."""
    console = Console(highlight=False)
    sequences = len(probe.domains)
    console.print(
        f"[bold]{checkpoint.name}[/]  probe of {probe.num_tokens:,} tokens in {sequences} sequences: "
        f"{', '.join(probe.names)}\n"
        "value (null ± sd); [dim]dim: chance explains it[/]. Routing follows syntax and vocabulary more than topics.\n"
    )
    for title, names, by in (
        ("layers", _LAYER_NAMES, ("",)),
        ("vocabulary by the token that is ...", ("vocab_spec_layer",), ("next token", "predicted token")),
        ("between tokens, layers and experts", _BETWEEN, ("",)),
        ("decisions", _DECISIONS, ("",)),
        ("since another checkpoint", _CHANGE, ()),
    ):
        _print_layers(console, values, title, names, by)
    console.print(_expert_table(values))
    heads = _head_table(values)
    if heads is not None:
        console.print(heads)
    latents = _latent_table(values)
    if latents is not None:
        console.print(latents)
    console.print(
        f"\nKept as a run: [bold]{run}[/]\n  moeviz dash {run}\n"
        f'  moeviz query {run} "SELECT layer, unit, name, label, value, null_mean, null_sd FROM analysis"'
    )


def cell(value: AnalysisValue) -> Text:
    """A value with its null."""
    text = Text(_number(value.value))
    if not math.isnan(value.null_mean):
        spread = "" if math.isnan(value.null_sd) else f" ± {_number(value.null_sd)}"
        text.append(f" ({_number(value.null_mean)}{spread})", style="dim")
    if value.hidden:
        text.stylize("dim")
    return text


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.0e}"


def _print_layers(
    console: Console, values: Sequence[AnalysisValue], title: str, names: Sequence[str], by: Sequence[str]
) -> None:
    """A row per layer and label, a column per quantity; as many tables as the width asks for.

    Args:
        by: labels to print; empty: all.
    """
    found = {
        (each.layer, each.label, each.name): each
        for each in values
        if each.part == "layer" and each.name in names and (not by or each.label in by)
    }
    shown = [name for name in names if any(at[2] == name for at in found)]
    labels = any(label for _, label, _ in found)
    room = max(1, (console.width - 6) // _CELL_WIDTH)
    for first in range(0, len(shown), room):
        table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
        table.add_column("layer", justify="right")
        if labels:
            table.add_column("by", no_wrap=True)
        for name in shown[first : first + room]:
            table.add_column(name, justify="right", no_wrap=True)
        for layer, label in dict.fromkeys((layer, label) for layer, label, _ in found):
            cells = (found.get((layer, label, name)) for name in shown[first : first + room])
            texts = (Text("") if each is None else cell(each) for each in cells)
            table.add_row(str(layer), *([label] if labels else []), *texts)
        console.print(table)
        title = ""


def _expert_table(values: Sequence[AnalysisValue]) -> Table:
    """The experts of every layer that stand out most in a domain, with their tokens and their worth."""
    table = Table(
        title="\nexperts that stand out", title_justify="left", header_style="bold", box=None, pad_edge=False
    )
    for heading in ("layer", "expert", "share", "domain", "tokens", "without it"):
        left = heading in ("domain", "tokens")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading == "domain")
    experts = [each for each in values if each.part == "expert"]
    for layer in sorted({each.layer for each in experts}):
        mine = [each for each in experts if each.layer == layer]
        for expert in _most_special(mine):
            own = [each for each in mine if each.index == expert]
            table.add_row(str(layer), str(expert), *_card(own))
    return table


def _latent_table(values: Sequence[AnalysisValue]) -> Table | None:
    """What the latents of every block add up to; None for a model without latents."""
    ids = [metric.id for metric in GROUPS["latent attention"]]
    found = {(each.layer, each.name): each for each in values if each.part == "head" and each.name in ids}
    if not found:
        return None
    table = Table(
        title="\nlatents of attention", title_justify="left", header_style="bold", box=None, pad_edge=False
    )
    blocks = sorted({block for block, _ in found})
    table.add_column("quantity", no_wrap=True)
    for block in blocks:
        table.add_column(f"block {block}", justify="right", no_wrap=True)
    for name in (name for name in ids if any(at[1] == name for at in found)):
        cells = (found.get((block, name)) for block in blocks)
        table.add_row(name, *(Text("") if each is None else cell(each) for each in cells))
    return table


def _most_special(values: Sequence[AnalysisValue]) -> list[int]:
    best: dict[int, float] = {}
    for value in values:
        if value.name in ("domain_spec", "vocab_spec") and not value.hidden:
            best[value.index] = max(best.get(value.index, 0.0), value.value - value.null_mean)
    return sorted(best, key=lambda expert: -best[expert])[:_EXPERTS]


def _card(values: Sequence[AnalysisValue]) -> list[Text]:
    share = next(each for each in values if each.name == "share")
    special = [each for each in values if each.name == "domain_spec"]
    domain = max(special, key=lambda each: each.value - each.null_mean, default=None)
    tokens = " ".join(repr(each.label) for each in values if each.name == "vocab_spec")
    losses = [each for each in values if each.name.startswith("knockout_") and each.label == "all"]
    worth = Text(", ").join(
        Text(f"{each.name.removeprefix('knockout_')} ").append(_signed(each)) for each in losses
    )
    about = Text("") if domain is None else Text(f"{domain.label} ").append(cell(domain))
    return [Text(f"{share.value:.1%}"), about, Text(tokens), worth]


def _signed(value: AnalysisValue) -> Text:
    """A change of the loss with its standard error; dim within two of them."""
    text = Text(f"{value.value:+.3f} ± {value.null_sd:.3f}")
    if abs(value.value) <= 2 * value.null_sd:
        text.stylize("dim")
    return text


def _head_table(values: Sequence[AnalysisValue]) -> Table | None:
    """For every kind of head the one that does it most."""
    kinds = ("induction", "duplicate", "prev_token", "sink_mass", "attn_entropy", "attn_distance")
    table = Table(
        title="\nheads that do it most", title_justify="left", header_style="bold", box=None, pad_edge=False
    )
    for heading in ("what", "block", "head", "value"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for kind in kinds:
        mine = [each for each in values if each.part == "head" and each.name == kind]
        if mine:
            top = max(mine, key=lambda each: each.value)
            table.add_row(kind, str(top.layer), str(top.index), _number(top.value))
    return table if table.row_count else None
