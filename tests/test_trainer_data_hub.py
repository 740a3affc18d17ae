"""Streams that end, are cut, or begin again: what came is kept, and the message says what to do."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from moeviz.errors import MoevizError
from trainer import data_hub
from trainer.data import DataConfig, open_data
from trainer.data_hub import HubName, fetch, hub_source


def texts(count: int) -> list[str]:
    return [f"Document number {n} of the stream, and nothing else.\n" for n in range(count)]


class Stream:
    """A data set that breaks when `cut_at` rows were given, once."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], cut_at: int | None = None) -> None:
        self.all, self.cut_at, self.asked_from = list(rows), cut_at, []

    def __call__(self, skip: int) -> Iterator[Mapping[str, Any]]:
        self.asked_from.append(skip)
        for number, row in enumerate(self.all[skip:], start=skip):
            if number == self.cut_at:
                self.cut_at = None
                raise ConnectionError("connection reset by peer")
            yield row


def kept(folder: Path) -> list[str]:
    from trainer.data_sources import FileSource, LabelledFile

    files = tuple(LabelledFile(path, "web") for path in sorted(folder.glob("part-*")))
    return [document.text for document in FileSource(files).documents()]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_hub, "_PART_ROWS", 10)
    monkeypatch.setattr(data_hub, "_FEWEST_REPEATS", 5)


def test_a_stream_is_kept_in_order_and_asked_for_once(tmp_path: Path) -> None:
    stream = Stream({"text": text} for text in texts(33))
    fetch(tmp_path, stream, 25, "a stream")
    fetch(tmp_path, stream, 25, "a stream")
    assert kept(tmp_path) == texts(25)
    assert stream.asked_from == [0]


@pytest.mark.parametrize("cut_at", [0, 10, 17])
def test_after_a_cut_the_same_command_goes_on(cut_at: int, tmp_path: Path) -> None:
    stream = Stream(({"content": text} for text in texts(30)), cut_at=cut_at)
    with pytest.raises(
        MoevizError, match=rf"cut after {cut_at} documents .*connection reset.*run the same command"
    ):
        fetch(tmp_path, stream, 30, "a stream")
    fetch(tmp_path, stream, 30, "a stream")
    assert kept(tmp_path) == texts(30)
    assert stream.asked_from == [0, cut_at]


def test_a_stream_that_ends_early_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moeviz.data"):
        fetch(tmp_path, Stream({"text": text} for text in texts(7)), 30, "a stream")
    assert "ended after 7 of 30 documents" in caplog.text
    assert kept(tmp_path) == texts(7)


def test_a_stream_that_repeats_for_ever_is_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def endless(skip: int) -> Iterator[Mapping[str, Any]]:
        while True:
            yield from ({"text": text} for text in texts(12))

    with caplog.at_level(logging.WARNING, "moeviz.data"):
        fetch(tmp_path, endless, 1000, "a stream")
    assert "repeats itself after 12 documents" in caplog.text
    assert kept(tmp_path) == texts(12)


def test_copies_in_between_are_left_out(tmp_path: Path) -> None:
    doubled = [text for text in texts(8) for _ in range(3)]
    fetch(tmp_path, Stream({"text": text} for text in doubled), 8, "a stream")
    assert kept(tmp_path) == texts(8)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "body": "x"}], r"has no text \(found: id, body\)"),
        ([], "brought no document"),
        ([{"text": " "}], "brought no document"),
    ],
)
def test_rows_without_text_are_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match=message):
        fetch(tmp_path, Stream(rows), 5, "a stream")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:a/b", HubName("a/b", None, 100_000)),
        ("hf:a/b:part@12", HubName("a/b", "part", 12)),
        ("hf:a/b@7", HubName("a/b", None, 7)),
    ],
)
def test_names_of_data_sets(text: str, name: HubName) -> None:
    assert HubName.parse(text) == name


@pytest.mark.parametrize("text", ["hf:", "hf:a@", "hf:a@0", "hf:a:b:c"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(MoevizError, match="is not hf:NAME"):
        HubName.parse(text)


class FakeHub(types.ModuleType):
    """Stands for the package `datasets`: one streamed data set of 40 rows."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.error, self.asked = error, []

    def load_dataset(self, *args: Any, **options: Any) -> list[dict[str, str]]:
        self.asked.append((args, options))
        if self.error is not None:
            raise self.error
        return [{"content": text * 3} for text in texts(40)]


def test_a_data_set_is_a_source_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    source = "hf:codeparrot/codeparrot-clean@40"
    data = open_data(DataConfig(source=source, vocab_size=300), quiet=True, root=tmp_path)
    assert data.shards.domains == ("codeparrot-clean",)
    assert len(data.shards.starts("train", "codeparrot-clean")) > 30
    assert hub.asked == [(("codeparrot/codeparrot-clean", None), {"split": "train", "streaming": True})]


def test_a_data_set_that_cannot_be_reached_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(ConnectionError("no route")))
    with pytest.raises(
        MoevizError, match=r"a/b cannot be opened \(ConnectionError: no route\).*name its files"
    ):
        hub_source("hf:a/b", quiet=True, root=tmp_path)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MoevizError, match=r"needs datasets; run: pip install \"moeviz\[hub\]\""):
        hub_source("hf:a/b", quiet=True, root=tmp_path)
