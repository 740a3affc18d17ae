"""A run on disk through the real feed, archive and command, against the arrays it was recorded from."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tui_fakes import SyntheticRun, kind, tokens

from moeviz.cli import main
from moeviz.errors import CorruptRunError
from moeviz.records import EventRecord, LoadRecord, ScalarRecord, SequenceRecord, TokenRoutingRecord
from moeviz.store.run import RunInfo, create_run, write_vocab
from moeviz.store.writer import SegmentWriter
from tui.archive import Source
from tui.library import FolderLibrary
from tui.store_source import shape_words

TOKENS, STEPS, SAMPLED = 4096, 24, (10, 20)
TEXTS = ("The fox saw 3 bridges.", "It sailed away,\nfar away.")


class Recorded(NamedTuple):
    path: Path
    counts_TLE: np.ndarray
    experts_LNSK: np.ndarray
    lengths: tuple[int, ...]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Four layers of eight experts, top-2, 24 steps, two sequences sampled at two of them; ended."""
    run = SyntheticRun(4, 8, 2, steps=STEPS)
    path = tmp_path_factory.mktemp("runs") / "mine"
    create_run(path, RunInfo(name="mine", model=run.info, planned_steps=30))
    words = [tokens(text) for text in TEXTS]
    vocab = sorted({word for text in words for word in text})
    write_vocab(path, vocab)
    writer = SegmentWriter(path)
    rng = np.random.default_rng(0)
    loads_TLE = run.loads_TLE.astype(np.float64)
    shares_TLE = loads_TLE / loads_TLE.sum(axis=2, keepdims=True)
    counts_TLE = np.stack([[rng.multinomial(TOKENS * 2, share) for share in step] for step in shares_TLE])
    longest = max(map(len, words))
    experts_LNSK = rng.random((4, 2, longest, 8)).argsort(axis=-1)[..., :2].astype(np.uint16)
    now = time.time()
    for step in range(STEPS):
        at = {"step": step, "rank": 0}
        if step in SAMPLED:
            seqs, lengths = np.arange(2), np.array([len(text) for text in words])
            weights = np.full(experts_LNSK.shape, 0.5, np.float32)
            sampled = {**at, "seqs": seqs, "lengths_N": lengths}
            writer.write(
                TokenRoutingRecord(
                    **sampled, layers=np.arange(4), experts_LNSK=experts_LNSK, weights_LNSK=weights
                )
            )
            ids = np.zeros((2, longest), np.int32)
            for row, text in zip(ids, words, strict=True):
                row[: len(text)] = [vocab.index(word) for word in text]
            loss = np.full(ids.shape, 2.5, np.float32)
            writer.write(
                SequenceRecord(**sampled, token_ids_NS=ids, domains=("story", None), token_loss_NS=loss)
            )
        writer.write(ScalarRecord(**at, ts=now, values={"loss": float(run.loss_T[step])}))
        sums = {"entropy_nats": np.full(4, TOKENS * 1.5, np.float32)}
        writer.write(LoadRecord(**at, ts=now, tokens=TOKENS, counts_LE=counts_TLE[step], token_sums=sums))
    writer.write(EventRecord(step=STEPS, rank=0, ts=time.time(), kind="ended"))
    writer.close()
    return Recorded(path, counts_TLE, experts_LNSK, tuple(len(text) for text in words))


@pytest.fixture
def source(recorded: Recorded) -> Source:
    return FolderLibrary(recorded.path.parent).open(recorded.path)


def test_older_loads_are_those_that_were_recorded(recorded: Recorded, source: Source) -> None:
    history = source.archive.loads(5, 11)
    assert history.steps.tolist() == list(range(5, 12))
    np.testing.assert_allclose(history.load_rel_TLE, recorded.counts_TLE[5:12] / (TOKENS * 2) * 8, rtol=1e-5)
    source.archive.close()


def test_sequences_come_newest_first_with_their_text_and_experts(recorded: Recorded, source: Source) -> None:
    refs = source.archive.sequences()
    assert [(ref.step, ref.seq, ref.domain) for ref in refs] == [
        (20, 0, "story"),
        (20, 1, None),
        (10, 0, "story"),
        (10, 1, None),
    ]
    for ref in refs[:2]:
        trace = source.archive.trace(ref)
        length = recorded.lengths[ref.seq]
        assert "".join(trace.texts) == TEXTS[ref.seq]
        assert trace.layers == (0, 1, 2, 3)
        np.testing.assert_array_equal(trace.experts_LSK, recorded.experts_LNSK[:, ref.seq, :length])
        np.testing.assert_allclose(trace.weights_LSK, 0.5, atol=0.003)
    source.archive.close()


