"""`moeviz presets`: the models to start from, with counts that are computed and not remembered."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tyro.conf import FlagCreatePairsOff

if TYPE_CHECKING:
    from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PresetsArguments:
    """List the models that `moeviz train --preset NAME` starts from: parameters, active parameters, FLOPs a token.

    Below them stand published models at full size, counted by the same formulas, beside what their authors state.
    """

    seq_len: int | None = None
    """Count the FLOPs of attention at this length (default: the longest sequence of each model)."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class PresetRow:
    """One model, counted."""

    name: str
    parameters: int
    active_parameters: int
    training_flops_per_token: float
    claimed_parameters: float | None
    claimed_active_parameters: float | None
    source: str | None
    published: bool
    about: str


def main(argv: list[str]) -> int:
    """Run the command. Returns 0."""
    import tyro

    arguments = tyro.cli(PresetsArguments, args=argv, prog="moeviz presets", config=(FlagCreatePairsOff,))
    rows = preset_rows(arguments.seq_len)
    if arguments.json:
        import json

        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _print_table(rows)
    return 0


def preset_rows(seq_len: int | None = None) -> list[PresetRow]:
    """Every preset, then every published model, counted at `seq_len` tokens."""
    from model.presets import PRESETS
    from model.published import PUBLISHED

    rows = [
        _row(name, make(), seq_len, False, (make.__doc__ or "").split("\n")[0])
        for name, make in PRESETS.items()
    ]
    return rows + [_row(name, config, seq_len, True, "") for name, config in PUBLISHED.items()]


def _row(name: str, config: ModelConfig, seq_len: int | None, published: bool, about: str) -> PresetRow:
    from model.flops import training_flops
    from model.published import CLAIMS

    claim = CLAIMS.get(name)
    return PresetRow(
        name=name,
        parameters=config.num_parameters(),
        active_parameters=config.num_active_parameters(),
        training_flops_per_token=training_flops(config, seq_len),
        claimed_parameters=claim.parameters if claim else None,
        claimed_active_parameters=claim.active if claim else None,
        source=claim.source if claim else None,
        published=published,
        about=about,
    )


def _print_table(rows: list[PresetRow]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("preset", no_wrap=True)
    for title in ("parameters", "active", "training FLOPs/token", "claimed", "claimed active"):
        table.add_column(title, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = (row.parameters, row.active_parameters, row.training_flops_per_token)
        claims = (row.claimed_parameters, row.claimed_active_parameters)
        table.add_row(
            row.name,
            *(_short(cell) for cell in (*cells, *claims)),
            end_section=following is not None and following.published != row.published,
        )
    Console(highlight=False).print(table)
    print(
        "Active counts the input embedding, which some authors leave out. The lower part is counted, not trained."
    )
    print("moeviz train --preset NAME starts one; --preset depth-N computes a model from its depth.")


def _short(number: float | None) -> str:
    if number is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
