"""Sources and shards: every document once, on one side, and each mistake named with its place."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from moeviz.errors import MoevizError
from trainer.corpus.documents import document_id, split_of
from trainer.data import DataConfig, TrainingData, open_data, training_sample
from trainer.data_shards import load_shards
from trainer.data_sources import file_source, labelled_files

SMALL = {"bytes_per_domain": 30_000, "vocab_size": 700}


def sentences(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghij"))
    return [" ".join("".join(rng.choice(letters, size=5)) for _ in range(30)) for _ in range(count)]


def open_quietly(tmp_path: Path, **fields) -> TrainingData:
    return open_data(DataConfig(**fields), quiet=True, root=tmp_path / "cache")


def documents_of(data: TrainingData, split: str, domain: str) -> list[str]:
    """Texts cut at the shard's own index."""
    assert data.tokenizer is not None
    tokens, starts = data.shards.tokens(split, domain), data.shards.starts(split, domain)
    ends = [*starts[1:], len(tokens)]
    assert all(tokens[end - 1] == data.shards.eos_id for end in ends)
    return [data.tokenizer.decode(tokens[a : b - 1]) for a, b in zip(starts, ends, strict=True)]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    config = DataConfig(source="generated", **SMALL)
    return open_data(config, quiet=True, root=tmp_path_factory.mktemp("cache"))


def test_shards_hold_every_document_of_the_corpus_once(generated: TrainingData) -> None:
    from trainer.corpus import Corpus

    corpus = Corpus(generated.paths[0])
    for split in ("train", "validation"):
        for domain in corpus.domains:
            written = documents_of(generated, split, domain)
            assert written == [d.text for d in corpus.documents() if (d.split, d.domain) == (split, domain)]


def test_no_validation_document_is_in_the_training_tokens(generated: TrainingData) -> None:
    stream = {name: "".join(documents_of(generated, "train", name)) for name in generated.shards.domains}
    checked = 0
    for name in generated.shards.domains:
        for text in documents_of(generated, "validation", name):
            assert not any(text in training for training in stream.values())
            checked += 1
    assert checked >= len(generated.shards.domains)


def test_few_long_token_windows_of_validation_are_in_training(generated: TrainingData) -> None:
    """Independent of fingerprints: 64-token windows, compared as bytes. Templates make some short ones equal."""

    def windows(split: str, size: int = 64) -> set[bytes]:
        found: set[bytes] = set()
        for name in generated.shards.domains:
            tokens = np.asarray(generated.shards.tokens(split, name))
            found |= {tokens[i : i + size].tobytes() for i in range(0, len(tokens) - size)}
        return found

    held_out = windows("validation")
    assert len(held_out) > 1000
    assert len(held_out & windows("train")) < 0.02 * len(held_out)


def test_shards_are_memory_mapped_and_as_small_as_the_vocabulary_allows(generated: TrainingData) -> None:
    tokens = generated.shards.tokens("train", "stories")
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert int(tokens.max()) < generated.vocab_size


def test_a_second_opening_finds_everything_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_quietly(tmp_path, source="generated", **SMALL)
    monkeypatch.setattr("trainer.data_cache.tempfile.mkdtemp", lambda **kwargs: pytest.fail("built again"))
    second = open_quietly(tmp_path, source="generated", **SMALL)
    assert second.paths == first.paths
    assert second.shards.key == first.shards.key


def test_a_changed_file_makes_new_shards(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    keys = []
    for seed in (0, 1):
        file.write_text("\n\n".join(sentences(seed, 300)))
        keys.append(open_quietly(tmp_path, source=str(file), vocab_size=300).shards.key)
    assert keys[0] != keys[1]


def test_a_text_file_is_cut_into_documents_and_loses_nothing(tmp_path: Path) -> None:
    paragraphs = sentences(0, 400)
    (tmp_path / "novel.txt").write_text("\n\n".join(paragraphs))
    data = open_quietly(tmp_path, source=str(tmp_path / "novel.txt"), vocab_size=400)
    assert data.shards.domains == ("novel",)
    sides = {split: documents_of(data, split, "novel") for split in ("train", "validation")}
    assert len(sides["validation"]) >= 1
    found = [p for texts in sides.values() for text in texts for p in text.strip().split("\n\n")]
    assert sorted(found) == sorted(paragraphs)


def test_a_folder_labels_by_subfolder_or_file_name(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for path in ("law/a.txt", "law/deep/b.txt", "poems.txt", "plays.md", ".hidden/c.txt", "law/.d.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("\n\n".join(sentences(len(path), 20)))
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    source = file_source(folder)
    assert [file.domain for file in source.files] == ["law", "law", "plays", "poems"]


def test_many_loose_files_are_one_domain(tmp_path: Path) -> None:
    folder = tmp_path / "novels"
    folder.mkdir()
    for i in range(33):
        (folder / f"{i}.txt").write_text("x")
    assert {file.domain for file in labelled_files(folder)} == {"novels"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_bring_their_own_domains(name: str, tmp_path: Path) -> None:
    texts = sentences(3, 60)
    rows = [{"text": t, ("domain", "source", "kind")[i % 3]: "abc"[i % 3]} for i, t in enumerate(texts)]
    content = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    opener = gzip.open if name.endswith("gz") else open
    with opener(tmp_path / name, "wt") as file:
        file.write(content)
    data = open_quietly(tmp_path, source=str(tmp_path / name), vocab_size=300)
    assert data.shards.domains == ("a", "b", "rows")
    for i, domain in enumerate(("a", "b", "rows")):
        written = documents_of(data, "train", domain) + documents_of(data, "validation", domain)
        assert sorted(written) == sorted(texts[i::3])


def test_the_side_of_a_users_document_is_a_function_of_its_text(tmp_path: Path) -> None:
    texts = sentences(4, 400)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    data = open_quietly(tmp_path, source=str(tmp_path / "a.jsonl"), vocab_size=300, validation_fraction=0.1)
    assert set(documents_of(data, "validation", "a")) == {
        t for t in texts if split_of(document_id(t), 0.1) != "train"
    }


def test_near_copies_of_training_text_leave_validation(tmp_path: Path) -> None:
    texts = sentences(5, 200)
    copies = [text[:-1] + "Z" for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts + copies))
    data = open_quietly(tmp_path, source=str(tmp_path / "a.jsonl"), vocab_size=300, validation_fraction=0.2)
    training = {text[:-1] for text in documents_of(data, "train", "a")}
    held_out = [text[:-1] for text in documents_of(data, "validation", "a")]
    assert not training & set(held_out)
    assert len(held_out) >= 2  # pairs of which both sides were held out: 8 expected, of 200


def test_a_validation_source_is_all_held_out(tmp_path: Path) -> None:
    train, other = sentences(6, 50), sentences(7, 20)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in train))
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*other, train[0]]))
    data = open_quietly(
        tmp_path,
        source=str(tmp_path / "train.jsonl"),
        validation_source=str(tmp_path / "other.jsonl"),
        vocab_size=300,
    )
    assert documents_of(data, "train", "train") == train
    assert documents_of(data, "validation", "other") == other  # without the copy of a training text
    assert data.shards.num_tokens("validation", "train") == 0