def test_flow_counts_first_choices_from_layer_to_layer(recorded: Recorded, source: Source) -> None:
    wanted = np.zeros((8, 8))
    for _ in SAMPLED:
        for seq, length in enumerate(recorded.lengths):
            for token in range(length):
                wanted[recorded.experts_LNSK[1, seq, token, 0], recorded.experts_LNSK[2, seq, token, 0]] += 1
    flow = source.archive.flow(1)
    assert flow is not None
    np.testing.assert_array_equal(flow.counts_EE, wanted)
    assert flow.tokens == 2 * sum(recorded.lengths)
    assert source.archive.flow(3) is None
    source.archive.close()


def test_the_library_lists_runs_and_their_shapes(recorded: Recorded) -> None:
    (row,) = FolderLibrary(recorded.path.parent).runs()
    assert (row.name, row.state, row.step, row.planned_steps, row.shape) == (
        "mine",
        "ended",
        23,
        30,
        "4 × 8, top 2",
    )
    assert row.path == recorded.path
    share = recorded.counts_TLE[-1] / (TOKENS * 2)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(axis=1) / np.log(8)
    assert row.worst_entropy == pytest.approx(entropy.min(), rel=1e-4)


def test_shapes_of_uneven_models_are_spans() -> None:
    info = SyntheticRun(2, 8, 2, steps=2).info
    assert shape_words(info) == "2 × 8, top 2"


# The command.


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["tui", *argv]) == 0
    return capsys.readouterr().out


def test_once_prints_the_overview(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, str(recorded.path), "--once")
    assert "ended" in text
    assert "step 23 / 30" in text
    assert "expert load" in text
    assert "load entropy by layer" in text
    assert "\x1b" not in text  # no terminal, no colours


def test_without_a_terminal_it_prints_once(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        printed(capsys, str(recorded.path)).splitlines()[2:]
        == printed(capsys, str(recorded.path), "--plain").splitlines()[2:]
    )


def test_ascii_prints_seven_bits(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, str(recorded.path), "--once", "--ascii").isascii()


def test_json_is_what_was_recorded(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(printed(capsys, str(recorded.path), "--json"))
    assert (data["run"], data["state"], data["step"], data["tokens"]) == ("mine", "ended", 23, TOKENS)
    loads = np.array([layer["load_rel"] for layer in data["layers"]])
    np.testing.assert_allclose(loads, recorded.counts_TLE[-1] / (TOKENS * 2) * 8, rtol=1e-5)
    assert [layer["route_entropy"] for layer in data["layers"]] == pytest.approx(
        [1.5 / np.log(8)] * 4, abs=1e-5
    )


def test_the_newest_run_of_a_folder_is_the_default(
    recorded: Recorded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert " mine " in printed(capsys, "--runs", str(recorded.path.parent), "--once")
    assert " mine " in printed(capsys, "mine", "--runs", str(recorded.path.parent), "--once")


def test_a_run_that_is_not_there_is_named_with_what_is(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tui", str(recorded.path.parent / "mien"), "--once"]) == 1
    assert "did you mean" in capsys.readouterr().err


def test_a_damaged_run_is_an_error_and_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{")
    assert main(["tui", str(tmp_path), "--once"]) == 1
    assert "damaged" in capsys.readouterr().err
    with pytest.raises(CorruptRunError, match="damaged"):
        FolderLibrary(tmp_path.parent).open(tmp_path)


def test_fps_has_limits(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tui", str(recorded.path), "--fps", "50"])
    assert "fps=50.0 is not between 0.1 and 10" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_it_runs_in_a_terminal_and_quits(recorded: Recorded) -> None:
    """The whole way: a pseudo-terminal, the real command, real keys; stdout may be redirected."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "36"}
    process = subprocess.Popen(
        [sys.executable, "-m", "moeviz.cli", "tui", str(recorded.path)],
        stdin=follower,
        stderr=follower,
        stdout=subprocess.DEVNULL,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    os.close(follower)
    seen, deadline = b"", time.monotonic() + 240
    keys = {b"load entropy by layer": b"2", b"load of this step": b"q"}
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                seen += os.read(leader, 65536)
            except OSError:
                break
        for words in [words for words in keys if words in seen]:
            os.write(leader, keys.pop(words))
    assert process.wait(timeout=120) == 0
    os.close(leader)
    assert b"Traceback" not in seen
    assert not keys


def test_the_fake_tokenizer_keeps_the_text() -> None:
    for text in TEXTS:
        assert "".join(tokens(text)) == text
        assert {kind(token) for token in tokens(text)} <= set(range(5))
