"""JSON Lines of routing decisions: one token a line (vLLM loggers), or one call of a router a line (Megatron).

route-jsonl: `{"type": "meta", "model_id", "num_experts", "top_k", ...}`, then lines of `{"type": "route",
"req_id", "token_idx", "layer", "topk_ids", "topk_weights"}`; `step`, `rank` and `token_id` are read where they
are there. Several published loggers of vLLM write it.

megatron-jsonl: what Megatron Core's router tracer (`--moe-routing-trace-path`) writes, `router_trace_rank0.jsonl`
and so on, lines of `{"step", "stage", "block", "layer", "rank", "num_tokens", "topk", "top_indices"}` and `mtp_idx`
in multi-token prediction. It has no gate weights, and its ids stand in the order of the experts.

A faulty line is left out and named; every other line counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from moeviz.errors import MoevizError
from moeviz.imports.recording import Decisions, FaultyLine, RouterKey

Progress = Callable[[int, int], None]
"""Called with the bytes read and the bytes in all."""

_TICK_LINES = 2000


class LineReader:
    """Lines of one or several files; what is wrong with one goes to `faults`."""

    def __init__(self, files: list[Path], progress: Progress = lambda done, total: None) -> None:
        self.files, self._progress = files, progress
        self.faults: list[FaultyLine] = []
        self._at = ("", 0)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        total, done = sum(file.stat().st_size for file in self.files), 0
        self._progress(0, total)
        for path in self.files:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    done += len(line)
                    if number % _TICK_LINES == 0:
                        self._progress(done, total)
                    self._at = (path.name, number)
                    if line.strip():
                        yield from self._parsed(line)
        self._progress(total, total)

    def fault(self, problem: str) -> None:
        """Note that the line that was given last is left out."""
        self.faults.append(FaultyLine(*self._at, problem))

    def _parsed(self, line: bytes) -> Iterator[Mapping[str, Any]]:
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            cut = "" if line.endswith(b"\n") else " (it was cut off while it was written)"
            self.fault(f"no JSON{cut}: {error}; delete the line or log again")
            return
        if isinstance(value, dict):
            yield value
        else:
            self.fault(f"{type(value).__name__} instead of an object; delete the line")


def read_routes(lines: LineReader, num_experts: int | None = None) -> tuple[Decisions, dict[str, Any]]:
    """route-jsonl -> its decisions, and its meta line (empty without one).

    `num_experts` takes precedence over the meta line.
    """
    decisions, meta = Decisions(num_experts), {}
    for line in lines:
        kind = line.get("type", "route")
        if kind == "meta":
            meta = dict(line)
            try:
                if num_experts is None and line.get("num_experts") is not None:
                    decisions.declare(_whole(line, "num_experts"))
            except ValueError as error:
                lines.fault(str(error))
        elif kind == "route":
            try:
                decisions.add_token(
                    RouterKey(-1, _whole(line, "layer")),
                    _list(line, "topk_ids"),
                    _list(line, "topk_weights") if line.get("topk_weights") is not None else None,
                    position=_whole(line, "token_idx"),
                    request=str(line.get("req_id", "")),
                    step=_whole(line, "step", 0),
                    rank=_whole(line, "rank", 0),
                    token_id=_whole(line, "token_id", -1),
                )
            except ValueError as error:
                lines.fault(str(error))
    return decisions, meta


def read_megatron(lines: LineReader, num_experts: int | None = None) -> tuple[Decisions, dict[str, Any]]:
    """megatron-jsonl -> its decisions. The second value is empty: the trace has no meta line."""
    decisions = Decisions(num_experts)
    for line in lines:
        try:
            ids_TK = _list(line, "top_indices")
            if not all(isinstance(ids, list) for ids in ids_TK):
                raise ValueError("top_indices holds no lists; write one list of expert ids a token")
            tokens, k = _whole(line, "num_tokens", len(ids_TK)), _whole(line, "topk", 0)
            if tokens != len(ids_TK) or (k and any(len(ids) != k for ids in ids_TK)):
                raise ValueError(
                    f"top_indices does not hold num_tokens={tokens} lists of topk={k}; trace this step again"
                )
            mtp = _whole(line, "mtp_idx", 0) if line.get("block") == "mtp" else -1
            decisions.add_batch(
                RouterKey(mtp, _whole(line, "layer")),
                ids_TK,
                step=_whole(line, "step", 0),
                rank=_whole(line, "rank", 0),
            )
        except ValueError as error:
            lines.fault(str(error))
    return decisions, {}


def trace_files(path: Path) -> list[Path]:
    """The files of one recording: `path` itself, or the rank files of a folder.

    Raises:
        MoevizError: no such file, or a folder without any.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise MoevizError(f"no file at {path}; give the recording, or the folder of a Megatron trace")
    files = sorted(path.glob("router_trace_rank*.jsonl"))
    if not files:
        raise MoevizError(f"{path} has no router_trace_rank*.jsonl; give the file of the recording itself")
    return files


def _whole(line: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = line.get(key, default)
    if type(value) is not int or value < (-1 if key == "token_id" else 0):
        raise ValueError(f"{key} is {value!r}; it must be a whole number from 0")
    return value


def _list(line: Mapping[str, Any], key: str) -> list[Any]:
    value = line.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} is {value!r}; it must be a list")
    return value
