"""`moeviz snapshot`: what was true around one step, for the question "what happened there?"."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from moeviz.errors import MoevizError

if TYPE_CHECKING:
    import pandas as pd

    from moeviz.store.reader import Store

_RANKED_BY = "load_entropy"
"""The layers with the lowest value of this metric are the worst."""
_SHOWN_METRICS = (
    "load_entropy",
    "n_eff",
    "maxvio_batch",
    "min_load",
    "n_starved",
    "n_dead",
    "route_entropy",
    "lse_rms",
)
_SHOWN_LAYERS = 5


@dataclass(frozen=True, kw_only=True)
class SnapshotArguments:
    """Tell what was true around one step: scalars, the worst layers, alerts, events."""

    run: Positional[str | None] = None
    """Run folder, or its name under ./runs; the newest run when left out."""
    around: int | None = None
    """The step; the newest when left out."""
    window: int = 50
    """Steps before and after it that are looked at."""
    json: bool = False
    """Print JSON instead of text: all layers and all metrics."""


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(
        SnapshotArguments, args=argv, prog="moeviz snapshot", config=(tyro.conf.FlagCreatePairsOff,)
    )
    if arguments.window < 0:
        raise MoevizError(f"window={arguments.window} is negative; 50 is usual")
    from moeviz.store.catalog import resolve_run
    from moeviz.store.reader import open_run

    with open_run(resolve_run(arguments.run)) as store:
        facts = gather(store, arguments.around, arguments.window)
    if arguments.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        _print(facts)
    return 0


def gather(store: Store, around: int | None, window: int) -> dict[str, Any]:
    """Everything about the window, as plain data: numbers at the step, before and after it.

    Raises:
        MoevizError: no step was recorded in the window.
    """
    from moeviz.store import queries

    newest = queries.last_step(store)
    step = newest if around is None else around
    if newest is None or step is None:
        raise MoevizError(f"{store.info.name} has recorded no step yet")
    first, last = max(0, step - window), step + window
    scalars = queries.scalars_around(store, step, first, last)
    metrics = queries.metrics_around(store, step, first, last)
    if scalars.empty and metrics.empty:
        raise MoevizError(f"nothing was recorded in steps {first} to {last}; the newest step is {newest}")
    events = queries.events(store)
    events = events[events["step"].between(first, last)]
    return {
        "name": store.info.name,
        "step": step,
        "first": first,
        "last": min(last, newest),
        "scalars": _rows(scalars),
        "stability": _stability(store, step),
        "worst_layers": _worst_layers(metrics),
        "metrics": _rows(metrics),
        "alerts": [asdict(alert) for alert in queries.alerts_around(store, first, last)],
        "transitions": [asdict(alert) for alert in queries.alert_transitions(store, first, last)],
        "events": [{**row, "detail": json.loads(row["detail"])} for row in _rows(events)],
    }


def _stability(store: Store, step: int) -> dict[str, float | None]:
    """How spiky loss and gradient norm have been from the start to this step, and how often gradients were clipped.

    None where there are not yet enough steps, or where the run's configuration names no clipping norm.
    """
    from moeviz.metrics import gradients
    from moeviz.store.queries import scalar_values

    norms = scalar_values(store, "grad_norm", step)
    optim = store.info.config.get("optim")
    clip = optim.get("grad_clip") if isinstance(optim, Mapping) else None
    found = {
        "spike_score/loss": gradients.spike_score(scalar_values(store, "loss", step)),
        "spike_score/grad_norm": gradients.spike_score(norms),
        "clip_frac": gradients.clip_frac(norms, float(clip)) if clip and len(norms) else math.nan,
    }
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain data, with None for what is missing or no number."""
    columns = frame.astype(object).where(frame.notna(), None)
    return [{str(name): _plain(value) for name, value in row.items()} for row in columns.to_dict("records")]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _worst_layers(metrics: pd.DataFrame) -> list[int]:
    """Layers by rising evenness of their load at the step, the most concentrated first."""
    ranked = metrics[(metrics["name"] == _RANKED_BY) & metrics["layer"].notna()]
    return [int(layer) for layer in ranked.sort_values(["value", "layer"])["layer"]]


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console

    from moeviz.alerts import alert_line
    from moeviz.records import AlertRecord

    console = Console()
    console.print(
        f"[bold]{facts['name']}[/]  step {facts['step']:,}, looking at steps {facts['first']:,} to {facts['last']:,}\n"
    )
    if facts["scalars"]:
        whole = [row for row in facts["scalars"] if "/" not in row["name"]]
        console.print(_scalar_table(whole or facts["scalars"]))
        parts = Counter(row["name"].partition("/")[0] for row in facts["scalars"] if "/" in row["name"])
        if whole and parts:
            said = ", ".join(f"{name}/… ({count})" for name, count in parts.items())
            console.print(f"[dim]with --json also: {said}[/]")
        console.print()
    known = {name: value for name, value in facts["stability"].items() if value is not None}
    if known:
        said = ", ".join(f"{name} {value:.2%}" for name, value in known.items())
        console.print(f"[bold]Stability[/], all steps up to here: {said}\n")
    if facts["worst_layers"]:
        console.print(_layer_table(facts), "")
    for title, alerts in (("open at some time in the window", "alerts"), ("what changed", "transitions")):
        console.print(f"[bold]Alerts[/], {title}: {len(facts[alerts]) or 'none'}")
        for alert in facts[alerts]:
            console.print("  " + alert_line(AlertRecord(**alert)), markup=False, highlight=False)
    console.print(f"[bold]Events[/]: {len(facts['events']) or 'none'}")
    for event in facts["events"]:
        detail = ", ".join(f"{name}={value}" for name, value in event["detail"].items())
        console.print(f"  step {event['step']}  {event['kind']}  {detail}", markup=False, highlight=False)


def _scalar_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None)
    for title in ("scalar", "step", "value", "mean before", "mean after", "lowest", "highest"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        numbers = [_number(row[name]) for name in ("value", "before", "after", "lowest", "highest")]
        table.add_row(row["name"], str(row["at_step"]), *numbers)
    return table


def _layer_table(facts: dict[str, Any]) -> Any:
    from rich.table import Table

    at = {(row["name"], row["layer"]): row["value"] for row in facts["metrics"]}
    names = [name for name in _SHOWN_METRICS if any(key[0] == name for key in at)]
    table = Table("worst layers", *names, box=None)
    for layer in facts["worst_layers"][:_SHOWN_LAYERS]:
        table.add_row(str(layer), *[_number(at.get((name, layer))) for name in names])
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
