"""The runs of a folder. The store is imported in a thread, when a run is opened: the first screen does not wait."""

from __future__ import annotations

from pathlib import Path

from tui.archive import RunRow, Source


class FolderLibrary:
    """Implements `tui.archive.Library` over a folder of runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def runs(self) -> list[RunRow]:
        from tui.store_source import list_rows

        return list_rows(self._folder)

    def open(self, path: Path) -> Source:
        """Open a run. Raises: RunNotFoundError, CorruptRunError."""
        from tui.store_source import open_source

        return open_source(path)
