"""One tracker, one logging job, in a process of its own; run by trackers.py in the Python that has the tracker.

    loads    L x E expert loads a step, each a curve that can be read back: as many series as there are experts, or one
             histogram a layer whose bins are the experts, where the tracker keeps such bins
    tokens   T x L x K expert ids a step, every one of which can be found again

Prints one JSON object. Needs numpy and the tracker; only the case `moeviz` imports moeviz. Shapes as everywhere: T
tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LAYER, EXPERT = 5, 17
"""Whose curve is read back."""


class Shape(NamedTuple):
    layers: int
    experts: int
    tokens: int
    top_k: int


class Job(NamedTuple):
    """A tracker, opened."""

    log: Callable[[int, np.ndarray], object]
    """(step, loads [L, E] or ids [T, L, K]) -> anything."""
    close: Callable[[], object]
    read: Callable[[], list[float]] | None = None
    """The curve of one expert, from what lies on the disk; None where the tracker itself cannot."""


Case = Callable[[Path, Shape], Job]


def tags(shape: Shape) -> list[str]:
    """Names of the series, layer by layer."""
    return [
        f"load/L{layer:02d}/E{expert:03d}" for layer in range(shape.layers) for expert in range(shape.experts)
    ]


TAG = f"load/L{LAYER:02d}/E{EXPERT:03d}"


def moeviz_loads(folder: Path, shape: Shape) -> Job:
    from moeviz.records import LayerInfo, LoadRecord, ModelInfo
    from moeviz.store.run import RunInfo, create_run
    from moeviz.store.writer import BackgroundSink, SegmentWriter

    layers = tuple(
        LayerInfo(layer=at, name=f"layers.{at}", block=at, num_experts=shape.experts, top_k=shape.top_k)
        for at in range(shape.layers)
    )
    create_run(folder / "run", RunInfo(name="run", model=ModelInfo(family="any", layers=layers)))
    sink = BackgroundSink(SegmentWriter(folder / "run", sidecar=False))

    def log(step: int, loads_LE: np.ndarray) -> None:
        counts_LE = loads_LE.astype(np.int64)
        sink.write(LoadRecord(step=step, rank=0, ts=time.time(), tokens=shape.tokens, counts_LE=counts_LE))

    def read() -> list[float]:
        from moeviz.store.reader import open_run

        with open_run(folder / "run") as store:
            sql = "SELECT counts[?] AS load FROM expert_load WHERE layer = ? ORDER BY step"
            return store.sql(sql, [EXPERT + 1, LAYER])["load"].tolist()

    return Job(log, sink.close, read)


def moeviz_tokens(folder: Path, shape: Shape) -> Job:
    from moeviz.records import TokenRoutingRecord

    job = moeviz_loads(folder, shape)
    sink: Any = job.close.__self__  # type: ignore[attr-defined]
    length = min(shape.tokens, 256)
    seqs = np.arange(shape.tokens // length)
    weights = np.full((shape.layers, len(seqs), length, shape.top_k), 1 / shape.top_k, dtype=np.float32)

    def log(step: int, ids_TLK: np.ndarray) -> None:
        ids_LNSK = ids_TLK.transpose(1, 0, 2).reshape(shape.layers, len(seqs), length, shape.top_k)
        sink.write(
            TokenRoutingRecord(
                step=step,
                rank=0,
                layers=np.arange(shape.layers),
                seqs=seqs,
                experts_LNSK=ids_LNSK,
                weights_LNSK=weights,
                lengths_N=np.full(len(seqs), length),
            )
        )

    return Job(log, sink.close)


def tensorboard_loads(folder: Path, shape: Shape) -> Job:
    from tensorboardX import SummaryWriter

    writer, names = SummaryWriter(str(folder / "tb")), tags(shape)

    def log(step: int, loads_LE: np.ndarray) -> None:
        for name, value in zip(names, loads_LE.ravel().tolist(), strict=True):
            writer.add_scalar(name, value, step)

    def read() -> list[float]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
        events.Reload()
        return [one.value for one in events.Scalars(TAG)]

    return Job(log, writer.close, read)


def _wandb(folder: Path) -> Any:
    for name in ("data", "cache", "config"):
        (folder / name).mkdir()
        os.environ[f"WANDB_{name.upper()}_DIR"] = str(folder / name)
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    return wandb, wandb.init(project="p", dir=str(folder), mode="offline", settings=settings)


def wandb_loads(folder: Path, shape: Shape) -> Job:
    _, run = _wandb(folder)
    names = tags(shape)
    return Job(
        lambda step, loads_LE: run.log(dict(zip(names, loads_LE.ravel().tolist(), strict=True)), step=step),
        run.finish,
    )


def wandb_histograms(folder: Path, shape: Shape) -> Job:
    wandb, run = _wandb(folder)
    edges = list(range(shape.experts + 1))

    def log(step: int, loads_LE: np.ndarray) -> None:
        rows = enumerate(loads_LE.tolist())
        run.log(
            {f"load/L{at:02d}": wandb.Histogram(np_histogram=(row, edges)) for at, row in rows}, step=step
        )

    return Job(log, run.finish)


def wandb_tokens(folder: Path, shape: Shape) -> Job:
    wandb, run = _wandb(folder)
    columns = ["token", "layer", *(f"k{slot}" for slot in range(shape.top_k))]

    def log(step: int, ids_TLK: np.ndarray) -> None:
        rows = ids_TLK.reshape(-1, shape.top_k).tolist()
        data = [[at // shape.layers, at % shape.layers, *row] for at, row in enumerate(rows)]
        run.log({"routing": wandb.Table(columns=columns, data=data)}, step=step)

    return Job(log, run.finish)


def _trackio(folder: Path) -> Any:
    os.environ.update(
        TRACKIO_DIR=str(folder / "trackio"), HF_HUB_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="False"
    )
    import trackio

    return trackio, trackio.init(project="p", name="r", embed=False, auto_log_gpu=False, auto_log_cpu=False)


def trackio_loads(folder: Path, shape: Shape) -> Job:
    trackio, run = _trackio(folder)
    names = tags(shape)

    def read() -> list[float]:
        return [row[TAG] for row in trackio.SQLiteStorage.get_logs("p", "r")]

    def log(step: int, loads_LE: np.ndarray) -> None:
        run.log(dict(zip(names, loads_LE.ravel().tolist(), strict=True)), step=step)

    return Job(log, run.finish, read)


def trackio_histograms(folder: Path, shape: Shape) -> Job:
    trackio, run = _trackio(folder)
    edges = list(range(shape.experts + 1))

    def log(step: int, loads_LE: np.ndarray) -> None:
        rows = enumerate(loads_LE.tolist())
        run.log(
            {f"load/L{at:02d}": trackio.Histogram(np_histogram=(row, edges)) for at, row in rows}, step=step
        )

    def read() -> list[float]:
        rows = trackio.SQLiteStorage.get_logs("p", "r")
        return [row[f"load/L{LAYER:02d}"]["values"][EXPERT] for row in rows]

    return Job(log, run.finish, read)


def trackio_tokens(folder: Path, shape: Shape) -> Job:
    import pandas as pd

    trackio, run = _trackio(folder)
    columns = [f"k{slot}" for slot in range(shape.top_k)]

    def log(step: int, ids_TLK: np.ndarray) -> None:
        frame = pd.DataFrame(ids_TLK.reshape(-1, shape.top_k).astype("int16"), columns=columns)
        run.log({"routing": trackio.Table(dataframe=frame)}, step=step)

    return Job(log, run.finish)


def _mlflow(folder: Path) -> Any:
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", GIT_PYTHON_REFRESH="quiet")
    import logging

    logging.disable(logging.WARNING)
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    experiment = mlflow.create_experiment("p", artifact_location=f"file://{folder}/artifacts")
    return mlflow, mlflow.start_run(experiment_id=experiment).info.run_id


def mlflow_loads(folder: Path, shape: Shape) -> Job:
    mlflow, run_id = _mlflow(folder)
    names = tags(shape)

    def log(step: int, loads_LE: np.ndarray) -> None:
        mlflow.log_metrics(dict(zip(names, loads_LE.ravel().tolist(), strict=True)), step=step)

    def read() -> list[float]:
        return [one.value for one in mlflow.MlflowClient().get_metric_history(run_id, TAG)]

    return Job(log, mlflow.end_run, read)


def mlflow_tokens(folder: Path, shape: Shape) -> Job:
    import pandas as pd

    mlflow, _ = _mlflow(folder)
    columns = [f"k{slot}" for slot in range(shape.top_k)]

    def log(step: int, ids_TLK: np.ndarray) -> None:
        frame = pd.DataFrame(ids_TLK.reshape(-1, shape.top_k).astype("int16"), columns=columns)
        mlflow.log_table(frame, artifact_file=f"routing{step}.parquet")

    return Job(log, mlflow.end_run)


def aim_loads(folder: Path, shape: Shape) -> Job:
    os.environ["AIM_UI_TELEMETRY_ENABLED"] = "0"
    from aim import Repo, Run

    (folder / "aim").mkdir()
    Repo.from_path(str(folder / "aim"), init=True)
    quiet = {"system_tracking_interval": None, "log_system_params": False, "capture_terminal_logs": False}
    run = Run(repo=str(folder / "aim"), **quiet)
    run_hash = run.hash
    places = [
        {"layer": layer, "expert": expert} for layer in range(shape.layers) for expert in range(shape.experts)
    ]

    def log(step: int, loads_LE: np.ndarray) -> None:
        for place, value in zip(places, loads_LE.ravel().tolist(), strict=True):
            run.track(value, name="load", step=step, context=place)

    def read() -> list[float]:
        from aim.storage.context import Context

        # Opened for writing: for readers a run is there only once `aim up` has indexed it.
        stored = Run(run_hash, repo=str(folder / "aim"), **quiet)
        frame = stored.get_metric("load", Context({"layer": LAYER, "expert": EXPERT})).dataframe()
        stored.close()
        return frame.sort_values("step")["value"].tolist()

    return Job(log, run.close, read)


CASES: dict[str, dict[str, tuple[str, Case]]] = {
    "loads": {
        "moeviz": ("moeviz", moeviz_loads),
        "TensorBoard, a scalar an expert": ("tensorboardX", tensorboard_loads),
        "W&B offline, a scalar an expert": ("wandb", wandb_loads),
        "W&B offline, a histogram a layer": ("wandb", wandb_histograms),
        "trackio, a scalar an expert": ("trackio", trackio_loads),
        "trackio, a histogram a layer": ("trackio", trackio_histograms),
        "MLflow on SQLite, a metric an expert": ("mlflow", mlflow_loads),
        "aim, a metric an expert": ("aim", aim_loads),
    },
    "tokens": {
        "moeviz": ("moeviz", moeviz_tokens),
        "W&B offline, a table a step": ("wandb", wandb_tokens),
        "trackio, a table a step": ("trackio", trackio_tokens),
        "MLflow, a Parquet table a step": ("mlflow", mlflow_tokens),
    },
}
"""Payload -> name -> (package, case). TensorBoard and aim have no place for tokens."""


def payloads(payload: str, shape: Shape, count: int) -> Iterator[np.ndarray]:
    """Whole-number loads that sum to T x K a layer, or distinct ids of each token; the same for every tracker."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        if payload == "loads":
            popularity_LE = rng.dirichlet(np.full(shape.experts, 4.0), shape.layers)
            yield rng.multinomial(shape.tokens * shape.top_k, popularity_LE).astype(np.float32)
        else:
            scores = rng.random((shape.tokens, shape.layers, shape.experts), dtype=np.float32)
            yield np.argpartition(scores, -shape.top_k)[..., -shape.top_k :].astype(np.uint16)


