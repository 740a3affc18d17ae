"""Prepared folders, mixtures of sources, checksums and batches made ahead."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moeviz.commands import prepare as command
from moeviz.errors import MoevizError
from trainer import data_checksums, data_shards
from trainer.data import DataConfig, TrainingData, open_data, open_prepared
from trainer.data_batches import TokenBatches
from trainer.data_lines import open_lines
from trainer.data_mixture import parse_mixture, weights_of
from trainer.data_prefetch import PrefetchedBatches
from trainer.data_prepared import check_prepared

SMALL = {"vocab_size": 300, "validation_fraction": 0.2}


def sentences(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join("".join(rng.choice(list("abcdefghij"), size=5)) for _ in range(20)) for _ in range(count)
    ]


def write_texts(folder: Path, seed: int, count: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.txt").write_text("<|endoftext|>".join(sentences(seed, count)))
    return folder


def opened(tmp_path: Path, *sources: object, **fields) -> TrainingData:
    config = DataConfig(source=tuple(map(str, sources)), **(SMALL | fields))
    return open_data(config, quiet=True, root=tmp_path / "cache")


def prepared(tmp_path: Path, name: str, seed: int, **fields) -> Path:
    texts = write_texts(tmp_path / f"raw-{name}", seed)
    folder = tmp_path / "shards" / name
    config = DataConfig(source=(str(texts),), **(SMALL | fields))
    open_prepared(config, folder, quiet=True, root=tmp_path / "cache")
    return folder


def all_tokens(data: TrainingData) -> dict[tuple[str, str], list[int]]:
    return {part: tokens.tolist() for part, (tokens, _) in data.shards.arrays.items()}


def test_prepared_is_what_training_makes_on_the_fly(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "mine", seed=0)
    ahead, on_the_fly = opened(tmp_path, folder), opened(tmp_path, tmp_path / "raw-mine")
    assert all_tokens(ahead) == all_tokens(on_the_fly)
    assert ahead.tokenizer is not None
    assert on_the_fly.tokenizer is not None
    assert ahead.tokenizer.key == on_the_fly.tokenizer.key
    assert ahead.shards.key == on_the_fly.shards.key, "a run may go on with either"


def test_a_prepared_folder_can_be_moved(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "mine", seed=0)
    before = all_tokens(opened(tmp_path, folder))
    shutil.move(folder, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "raw-mine")
    assert all_tokens(opened(tmp_path, tmp_path / "elsewhere")) == before


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_shards, "_BATCH_CHARS", 300)
    folders = [prepared(tmp_path, f"by-{n}", seed=0, workers=n) for n in (1, 3)]
    one, three = (all_tokens(opened(tmp_path, folder)) for folder in folders)
    assert one == three


def test_several_sources_are_one_with_a_domain_each(tmp_path: Path) -> None:
    first, second = write_texts(tmp_path / "a", seed=1), write_texts(tmp_path / "b", seed=2)
    with_names = opened(tmp_path, f"left={first}", f"right={second}")
    assert with_names.shards.domains == ("left", "right")
    alone = opened(tmp_path, f"left={first}", tokenizer=str(with_names.paths[0] / "tokenizer.json"))
    assert all_tokens(alone)["train", "left"] == all_tokens(with_names)["train", "left"]
    assert opened(tmp_path, first, second).shards.domains == ("texts",), "one name is one domain"


def test_prepared_folders_and_text_go_together(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "mine", seed=0)
    more = write_texts(tmp_path / "more", seed=5)
    data = opened(tmp_path, folder, f"more={more}")
    assert set(data.shards.domains) == {"texts", "more"}
    assert data.vocab_size == opened(tmp_path, folder).vocab_size
    with pytest.raises(MoevizError, match="two sources have a domain 'texts'"):
        opened(tmp_path, folder, more)
    other = prepared(tmp_path, "other", seed=9)
    with pytest.raises(
        MoevizError, match=r"other was prepared with the tokenizer .* another one is asked for"
    ):
        opened(tmp_path, folder, f"other={other}")


def test_a_prepared_folder_to_evaluate_on(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "mine", seed=0)
    more = write_texts(tmp_path / "more", seed=5)
    data = opened(tmp_path, f"more={more}", validation_source=str(folder), tokenizer=str(folder))
    assert {split for split, domain in data.shards.arrays if domain == "more"} == {"train"}
    held_out = opened(tmp_path, folder)
    assert all_tokens(data)["validation", "texts"] == all_tokens(held_out)["validation", "texts"]


def test_all_of_a_text_may_be_held_out(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "mine", seed=0)
    more = write_texts(tmp_path / "more", seed=5)
    data = opened(tmp_path, more, all_held_out=True, tokenizer=str(folder))
    assert data.shards.num_tokens("train") == 0
    assert len(data.shards.starts("validation", "texts")) == 40


@pytest.mark.parametrize("pack", ["plain", "gz", "zst"])
def test_json_lines_are_read_as_a_stream(pack: str, tmp_path: Path) -> None:
    lines = b"".join(
        json.dumps({"content": text, "source": "code"}).encode() + b"\n" for text in sentences(0, 30)
    )
    path = tmp_path / ("rows.jsonl" if pack == "plain" else f"rows.jsonl.{pack}")
    if pack == "zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if pack == "gz" else lines)
    assert b"".join(open_lines(path)) == lines
    data = opened(tmp_path, path)
    assert data.shards.domains == ("code",)
    assert sum(len(data.shards.starts(side, "code")) for side in ("train", "validation")) == 30
    if pack != "plain":
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(MoevizError, match=r"is not a whole (gzip|Zstandard) file.*copy it again"):
            opened(tmp_path, path)


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_one_wrong_bit_is_found_and_named(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "mine", seed=0)
    check_prepared(folder)
    damage(folder / "train-0000.bin", at=101)
    for read in (check_prepared, lambda path: opened(tmp_path, path)):
        with pytest.raises(
            MoevizError, match=r"train-0000\.bin is damaged: bytes 0 to \d+ do not match their checksum"
        ):
            read(folder)


def test_a_large_shard_is_compared_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_checksums, "CHUNK_BYTES", 512)
    monkeypatch.setattr(data_shards, "_CHECKED_AT_ONCE", 0)
    folder = prepared(tmp_path, "mine", seed=0)
    damage(folder / "train-0000.bin", at=1500)
    shards = opened(tmp_path, folder).shards
    shards.read("train", "texts", 0, 512)
    shards.read("train", "texts", 768, 900)
    for start, stop in ((700, 768), (512, 514), (0, 10**9)):
        with pytest.raises(MoevizError, match=r"bytes 1024 to 1536 do not match"):
            shards.read("train", "texts", start, stop)
    batches = PrefetchedBatches(shards, batch_size=2, seq_len=16)
    with pytest.raises(MoevizError, match="bytes 1024 to 1536 do not match"):
        _epoch(batches)


def _epoch(batches: TokenBatches) -> None:
    for step in range(batches.tokens_per_epoch // (batches.batch_size * batches.seq_len) + 1):
        batches.batch(step)


@pytest.mark.parametrize("change", ["cut", "grown", "missing", "manifest"])
def test_a_copy_that_went_wrong_is_refused(change: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path, "mine", seed=0)
    file = folder / "train-0000.bin"
    if change == "missing":
        file.unlink()
    elif change == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-2] if change == "cut" else content + b"\0\0")
    with pytest.raises(MoevizError, match=r"the token shards in .*mine are damaged \("):
        opened(tmp_path, folder)


def test_mixtures_are_parsed_and_divided() -> None:
    shares = parse_mixture(("code=0.6", "stories=0.2"))
    tokens = {"code/python": 300, "code/rust": 100, "stories": 7, "news": 5}
    assert weights_of(shares, tokens) == pytest.approx(
        {"code/python": 0.45, "code/rust": 0.15, "stories": 0.2}
    )
    with pytest.raises(MoevizError, match=r"names 'poems', which the data has not; it has code/python"):
        weights_of({"poems": 1.0}, tokens)


@pytest.mark.parametrize("word", ["code", "code=", "=1", "code=-1", "code=many", "code=inf", "code=nan"])
def test_nonsense_in_a_mixture_is_refused(word: str) -> None:
    with pytest.raises(MoevizError, match="is not NAME=SHARE"):
        parse_mixture((word,))


def test_a_mixture_without_anything_or_with_a_name_twice_is_refused() -> None:
    with pytest.raises(MoevizError, match="every share of the mixture is 0"):
        parse_mixture(("a=0",))
    with pytest.raises(MoevizError, match="names 'a' twice"):
        parse_mixture(("a=1", "a=2"))


def test_batches_made_ahead_are_the_same(tmp_path: Path) -> None:
    shards = opened(tmp_path, write_texts(tmp_path / "a", seed=1)).shards
    options = {"batch_size": 3, "seq_len": 11, "seed": 4, "micro_batches": 2}
    plain, ahead = TokenBatches(shards, **options), PrefetchedBatches(shards, **options)
    order = [(step, micro) for step in range(6) for micro in range(2)]
    order += [(2, 0), (2, 1), (40, 1), (41, 0)]  # going back and jumping, as after a resume
    for step, micro in order:
        for rank in range(2):
            one, other = plain.batch(step, micro, rank, 2), ahead.batch(step, micro, rank, 2)
            assert np.array_equal(one.input_ids_BS, other.input_ids_BS)
            assert np.array_equal(one.labels_BS, other.labels_BS)
            assert one.domains == other.domains
    for first, count in ((0, 3), (3, 3), (6, 5), (11, 5), (16, 5)):
        one, other = plain.rows(first, count), ahead.rows(first, count)
        assert np.array_equal(one.input_ids_BS, other.input_ids_BS)
    assert ahead.waited_seconds > 0


def test_batches_are_there_before_they_are_asked_for(tmp_path: Path) -> None:
    shards = opened(tmp_path, write_texts(tmp_path / "a", seed=1)).shards
    ahead = PrefetchedBatches(shards, batch_size=3, seq_len=11)
    ahead.batch(0)
    ahead.batch(1)
    coming = ahead.coming
    assert list(coming) == [(6, 3), (9, 3), (12, 3)]
    made = coming[6, 3].result(timeout=60)
    assert ahead.batch(2) is made


def test_the_command_makes_a_folder_and_says_how_to_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEVIZ_CACHE", str(tmp_path / "cache"))
    texts, out = write_texts(tmp_path / "a", seed=1), tmp_path / "shards"
    assert command.main([f"mine={texts}", "--out", str(out), "--vocab-size", "300"]) == 0
    told = capsys.readouterr().out
    assert f"moeviz train --train-data {out}" in told
    assert "mine" in told
    assert command.main(["--check", str(out)]) == 0
    with pytest.raises(MoevizError, match="exists; name another folder"):
        command.main([str(texts), "--out", str(out)])
    with pytest.raises(MoevizError, match="holds tokens already"):
        command.main([str(out), "--out", str(tmp_path / "again")])
    with pytest.raises(MoevizError, match="nothing to prepare"):
        command.main([])
    capsys.readouterr()
    assert command.main([str(texts), "--vocab-size", "300"]) == 0
    assert f"moeviz train --train-data {texts} --vocab-size 300" in capsys.readouterr().out
