"""`moeviz query`: any SQL over a run, read-only, as a table, CSV or JSON."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro
from tyro.conf import Positional

if TYPE_CHECKING:
    import pandas as pd

_WIDEST_CELL = 60
_MOST_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class QueryArguments:
    """Ask a run anything in SQL. Without SQL: the tables and their columns.

    moeviz query runs/mine "SELECT step, value FROM scalars WHERE name = 'loss' ORDER BY step DESC LIMIT 5"
    """

    run: Positional[str]
    """Run folder, its name under ./runs, or a folder of runs for its newest one."""
    sql: Positional[str] = ""
    """One SELECT, or - to read it from standard input."""
    format: Literal["table", "csv", "json"] = "table"
    """How to print the result; table cuts long lists and shows at most 200 rows."""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(QueryArguments, args=argv, prog="moeviz query")
    from moeviz.store.catalog import resolve_run
    from moeviz.store.reader import open_run

    sql = sys.stdin.read() if arguments.sql == "-" else arguments.sql
    with open_run(resolve_run(arguments.run)) as store:
        if not sql.strip():
            _print_schema()
            return 0
        most = _MOST_ROWS + 1 if arguments.format == "table" else None
        result = store.sql(sql, max_rows=most)
        for note in store.notes:
            print(f"moeviz query: {note}", file=sys.stderr)
    if arguments.format == "csv":
        result.map(_plain).to_csv(sys.stdout, index=False)
    elif arguments.format == "json":
        print(result.to_json(orient="records", indent=2))
    else:
        _print_table(result)
    return 0


def _plain(value: object) -> object:
    """Lists as lists: numpy prints arrays without commas and with an ellipsis."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _print_table(result: pd.DataFrame) -> None:
    import pandas as pd
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name, dtype in result.dtypes.items():
        table.add_column(str(name), justify="right" if pd.api.types.is_numeric_dtype(dtype) else "left")
    for row in result.head(_MOST_ROWS).itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    console = Console()
    console.print(table, markup=False)
    if len(result) > _MOST_ROWS:
        console.print(f"the first {_MOST_ROWS} rows; --format csv prints all", style="dim", markup=False)
    else:
        console.print(f"{len(result):,} rows", style="dim", markup=False)


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    text = f"{value:.6g}" if isinstance(value, float) else str(_plain(value))
    return text if len(text) <= _WIDEST_CELL else text[: _WIDEST_CELL - 1] + "…"


def _print_schema() -> None:
    from rich.console import Console
    from rich.table import Table

    from moeviz.store.listing import sql_type
    from moeviz.store.schema import TABLES, VOCAB_SCHEMA

    console = Console()
    for table in TABLES.values():
        console.print(f"\n[bold]{table.name}[/bold]  [dim]{table.doc}[/dim]")
        grid = Table.grid(padding=(0, 2))
        for column in table.columns:
            grid.add_row(
                "  " + column.name,
                f"[cyan]{sql_type(str(column.type))}[/cyan]".replace("[]", r"\[]"),
                column.doc,
            )
        console.print(grid)
    console.print("\n[bold]decisions[/bold]  [dim]routing with a row per (token, layer, slot)[/dim]")
    console.print("  step, rank, layer, seq, pos, slot, expert, weight")
    console.print(
        f"\n[bold]vocab[/bold]  [dim]text of each token id[/dim]\n  {', '.join(VOCAB_SCHEMA.names)}"
    )