def test_the_tokenizer_never_sees_a_held_out_document(tmp_path: Path) -> None:
    texts = sentences(8, 300)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    sample = list(training_sample(file_source(tmp_path / "a.jsonl"), 0.3))
    assert set(sample) == {t for t in texts if split_of(document_id(t), 0.3) == "train"}


def test_validation_that_only_repeats_training_is_said_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(sentences(9, 50)))
    (tmp_path / "b.txt").write_text(sentences(9, 50)[3][:-1])
    with caplog.at_level(logging.WARNING, logger="moeviz.data"):
        open_quietly(
            tmp_path,
            source=str(tmp_path / "a.txt"),
            validation_source=str(tmp_path / "b.txt"),
            vocab_size=300,
        )
    assert "nothing to evaluate on" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"text": "broken\n', "line 2 is not JSON"),
        ('{"text": "fine"}\n\n{"body": "x"}\n', r"line 3 has no string field 'text' \(found: body\)"),
        ('{"text": 5}\n', "line 1 has no string field 'text'"),
        ('["text"]\n', r"line 1 has no string field 'text' \(found: list\)"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(MoevizError, match=message):
        open_quietly(tmp_path, source=str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file or folder at"),
        ({"data/": b""}, "no text in"),
        ({"data/a.txt": b"  \n \n"}, "corpus is empty"),
        ({"data/a.jsonl": b'{"text": ""}\n'}, "corpus is empty"),
        ({"data/a.txt": b"caf\xe9\n"}, r"a.txt line 1 is not UTF-8 .* iconv"),
        ({"data/a.jsonl.gz": b"not gzip"}, "not a whole gzip file"),
        ({"data/a.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 9)[:-9]}, "not a whole gzip file"),
        ({"data/a.txt": b"text", "data/b.npy": b"x"}, "mixes text with token files"),
    ],
)
def test_sources_that_cannot_be_read(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_bytes(content)
    with pytest.raises(MoevizError, match=message):
        open_quietly(tmp_path, source=str(tmp_path / "data"), vocab_size=300)


def test_too_many_domains_are_refused(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"text {i}", "source": f"http://{i}"}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(MoevizError, match="300 domains are more than 256"):
        open_quietly(tmp_path, source=str(tmp_path / "a.jsonl"), vocab_size=300)


def test_damaged_shards_say_what_to_delete(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(1, 40)))
    path = open_quietly(tmp_path, source=str(tmp_path / "a.txt"), vocab_size=300).shards.path
    assert path is not None
    victim = next(path.glob("train-*.bin"))
    victim.write_bytes(victim.read_bytes()[:10])
    with pytest.raises(MoevizError, match=r"damaged .* delete that folder"):
        load_shards(path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_is_one_clear_error(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("trainer.data_cache.tempfile.mkdtemp", refuse)
    with pytest.raises(MoevizError, match=rf"{os.strerror(code)}; free space, or point MOEVIZ_CACHE"):
        open_quietly(tmp_path, source="generated", **SMALL)


def _open_in_process(root: Path, results) -> None:
    data = open_data(DataConfig(source="generated", **SMALL), quiet=True, root=root)
    results.put((data.shards.key, data.shards.num_tokens("train")))


def test_ranks_that_build_at_the_same_time_read_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_open_in_process, args=(tmp_path, results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert len({results.get(timeout=300) for _ in ranks}) == 1
    for rank in ranks:
        rank.join(timeout=300)
        assert rank.exitcode == 0


def test_real_text_when_it_is_at_hand(tmp_path: Path) -> None:
    shared = Path(os.environ.get("MOEVIZ_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    play = shared / "tinyshakespeare" / "input.txt"
    if not play.exists():
        pytest.skip("needs tinyshakespeare; set MOEVIZ_SHARED_DATA")
    data = open_quietly(tmp_path, source=str(play), vocab_size=1024)
    texts = [t for split in ("train", "validation") for t in documents_of(data, split, "input")]
    assert sum(len(t.replace("\n", "")) for t in texts) == len(play.read_text().replace("\n", ""))
    assert 0.01 < data.shards.num_tokens("validation") / data.shards.num_tokens("train") < 0.15
