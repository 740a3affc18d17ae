"""Trackers are told what was recorded, number for number; what they do wrong reaches nobody but the log."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_runs import EXPERTS, E, L, alert, model_info, new_run
from trainer_runs import TOY, corpus_cache, no_packing, toy

from moeviz import bridges
from moeviz.bridges import Bridge, Bridged, Digest, TrackedRun, Tracking, bridged, check_trackers
from moeviz.bridges.digest import digest_of, load_picture, load_values
from moeviz.colors import load_ramp
from moeviz.commands.train import parse
from moeviz.errors import MissingExtraError, MoevizError
from moeviz.records import AlertRecord, EventRecord, LoadRecord, MetricRecord, Record, ScalarRecord
from moeviz.store.queries import events
from moeviz.store.reader import open_run
from moeviz.store.writer import SegmentWriter
from trainer.train import train

__all__ = ["corpus_cache", "no_packing"]  # fixtures


class Kept:
    """A sink and a tracker that keep what they are told."""

    place = "memory"

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.digests: list[Digest] = []
        self.alerts: list[AlertRecord] = []
        self.closed = 0

    def write(self, record: Record) -> None:
        self.records.append(record)

    def log(self, digest: Digest) -> None:
        self.digests.append(digest)

    def alert(self, told: AlertRecord) -> None:
        self.alerts.append(told)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed += 1


def a_load(step: int, counts_LE: np.ndarray) -> LoadRecord:
    return LoadRecord(step=step, rank=0, ts=0.0, tokens=int(counts_LE[0].sum()) // 2, counts_LE=counts_LE)


def counts(seed: int) -> np.ndarray:
    """12 tokens x 2 experts in each layer."""
    rng, found = np.random.default_rng(seed), np.zeros((L, E), dtype=np.int64)
    for layer, size in enumerate(EXPERTS):
        found[layer, :size] = rng.multinomial(24, [1 / size] * size)
    return found


def test_loads_are_relative_to_an_even_share() -> None:
    counts_LE = counts(0)
    told = digest_of(a_load(20, counts_LE), model_info(), every=10)
    assert told is not None
    assert told.load_LE is not None
    for layer, size in enumerate(EXPERTS):
        np.testing.assert_allclose(told.load_LE[layer, :size], counts_LE[layer, :size] / 24 * size)
        assert np.isnan(told.load_LE[layer, size:]).all()
    assert load_values(told.load_LE).shape == (sum(EXPERTS),)
    np.testing.assert_allclose(load_values(told.load_LE).sum(), sum(EXPERTS))
    assert digest_of(a_load(21, counts_LE), model_info(), every=10) is None


def test_a_picture_shows_even_dead_absent_and_crowded_experts_apart() -> None:
    load_LE = np.array([[1.0, 0.0, 8.0], [1.0, 0.125, np.nan]])
    picture = load_picture(load_LE)
    assert picture.shape == (16, 24, 3)
    assert picture.dtype == np.uint8
    cells = picture[3::8, 3::8].astype(int)
    assert (picture.reshape(2, 8, 3, 8, 3) == cells[:, None, :, None]).all()
    even, last = load_ramp()[127].tolist(), load_ramp()[-1].tolist()
    assert [cells[0, 0].tolist(), cells[1, 0].tolist(), cells[0, 2].tolist()] == [even, even, last]
    assert cells[1, 1].tolist() == load_ramp()[0].tolist()
    assert len({tuple(cell) for cell in cells.reshape(-1, 3).tolist()}) == 5


def test_metrics_are_told_as_mean_and_extremes_of_the_layers() -> None:
    values = {"gini": np.array([0.1, np.nan, 0.5]), "whole": 3.0, "unknown": np.array([np.nan])}
    told = digest_of(MetricRecord(step=30, values=values), model_info(), every=10)
    assert told is not None
    assert dict(told.values) == pytest.approx(
        {"routing/gini/mean": 0.3, "routing/gini/min": 0.1, "routing/gini/max": 0.5, "routing/whole": 3.0}
    )
    scalar = ScalarRecord(step=7, rank=0, ts=0.0, values={"loss": 2.5})
    assert digest_of(scalar, model_info(), every=10).values == {"loss": 2.5}  # type: ignore[union-attr]


def test_records_pass_and_alerts_are_told_once_a_change() -> None:
    inner, tracker = Kept(), Kept()
    sink = Bridged(inner, [Bridge("kept", lambda: tracker)], model_info())
    told = [
        alert("A/1/3", 3),
        alert("A/1/3", 4),
        alert("A/1/3", 5, severity="critical"),
        alert("A/1/3", 6, 6),
    ]
    told += [alert("A/1/3", 9)]
    records: list[Record] = [*told, EventRecord(step=9, rank=0, ts=0.0, kind="x"), a_load(10, counts(1))]
    for record in records:
        sink.write(record)
    sink.close()
    assert inner.records[:-1] == records
    assert [one.updated_step for one in tracker.alerts] == [3, 5, 6, 9]
    assert [one.step for one in tracker.digests] == [10]
    closing = inner.records[-1]
    assert isinstance(closing, EventRecord)
    assert closing.kind == "tracker_closed"
    assert closing.detail == {"name": "kept", "place": "memory", "sent": 5, "failed": 0, "dropped": 0}
    assert (inner.closed, tracker.closed) == (1, 1)


def test_failures_are_said_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Kept):
        def log(self, digest: Digest) -> None:
            if digest.step % 2:
                raise ConnectionError("no route to host")
            super().log(digest)

    tracker = Broken()
    bridge = Bridge("broken", lambda: tracker)
    for step in range(10):
        bridge.offer(Digest(step=step))
    with caplog.at_level(logging.WARNING, logger="moeviz.bridges"):
        assert bridge.close(60) == bridge.close(60) == (5, 5, 0)
    assert [one.step for one in tracker.digests] == [0, 2, 4, 6, 8]
    assert len([row for row in caplog.messages if "no route to host" in row]) <= 1
    assert any("5 told, 5 failed, 0 given up" in row for row in caplog.messages)

    def refused() -> Kept:
        raise SystemExit("no key")

    closed = Bridge("refused", refused)
    closed.offer(Digest(step=0))
    assert closed.close(60) == (0, 1, 0)
    closed.offer(Digest(step=1))
    assert closed.stats == (0, 1, 1)


def test_a_tracker_that_hangs_loses_the_oldest_and_holds_up_nobody() -> None:
    go, tracker = threading.Event(), Kept()

    def slow() -> Kept:
        go.wait(60)
        return tracker

    bridge = Bridge("slow", slow, capacity=3)
    for step in range(8):
        bridge.offer(Digest(step=step))
    assert bridge.stats.dropped == 5
    go.set()
    assert bridge.close(60) == (3, 0, 5)
    assert [one.step for one in tracker.digests] == [5, 6, 7]
    never = threading.Event()
    hanging = Bridge("hanging", lambda: never.wait(60) or tracker)  # type: ignore[return-value]
    hanging.offer(Digest(step=1))
    assert hanging.close(0.05) == (0, 0, 1)
    never.set()


def test_unknown_and_missing_trackers_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match="no tracker 'aim'; there are wandb, tensorboard, trackio"):
        check_trackers(["aim"])
    monkeypatch.setitem(bridges.TRACKERS, "no_such_package", lambda run: Kept())
    with pytest.raises(MissingExtraError, match=r'run: pip install "moeviz\[no_such_package\]"'):
        check_trackers(["no_such_package"])
    with pytest.raises(MoevizError, match="tracker_every=0 is below 1"):
        Tracking(every=0)
    inner = Kept()
    assert bridged(inner, tmp_path, Tracking()) is inner


def test_the_plain_flags_work() -> None:
    assert parse([]).tracking.trackers.names == ()
    config = parse(["--use-wandb", "--use-tensorboard", "--tracker-project", "mine", "--tracker-every", "3"])
    assert config.tracking.trackers == Tracking(names=("wandb", "tensorboard"), project="mine", every=3)


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    config = {"preset": "toy", "optim": {"learning_rate": 0.25}}
    return TrackedRun(path=tmp_path, name="mine", run_id="id0123", config=config)


def tell(tracker: bridges.Tracker) -> None:
    """Three steps of a loss, a picture at step 10, an alert; a late number of an earlier step."""
    for step in (9, 10, 11):
        tracker.log(Digest(step=step, values={"loss": step / 4}))
    tracker.log(digest_of(a_load(10, counts(2)), model_info(), every=10))  # type: ignore[arg-type]
    tracker.log(Digest(step=10, values={"val_loss/code": 0.5}))
    tracker.alert(alert("DEAD/1/10", 10))
    tracker.close()


def tensorboard_values(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_reads_back_what_it_was_told(run: TrackedRun) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `tensorboard`)")
    from PIL import Image

    tracker = bridges.TRACKERS["tensorboard"](run)
    tell(tracker)
    found = tensorboard_values(run.path / "tensorboard")
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [(9, 2.25), (10, 2.5), (11, 2.75)]
    assert [(one.step, one.value) for one in found.Scalars("val_loss/code")] == [(10, 0.5)]
    (image,) = found.Images("load")
    (run.path / "load.png").write_bytes(image.encoded_image_string)
    shown = digest_of(a_load(10, counts(2)), model_info(), every=10)
    assert shown is not None
    assert shown.load_LE is not None
    np.testing.assert_array_equal(np.asarray(Image.open(run.path / "load.png")), load_picture(shown.load_LE))
    (histogram,) = found.Histograms("load_values")
    assert (histogram.step, histogram.histogram_value.num) == (10, sum(EXPERTS))
    assert histogram.histogram_value.sum == pytest.approx(sum(EXPERTS))
    texts = [found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]]
    assert any("optim.learning_rate = 0.25" in text for text in texts)
    assert any(
        "DEAD, layer 1: error: step 10: entropy is low; raise the balance loss" in text for text in texts
    )


def test_a_resumed_run_shows_steps_once(run: TrackedRun) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `tensorboard`)")
    for resumed_at, steps in ((None, range(4)), (2, range(2, 5))):
        tracker = bridges.TRACKERS["tensorboard"](replace(run, resumed_at=resumed_at))
        for step in steps:
            tracker.log(Digest(step=step, values={"loss": 10.0 * (resumed_at or 0) + step}))
        tracker.close()
        time.sleep(
            1.1 if resumed_at is None else 0
        )  # TensorBoard orders event files by the second in their names
    shown = tensorboard_values(run.path / "tensorboard").Scalars("loss")
    assert [(one.step, one.value) for one in shown] == [(0, 0), (1, 1), (2, 22), (3, 23), (4, 24)]


def wandb_rows(file: Path) -> Iterator[Mapping[str, str]]:
    """History rows of an offline file: a 7-byte header, then records as LevelDB's log keeps them."""
    from wandb.proto import wandb_internal_pb2

    data, at, pending = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record.FromString(pending)
            pending = b""
            if record.WhichOneof("record_type") == "history":
                yield {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def test_wandb_keeps_an_offline_run_with_what_it_was_told(
    run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra `wandb`)")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    bridge = Bridge("wandb", lambda: bridges.TRACKERS["wandb"](run))
    tell(_Through(bridge))
    assert bridge.close(120) == (6, 0, 0)
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    rows: list[Mapping[str, str]] = []
    deadline = time.monotonic() + 60
    while not any("load_values" in key for row in rows for key in row) and time.monotonic() < deadline:
        time.sleep(0.2)  # wandb's own process writes the file
        rows = list(wandb_rows(folder / "run-id0123.wandb"))
    told = [(float(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
    assert told == [(9, 2.25), (10, 2.5), (11, 2.75)]
    assert [row["step"] for row in rows if row.get("val_loss/code") == "0.5"] == ["10"]
    assert len(list((folder / "files" / "media" / "images").glob("load_*.png"))) == 1
    assert [row["load_values/_type"] for row in rows if "load_values/_type" in row] == ['"histogram"']


def test_trackio_keeps_what_it_was_told(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio", reason="trackio is not installed (extra `trackio`)")
    project = f"moeviz-test-{os.getpid()}"
    bridge = Bridge(
        "trackio",
        lambda: bridges.TRACKERS["trackio"](
            TrackedRun(path=run.path, name="mine", run_id="x", project=project, config=run.config)
        ),
    )
    try:
        tell(_Through(bridge))
        assert bridge.close(120) == (6, 0, 0)
        rows = trackio.SQLiteStorage.get_logs(project, "mine")
        assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [
            (9, 2.25),
            (10, 2.5),
            (11, 2.75),
        ]
        assert [row["step"] for row in rows if "val_loss/code" in row] == [10]
        (with_load,) = [row for row in rows if "load" in row]
        assert with_load["load"]["_type"] == "trackio.image"
        assert sum(with_load["load_values"]["values"]) == sum(EXPERTS)
        assert [one["title"] for one in trackio.SQLiteStorage.get_alerts(project)] == ["DEAD, layer 1: error"]
    finally:
        trackio.delete_project(project, force=True)


class _Through:
    """Tells a bridge what a tracker would be told."""

    place = ""

    def __init__(self, bridge: Bridge) -> None:
        self.log = self.alert = bridge.offer

    def close(self) -> None: ...


def test_training_is_told_to_tensorboard_and_never_changed_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_packing: None
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `tensorboard`)")
    told = {"use_tensorboard": True, "tracker_every": 2}
    plain = train(toy(tmp_path / "plain", log_routing=True))
    tracked = train(toy(tmp_path / "tracked", log_routing=True, tracking=told))

    def broken(run: TrackedRun) -> Any:
        raise OSError("no space left")

    monkeypatch.setitem(bridges.TRACKERS, "tensorboard", broken)
    failed = train(toy(tmp_path / "failed", tracking=told))
    assert plain.losses == tracked.losses == failed.losses
    found = tensorboard_values(tmp_path / "tracked" / "tensorboard")
    with open_run(tmp_path / "tracked") as store:
        stored = store.sql("SELECT step, name, value FROM scalars ORDER BY step")
        for name in ("loss", "lr", "grad_norm"):
            mine = stored[stored["name"] == name]
            assert [one.step for one in found.Scalars(name)] == mine["step"].tolist()
            np.testing.assert_allclose([one.value for one in found.Scalars(name)], mine["value"], rtol=1e-6)
        loads = store.sql(
            "SELECT step, max(value) AS value FROM metrics WHERE name = 'gini' GROUP BY 1 ORDER BY 1"
        )
        shown = loads[loads["step"] % 2 == 0]
        np.testing.assert_allclose(
            [one.value for one in found.Scalars("routing/gini/max")], shown["value"], rtol=1e-6
        )
        assert [one.step for one in found.Images("load")] == list(range(0, TOY.max_steps, 2))
        closed = events(store).set_index("kind").loc["tracker_closed", "detail"]
        assert '"failed":0' in closed.replace(" ", "")
    with open_run(tmp_path / "failed") as store:
        assert '"failed":0' not in events(store).set_index("kind").loc["tracker_closed", "detail"].replace(
            " ", ""
        )


def test_a_sink_that_refuses_keeps_its_error(tmp_path: Path) -> None:
    class Full(Kept):
        def write(self, record: Record) -> None:
            raise OSError("disk full")

    tracker = Kept()
    sink = Bridged(Full(), [Bridge("kept", lambda: tracker)], model_info())
    with pytest.raises(OSError, match="disk full"):
        sink.write(a_load(0, counts(0)))
    run = new_run(tmp_path / "mine")
    real = Bridged(SegmentWriter(run, sidecar=False), [Bridge("kept", lambda: tracker)], model_info())
    real.write(a_load(0, counts(0)))
    real.close()
    with open_run(run) as store:
        assert store.sql("SELECT sum(list_sum(counts))::INT AS n FROM expert_load")["n"].tolist() == [24 * L]
