"""`moeviz tui`: watch a run in the terminal, or print what the first screen shows and leave."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from moeviz.errors import MoevizError, require

if TYPE_CHECKING:
    from moeviz.live import Snapshot


@dataclass(frozen=True, kw_only=True)
class TuiArguments:
    """Watch a run in the terminal, live or afterwards.

    Six screens: overview, layer, flow, tokens, alerts, runs. Press ? for the keys. Where there is no terminal (a
    pipe, a job's log) the first screen is printed once instead.
    """

    run: Positional[str | None] = None
    """Run folder, or its name under the runs folder; the newest run when left out."""
    runs: Path = Path("runs")
    """Folder that holds run folders."""
    once: bool = False
    """Print the overview and leave."""
    plain: bool = False
    """Print it without colours, a glyph per expert."""
    json: bool = False
    """Print it as JSON."""
    ascii: bool = False
    """Draw with 7-bit characters only."""
    theme: Literal["dark", "light"] = "dark"
    """Colours for a dark or a light terminal."""
    fps: float = 2.0
    """Refreshes a second, at most 10."""
    exit_when_ended: bool = False
    """Leave by itself some seconds after the run ended, unless a key was pressed."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.fps <= 10:
            raise MoevizError(f"fps={self.fps} is not between 0.1 and 10; 2 is the default")


def main(argv: list[str]) -> int:
    import tyro

    arguments = tyro.cli(TuiArguments, args=argv, prog="moeviz tui", config=(tyro.conf.FlagCreatePairsOff,))
    path = _find(arguments.run, arguments.runs)
    if arguments.json or arguments.plain or arguments.once or not can_draw():
        return _print_once(path, arguments)
    require("textual", "tui", "the terminal view")
    return _watch(path, arguments)


def _find(run: str | None, folder: Path) -> Path:
    """The run folder. A path that is one is taken as it is: the store's imports would delay the first screen."""
    path = Path(run).expanduser() if run is not None else None
    if path is None or not (path / "run.json").exists():
        from moeviz.store.catalog import resolve_run

        path = resolve_run(run, folder)
    return path if path.name else path.resolve()


def can_draw() -> bool:
    """Whether there is a terminal. Textual draws on stderr and reads keys from stdin, whatever stdout is."""
    streams = (sys.__stdin__, sys.__stderr__)
    return all(stream is not None and stream.isatty() for stream in streams)


def _watch(path: Path, arguments: TuiArguments) -> int:
    from tui.app import MoevizApp
    from tui.ink import Ink
    from tui.library import FolderLibrary

    app = MoevizApp(
        FolderLibrary(path.parent),
        run_path=str(path),
        ink=Ink(theme=arguments.theme, ascii=arguments.ascii, color="NO_COLOR" not in os.environ),
        fps=arguments.fps,
        exit_when_ended=arguments.exit_when_ended,
    )
    app.run()
    return app.return_code or 0


def _print_once(path: Path, arguments: TuiArguments) -> int:
    from moeviz.store.feed import RunFeed

    feed = RunFeed(path)
    try:
        snapshot = feed.poll()
    finally:
        feed.stop()
    if arguments.json:
        from tui.once import snapshot_json

        print(json.dumps(snapshot_json(snapshot), indent=2, ensure_ascii=False))
    else:
        _print_overview(snapshot, arguments)
    return 0


def _print_overview(snapshot: Snapshot, arguments: TuiArguments) -> None:
    from rich.console import Console
    from rich.segment import Segment, Segments

    from tui.ink import Ink
    from tui.lines import text_of
    from tui.once import overview_rows

    color = sys.stdout.isatty() and not arguments.plain and "NO_COLOR" not in os.environ
    ink = Ink(theme=arguments.theme, ascii=arguments.ascii, color=color)
    rows = overview_rows(snapshot, ink, shutil.get_terminal_size((100, 40)).columns)
    if not color:
        print(text_of(rows))
        return
    segments = [segment for row in rows for segment in (*row, Segment.line())]
    Console(color_system="truecolor" if _truecolor() else "auto").print(Segments(segments), end="")


def _truecolor() -> bool:
    return os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
