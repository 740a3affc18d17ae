"""`moeviz show`: one page about one run: shape and state, the loads as a picture, numbers, alerts."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from moeviz.commands.alerts import alert_list
from moeviz.commands.runs import STATE_MARKS, STATE_STYLES, age
from moeviz.errors import MoevizError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeviz.store.reader import Store

_SHOWN_SCALARS = ("loss", "lr", "grad_norm", "tokens_per_second")
_SPARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class ShowArguments:
    """Summarise one run: shape, state, loads, metrics, alerts."""

    run: Positional[str | None] = None
    """Run folder, or its name under ./runs; the newest run when left out."""
    step: int | None = None
    """Step whose loads are shown; the newest when left out."""
    json: bool = False
    """Print JSON instead of a page."""


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(ShowArguments, args=argv, prog="moeviz show", config=(tyro.conf.FlagCreatePairsOff,))
    from moeviz.store.catalog import resolve_run
    from moeviz.store.reader import open_run

    with open_run(resolve_run(arguments.run)) as store:
        facts = gather(store, arguments.step)
        if arguments.json:
            print(json.dumps(facts, indent=2, default=str))
        else:
            _print_page(store, facts)
    return 0


def gather(store: Store, step: int | None = None) -> dict[str, Any]:
    """Everything the page says, as plain data.

    Raises:
        MoevizError: `step` was not recorded.
    """
    from moeviz.store import queries

    info, newest = store.info, queries.last_step(store)
    last_ts, interval = queries.step_rhythm(store)
    ending = queries.end_status(store)
    at = newest if step is None else step
    layers = _layers(store, at) if at is not None else []
    if step is not None and not layers:
        known = queries.step_range(store)
        raise MoevizError(
            f"step {step} was not recorded; "
            + (f"steps {known[0]} to {known[1]} were" if known else "no step was, yet")
        )
    series = queries.scalars(store, points=40)
    return {
        "name": info.name,
        "path": str(store.path),
        "state": queries.run_state(last_ts, interval, ending is not None, time.time()),
        "ending": ending or None,
        "created": info.created,
        "family": info.model.family,
        "num_parameters": info.model.num_parameters,
        "moe_layers": info.model.num_layers,
        "experts": sorted({layer.num_experts for layer in info.model.layers}),
        "top_k": sorted({layer.top_k for layer in info.model.layers}),
        "last_step": newest,
        "planned_steps": info.planned_steps,
        "attempts": len(info.attempts),
        "packed": info.packed,
        "step": at,
        "layers": layers,
        "scalars": {
            str(name): {"step": one["step"].tolist(), "value": one["value"].tolist()}
            for name, one in series.groupby("name")
        },
        "alerts": [asdict(alert) for alert in queries.alert_records(store)],
        "dropped_samples": queries.dropped_samples(store),
        "sampling_level": queries.sampling_level(store),
        "notes": store.notes,
    }


def _layers(store: Store, step: int) -> list[dict[str, Any]]:
    """Balance of each layer at one step."""
    from moeviz.metrics import load
    from moeviz.store.queries import load_history, load_matrix

    tokens = {row.layer: row for row in load_history(store, step, step).itertuples()}
    rows = []
    for layer, one in load_matrix(store, step).groupby("layer"):
        share_E = load.load_share(one["count"].to_numpy())
        record = tokens[layer]
        rows.append(
            {
                "layer": int(layer),
                "tokens": int(record.tokens),
                "load_rel": np.round(load.load_rel(share_E), 4).tolist(),
                "load_entropy": float(load.load_entropy(share_E)),
                "route_entropy": float(record.entropy_nats) / float(np.log(max(len(share_E), 2))),
                "n_eff": float(load.n_eff(share_E)),
                "max_load": float(load.load_imbalance(share_E)),
                "max_expert": int(share_E.argmax()),
                "drop_rate": float(record.dropped) / max(int(one["count"].sum()), 1),
            }
        )
    return rows


def _print_page(store: Store, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.rule import Rule

    from moeviz.commands.heatmap import heatmap
    from moeviz.store.queries import alert_records

    console = Console()
    console.print(_header(facts))
    if facts["layers"]:
        console.print()
        console.print(Rule(f"[bold]expert load[/] · step {facts['step']:,}", align="left", style="dim"))
        tops = {layer.layer: layer.top_k for layer in store.info.model.layers}
        console.print(
            heatmap(facts["layers"], tops, width=console.width, color=console.color_system is not None)
        )
    if facts["scalars"]:
        console.print()
        console.print(Rule("[bold]numbers[/]", align="left", style="dim"))
        console.print(Padding(_scalars(facts["scalars"]), (0, 1)))
        if any("/" in name for name in facts["scalars"]):
            console.print()
            console.print(Rule("[bold]numbers by domain[/]", align="left", style="dim"))
            console.print(Padding(_scalars_by_domain(facts["scalars"]), (0, 1)))
    console.print()
    alerts = alert_records(store)
    still_open = [alert for alert in alerts if alert.cleared_step is None]
    title = f"[bold]alerts[/] · {len(still_open)} open, {len(alerts) - len(still_open)} cleared"
    console.print(Rule(title, align="left", style="dim"))
    if still_open:
        console.print(Padding(alert_list(still_open), (0, 1)))
    for note in facts["notes"]:
        console.print(f" ! {note}", style="yellow", markup=False)


def _header(facts: dict[str, Any]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    state = facts["state"]
    title = Text(f" {facts['name']}", style="bold")
    ending = f" ({facts['ending']})" if facts["ending"] not in (None, "finished") else ""
    style = "bold red" if facts["ending"] == "failed" else STATE_STYLES[state]
    title.append(f"  {STATE_MARKS[state]} {state}{ending}", style=style)
    if facts["last_step"] is not None:
        title.append(f"  step {facts['last_step']:,}")
        if facts["planned_steps"]:
            title.append(f" of {facts['planned_steps']:,}", "dim")
            title.append(f"  {_bar((facts['last_step'] + 1) / facts['planned_steps'])}", "cyan")
    shape = f" {facts['family']} · {facts['num_parameters'] / 1e6:,.1f} M parameters · "
    shape += (
        f"{facts['moe_layers']} MoE layers x {_span(facts['experts'])} experts, top-{_span(facts['top_k'])}"
    )
    details = [f"created {age(facts['created'])}", "packed" if facts["packed"] else "segments"]
    if facts["attempts"] > 1:
        details.append(f"resumed {facts['attempts'] - 1} x")
    if facts["dropped_samples"]:
        details.append(f"{facts['dropped_samples']:,} samples dropped")
    if facts["sampling_level"]:
        details.append(f"sampling thinned to 1/{2 ** facts['sampling_level']:,} by its budget")
    grid = Table.grid()
    grid.add_row(title)
    grid.add_row(Text(shape))
    grid.add_row(Text(f" {facts['path']} · {' · '.join(details)}", style="dim"))
    return grid


def _scalars(scalars: dict[str, dict[str, list[float]]]) -> RenderableType:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    for column, width in enumerate((18, 9, 8, 20)):
        grid.add_column(no_wrap=True, justify="right" if column == 1 else "left", min_width=width)
    first = [name for name in _SHOWN_SCALARS if name in scalars]
    rest = sorted(name for name in set(scalars) - set(first) if "/" not in name)
    for name in [*first, *rest]:
        values = scalars[name]["value"]
        low, high = np.nanmin(values), np.nanmax(values)
        grid.add_row(
            name,
            f"[bold]{_readable(values[-1])}[/bold]",
            f"[cyan]{spark(values)}[/cyan]",
            f"[dim]{_readable(low)} to {_readable(high)}[/dim]",
        )
    return grid


def _scalars_by_domain(scalars: dict[str, dict[str, list[float]]]) -> RenderableType:
    """Scalars named `QUANTITY/DOMAIN`: a row per domain, first and last value of each quantity."""
    from rich.table import Table

    quantities = sorted({name.partition("/")[0] for name in scalars if "/" in name}, reverse=True)
    domains = dict.fromkeys(name.partition("/")[2] for name in scalars if "/" in name)
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    grid.add_column("", no_wrap=True)
    for quantity in quantities:
        grid.add_column(quantity, justify="right", no_wrap=True)
    for domain in domains:
        cells = []
        for quantity in quantities:
            values = scalars.get(f"{quantity}/{domain}", {}).get("value", [])
            ends = f"[dim]{_readable(values[0])} →[/] [bold]{_readable(values[-1])}[/]" if values else ""
            cells.append(ends)
        grid.add_row(domain, *cells)
    return grid


def spark(values: list[float]) -> str:
    """A line of eighth blocks; a gap where a value is not finite."""
    array = np.asarray(values, dtype=float)
    finite = np.isfinite(array)
    if not finite.any():
        return " " * len(array)
    low, high = array[finite].min(), array[finite].max()
    level = np.zeros(len(array), dtype=int)
    level[finite] = np.rint((array[finite] - low) / (high - low or 1) * (len(_SPARKS) - 1)).astype(int)
    return "".join(_SPARKS[at] if ok else " " for at, ok in zip(level, finite, strict=True))


def _readable(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _bar(fraction: float, width: int = 24) -> str:
    done = round(max(0.0, min(1.0, fraction)) * width)
    return "━" * done + "┈" * (width - done) + f" {fraction:.0%}"


def _span(values: list[int]) -> str:
    """`8`, or `8 to 64` where layers differ."""
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}" if values else "?"
