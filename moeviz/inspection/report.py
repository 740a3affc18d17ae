"""The terminal's view of a traced run: a row per token, a column per layer, experts coloured by how often they serve.

Everything printed is read back from the run folder, so the table and the dashboards cannot disagree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeviz.colors import EXPERT_HUES
from moeviz.errors import MoevizError
from moeviz.inspection.checkpoint import OpenedCheckpoint
from moeviz.records import ModelInfo
from moeviz.store.queries import TraceArrays, load_matrix, sequences, trace_arrays
from moeviz.store.reader import Store

NUM_HUES = 7
"""Experts of a layer with a hue of their own; the rest is grey."""


def print_report(store: Store, checkpoint: OpenedCheckpoint, layers: Sequence[int] = ()) -> None:
    """Print every traced sequence and a summary of the loads.

    Args:
        store: the run that `trace` made.
        checkpoint: what was traced.
        layers: MoE layers to print; empty: as many as fit, evenly chosen.
    """
    console = Console()
    info = store.info.model
    _print_header(console, checkpoint, info)
    for trace in _traces(store):
        shown = _columns(console, trace, layers)
        console.print(_token_table(trace, shown))
        if len(shown) < len(trace.layers_L):
            console.print(
                f"[dim]{len(shown)} of {len(trace.layers_L)} layers fit; --layers 3 7 chooses, all are in the run[/]"
            )
    console.print(_load_table(store, info))
    console.print(
        f"\nKept as a run: [bold]{store.path}[/]\n"
        f"  moeviz tui {store.path}     moeviz dash {store.path}\n"
        f'  moeviz query {store.path} "SELECT layer, pos, slot, expert, weight FROM decisions LIMIT 10"'
    )


def print_json(store: Store, layers: Sequence[int] = ()) -> None:
    """Print one JSON object per token and layer: seq, label, pos, token_id, text, layer, experts, weights, loss."""
    for number, trace in enumerate(_traces(store)):
        for at in _chosen(trace, layers):
            for pos, text in enumerate(trace.texts):
                kept = trace.experts_LSK[at, pos] >= 0
                row = {
                    "seq": number,
                    "label": trace.domain,
                    "pos": pos,
                    "token_id": int(trace.token_ids_S[pos]),
                    "text": text,
                    "layer": int(trace.layers_L[at]),
                    "experts": trace.experts_LSK[at, pos][kept].tolist(),
                    "weights": [round(float(w), 4) for w in trace.weights_LSK[at, pos][kept]],
                    "loss": None if np.isnan(trace.loss_S[pos]) else round(float(trace.loss_S[pos]), 5),
                }
                sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


def _traces(store: Store) -> Iterator[TraceArrays]:
    found = sequences(store, last=1_000_000).sort_values(["step", "seq"])
    for row in found.itertuples():
        yield trace_arrays(store, int(row.step), int(row.seq), int(row.rank))


def _print_header(console: Console, checkpoint: OpenedCheckpoint, info: ModelInfo) -> None:
    experts = sorted({(layer.num_experts, layer.top_k) for layer in info.layers})
    shape = ", ".join(f"{e} experts top-{k}" for e, k in experts)
    step = "" if checkpoint.step is None else f", {checkpoint.step:,} steps trained".replace(",", " ")
    console.print(
        f"[bold]{checkpoint.name}[/]  {info.family}{step}\n"
        f"{len(info.layers)} MoE layers, {shape}; {info.num_parameters / 1e6:.2f} M parameters\n"
    )


def _chosen(trace: TraceArrays, layers: Sequence[int]) -> list[int]:
    """Positions on the layer axis of the layers asked for; all without a wish."""
    if not layers:
        return list(range(len(trace.layers_L)))
    known = {int(layer): at for at, layer in enumerate(trace.layers_L)}
    for layer in layers:
        if layer not in known:
            raise MoevizError(
                f"--layers {layer}: the model has MoE layers {min(known)} to {max(known)}; choose of these"
            )
    return [known[layer] for layer in layers]


def _columns(console: Console, trace: TraceArrays, layers: Sequence[int]) -> list[int]:
    """Layers to print: those asked for, else all or an even choice that fits the terminal."""
    chosen = _chosen(trace, layers)
    if layers:
        return chosen
    width = 8 * trace.experts_LSK.shape[2] + 2
    room = max(1, (console.width - 30) // width)
    if len(chosen) <= room:
        return chosen
    return sorted({chosen[round(at)] for at in np.linspace(0, len(chosen) - 1, room)})


def _token_table(trace: TraceArrays, shown: Sequence[int]) -> Table:
    table = Table(title=trace.domain, title_justify="left", header_style="bold", box=None, pad_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("token")
    table.add_column("loss", justify="right", style="dim")
    for at in shown:
        table.add_column(f"layer {trace.layers_L[at]}")
    hues = [_hues(trace.experts_LSK[at]) for at in shown]
    for pos, text in enumerate(trace.texts):
        loss = trace.loss_S[pos]
        cells = [
            _experts_cell(trace.experts_LSK[at, pos], trace.weights_LSK[at, pos], hue)
            for at, hue in zip(shown, hues, strict=True)
        ]
        table.add_row(str(pos), _visible(text), "" if np.isnan(loss) else f"{loss:.2f}", *cells)
    return table


def _hues(experts_SK: np.ndarray) -> dict[int, str]:
    """A colour for each of the layer's most frequent first choices."""
    experts, counts = np.unique(experts_SK[:, 0][experts_SK[:, 0] >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:NUM_HUES]
    return {int(experts[at]): EXPERT_HUES[rank] for rank, at in enumerate(order)}


def _experts_cell(experts_K: np.ndarray, weights_K: np.ndarray, hues: dict[int, str]) -> Text:
    cell = Text()
    for expert, weight in zip(experts_K, weights_K, strict=True):
        if expert < 0:
            continue
        dropped = weight == 0
        style = "dim strike" if dropped else hues.get(int(expert), "grey62")
        cell.append(f"{expert:>3}", style=style)
        cell.append(f" {weight:.2f} " if not dropped else " drop ", style="dim")
    return cell


def _visible(text: str) -> str:
    """A token with its spaces and line ends made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _load_table(store: Store, info: ModelInfo) -> Table:
    table = Table(
        title="\nloads of this text", title_justify="left", header_style="bold", box=None, pad_edge=False
    )
    for heading in ("layer", "experts in use", "busiest", "share of tokens"):
        table.add_column(heading, justify="right")
    loads = load_matrix(store)
    for layer in info.layers:
        mine = loads[loads["layer"] == layer.layer]
        top = mine.loc[mine["count"].idxmax()]
        used = int((mine["count"] > 0).sum())
        table.add_row(
            str(layer.layer),
            f"{used} of {layer.num_experts}",
            f"expert {int(top['expert'])}",
            f"{float(top['share']) * layer.top_k:.0%}",
        )
    return table