def processor_seconds() -> float:
    """User and system time of this process and of all that descend from it or share its session."""
    me, session = os.getpid(), os.getsid(0)
    stats: dict[int, tuple[int, int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                stats[int(entry.name)] = (int(fields[1]), int(fields[3]), int(fields[11]) + int(fields[12]))
    mine = {me} | {pid for pid, (_, of, _) in stats.items() if of == session}
    while more := {pid for pid, (parent, _, _) in stats.items() if parent in mine} - mine:
        mine |= more
    return sum(stats[pid][2] for pid in mine if pid in stats) / os.sysconf("SC_CLK_TCK")


def measure(payload: str, name: str, folder: Path, shape: Shape, steps: int) -> dict[str, Any]:
    """Log the job step after step, close, and read one curve back."""
    given = list(payloads(payload, shape, steps))  # all different: what repeats would be compressed away
    job = CASES[payload][name][1](folder, shape)
    blocked = []
    opened = _size(folder)
    job.log(0, given[0])  # the first call opens files and imports
    before = processor_seconds()
    for step in range(1, steps):
        begin = time.perf_counter()
        job.log(step, given[step])
        blocked.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    job.close()
    closing = time.perf_counter() - begin
    used = processor_seconds() - before
    size = _size(folder) - opened
    reading: float | None = None
    if job.read is not None:
        job.read()  # imports
        begin = time.perf_counter()
        curve = job.read()
        reading = time.perf_counter() - begin
        expected = [float(given[step][LAYER, EXPERT]) for step in range(steps)]
        if curve != expected:
            raise AssertionError(f"{len(curve)} of {steps} values came back, or others than were logged")
    return {
        "blocked_ms": 1e3 * statistics.median(blocked),
        "cpu_ms": 1e3 * used / (steps - 1),
        "close_seconds": closing,
        "kilobytes": size / steps / 1e3,
        "read_ms": None if reading is None else 1e3 * reading,
    }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("payload", choices=list(CASES))
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", type=int, nargs=4, default=(24, 64, 4096, 8), metavar=("L", "E", "T", "K"))
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):
        found = measure(options.payload, options.name, options.folder, Shape(*options.shape), options.steps)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # some trackers leave threads behind that wait for a network


if __name__ == "__main__":
    raise SystemExit(main())
