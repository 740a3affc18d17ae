"""`moeviz metrics`: what every quantity means, and where its definition comes from."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from difflib import get_close_matches

from tyro.conf import Positional

from moeviz.errors import MoevizError
from moeviz.metrics import GROUPS, METRICS, Metric, by_id


@dataclass(frozen=True, kw_only=True)
class MetricsArguments:
    """Explain the metrics: all of them in one table, or one in full."""

    name: Positional[str | None] = None
    """A metric's id, for example `maxvio_global`, or a name of the table analysis."""
    live: bool = False
    """Only those that a run records at every step."""
    json: bool = False
    """Print JSON instead of text."""
    markdown: bool = False
    """Print the documentation page (docs/metrics.md)."""


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(
        MetricsArguments, args=argv, prog="moeviz metrics", config=(tyro.conf.FlagCreatePairsOff,)
    )
    if arguments.markdown:
        _print_page(arguments)
        return 0
    if arguments.name is None:
        chosen = [metric for metric in METRICS if metric.live or not arguments.live]
    else:
        chosen = [_find(arguments.name)]
    if arguments.json:
        _print_json(chosen, one=arguments.name is not None)
    elif arguments.name is not None:
        _print_one(chosen[0])
    else:
        _print_table(chosen)
    return 0


def _print_page(arguments: MetricsArguments) -> None:
    if arguments.name is not None or arguments.live or arguments.json:
        raise MoevizError("--markdown prints the page of all metrics; give it alone")
    from moeviz.metrics.glossary.page import markdown_page

    sys.stdout.write(markdown_page())


def _find(name: str) -> Metric:
    """The metric with this id, or the one that is stored under this name."""
    stored = {own: metric for metric in METRICS for own in metric.analysis}
    try:
        return stored[name] if name in stored else by_id(name)
    except KeyError:
        near = get_close_matches(name, [metric.id for metric in METRICS], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`moeviz metrics` lists them"
        raise MoevizError(f"no metric is called {name!r}; {hint}") from None


def _print_json(metrics: list[Metric], *, one: bool) -> None:
    import json

    rows = [{**asdict(metric), "where": metric.places} for metric in metrics]
    print(json.dumps(rows[0] if one else rows, indent=2, ensure_ascii=False))


def _print_one(metric: Metric) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"{metric.id}  {metric.name}", style="bold"))
    for label, value in metric.facts.items():
        console.print(Text.assemble((f"  {label:<11}", "dim"), value))
    console.print(Text(f"\n{metric.how_to_read}"))


def _print_table(metrics: list[Metric]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=f"{len(metrics)} metrics, ● at every step", title_justify="left")
    for title in ("", "id", "name", "range", "when balanced or random"):
        table.add_column(title, no_wrap=title == "id")
    for group, members in GROUPS.items():
        rows = [metric for metric in members if metric in metrics]
        if rows:
            table.add_row("", Text(group, style="bold"))
        for metric in rows:
            mark = "●" if metric.live else ""
            cells = (mark, metric.id, metric.name, metric.range, metric.at_balance)
            table.add_row(*(Text(cell) for cell in cells), end_section=metric is rows[-1])
    Console(highlight=False).print(table)
    print("moeviz metrics ID explains one: formula, unit, source, how to read it.")
