"""A run folder: what is in it, how one begins, how one is resumed.

    run/
      run.json        RunInfo: the model's shape, policy, configuration, attempts
      run.duckdb      views over the segments, written once; real tables after packing
      vocab.parquet   text of each token id
      TABLE/          segments, one folder a table

The training process never imports duckdb: views and packing run in a short process of their own.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from moeviz import __version__
from moeviz.errors import CorruptRunError, MoevizError, RunNotFoundError
from moeviz.policy import SamplingPolicy
from moeviz.records import ModelInfo
from moeviz.store.cover import SegmentName
from moeviz.store.schema import SCHEMA_VERSION, TABLES, VOCAB_SCHEMA, segment_schema
from moeviz.store.segments import write_parquet, write_segment

RUN_FILE = "run.json"
DATABASE_FILE = "run.duckdb"
VOCAB_FILE = "vocab.parquet"

_log = logging.getLogger("moeviz.store")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One process (or set of ranks) that wrote into the run; a resumed run has several."""

    number: int
    from_step: int
    """First step it trained: rows of older attempts from this step on are superseded."""
    started: float
    """Seconds since the epoch."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a reader must know about a run besides its rows; `run.json` is this, one to one."""

    name: str
    model: ModelInfo
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    schema_version: int = SCHEMA_VERSION
    moeviz_version: str = __version__
    policy: Mapping[str, Any] = field(default_factory=lambda: asdict(SamplingPolicy()))
    """Fields of the SamplingPolicy."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's own configuration, as the trainer states it."""
    planned_steps: int | None = None
    ranks: int = 1
    tokenizer: str = ""
    """A note for people: which tokenizer the token ids belong to."""
    attempts: tuple[Attempt, ...] = ()
    packed: bool = False
    """Whether the rows are in run.duckdb instead of segments."""

    @property
    def attempt(self) -> int:
        """Number of the newest attempt, to be handed to `SegmentWriter`."""
        return self.attempts[-1].number if self.attempts else 0

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self), default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)

    @classmethod
    def from_json(cls, text: bytes | str) -> RunInfo:
        """Raises CorruptRunError for a text that is no RunInfo, or one of a newer schema."""
        try:
            data = orjson.loads(text)
            version = data["schema_version"]
            if version > SCHEMA_VERSION:
                raise CorruptRunError(
                    f"schema version {version} is newer than {SCHEMA_VERSION}, the newest that moeviz "
                    f"{__version__} reads; upgrade moeviz"
                )
            known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
            known["model"] = ModelInfo.from_dict(data["model"])
            known["attempts"] = tuple(Attempt(**attempt) for attempt in data.get("attempts", ()))
            return cls(**known)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CorruptRunError(
                f"{RUN_FILE} is damaged ({error!r}); restore it from a copy of the run"
            ) from error


def create_run(path: str | Path, info: RunInfo) -> Path:
    """Make a run folder: table folders with an empty segment each, run.json, and run.duckdb with its views.

    Args:
        path: folder of the run; made, with its parents. May exist if it holds no run.
        info: its description; `attempts` is set here when empty.

    Raises:
        MoevizError: the folder already holds a run.
    """
    path = Path(path)
    if (path / RUN_FILE).exists():
        raise MoevizError(f"{path} already holds a run; resume it, give another name, or delete it")
    if not info.attempts:
        info = replace(info, attempts=(Attempt(number=0, from_step=0, started=info.created),))
    path.mkdir(parents=True, exist_ok=True)
    _begin_attempt(path, info)
    write_vocab(path, ())
    write_info(path, info)
    write_views(path)
    return path


def resume_run(path: str | Path, from_step: int) -> RunInfo:
    """Begin a new attempt at `from_step`: the first step that will be trained (again).

    A packed run is unpacked first. Rows that older attempts wrote for this step and later ones stay in their
    files, but readers no longer see them.

    Raises:
        RunNotFoundError, CorruptRunError: no run, or none that can be read.
    """
    path = Path(path)
    info = read_info(path)
    if info.packed:
        if not _in_process("moeviz.store.pack", "--unpack", path):
            raise CorruptRunError(
                f"{path / DATABASE_FILE} could not be unpacked; restore it from a copy of the run"
            )
        info = read_info(path)
    attempt = Attempt(number=info.attempt + 1, from_step=from_step, started=time.time())
    info = replace(info, attempts=(*info.attempts, attempt))
    _begin_attempt(path, info)
    write_info(path, info)
    if not (path / DATABASE_FILE).exists():
        write_views(path)
    return info


def read_info(path: str | Path) -> RunInfo:
    """run.json of a run folder.

    Raises:
        RunNotFoundError: there is none.
        CorruptRunError: it cannot be read, or is of a newer schema.
    """
    try:
        text = (Path(path) / RUN_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise RunNotFoundError(
            f"no run at {path}: it has no {RUN_FILE}; `moeviz runs FOLDER` lists runs"
        ) from None
    return RunInfo.from_json(text)


def write_info(path: str | Path, info: RunInfo) -> None:
    """Replace run.json, atomically and durably."""
    temporary = Path(path) / f".{RUN_FILE}.tmp"
    with open(temporary, "wb") as file:
        file.write(info.to_json())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, Path(path) / RUN_FILE)


def write_vocab(path: str | Path, texts: Sequence[str]) -> None:
    """Write the text of every token id (position i is id i) to vocab.parquet."""
    table = pa.table({"token_id": range(len(texts)), "text": list(texts)}, schema=VOCAB_SCHEMA)
    temporary = Path(path) / f".{VOCAB_FILE}.tmp"
    write_parquet(temporary, table)
    os.replace(temporary, Path(path) / VOCAB_FILE)


def write_views(path: str | Path) -> bool:
    """Write run.duckdb with its views, in a process of its own. A failure is logged; moeviz needs none."""
    return _in_process("moeviz.store.views", path)


def finish_run(path: str | Path) -> bool:
    """Pack a cleanly finished run, in a process of its own. A failure is logged; segments stay."""
    return _in_process("moeviz.store.pack", path)


def start_compactor(path: str | Path) -> subprocess.Popen[bytes]:
    """Start the sidecar that merges a long run's segments; it leaves by itself with this process."""
    return subprocess.Popen(
        _command("moeviz.store.compact", path, "--parent", str(os.getpid())),
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _begin_attempt(path: Path, info: RunInfo) -> None:
    """An empty segment per table: DuckDB 1.5 refuses a glob without files, and names announce the attempt."""
    attempt = info.attempts[-1]
    now_ms = int(attempt.started * 1000)
    name = SegmentName(
        0, attempt.number, attempt.from_step, 0, 0, attempt.from_step, attempt.from_step, 0, now_ms
    )
    for table in TABLES:
        folder = path / table
        folder.mkdir(exist_ok=True)
        write_segment(folder, name, segment_schema(table, info.run_id).empty_table())


def _in_process(module: str, *args: str | Path) -> bool:
    """Run `python -m module args` and wait."""
    done = subprocess.run(
        _command(module, *args), env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        _log.warning("`python -m %s` failed: %s; the run itself is unharmed", module, lines[-1])
    return done.returncode == 0


def _command(module: str, *args: str | Path) -> list[str]:
    """`-P` keeps the user's folder, with its own model.py, off the path."""
    return [sys.executable, "-P", "-m", module, *map(str, args)]


def _environment() -> dict[str, str]:
    """This process's, with the folder that moeviz was imported from at the end of the path."""
    package_parent = str(Path(__file__).resolve().parents[2])
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), package_parent]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
