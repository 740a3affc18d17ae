"""The embedded corpus: the same bytes everywhere where it says so, labelled, split by document, safely cached."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from moeviz.errors import MoevizError
from trainer.corpus import DOMAINS, CorpusConfig, Document, build_corpus
from trainer.corpus.documents import choose_held_out, split_of, without_copies
from trainer.corpus.installed import package_folder
from trainer.data_cache import cache_folder, cached

GENERATED = tuple(domain for domain in DOMAINS if domain.layer == "generated")
FOUND = tuple(domain for domain in DOMAINS if domain.layer != "generated")

PINNED = {
    "arithmetic": "54a1fcc5d53d8d83",
    "stories": "b58a1dee900820c2",
    "dialogue": "525d352134f6dc80",
    "json": "3b101536a6b4ac95",
    "spanish": "237f8a59bbe1abf2",
    "french": "9685f9a0034ec7f1",
    "german": "8143e1b29ecdd463",
    "russian": "9a2db81b79c4a842",
}


def first_texts(name: str, count: int, seed: int = 0) -> list[str]:
    domain = next(domain for domain in DOMAINS if domain.name == name)
    return list(itertools.islice(domain.texts(seed), count))


def digest_of(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory):
    config = CorpusConfig(generated_only=True, bytes_per_domain=40_000)
    return build_corpus(config, quiet=True, root=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", [domain.name for domain in GENERATED])
def test_generated_domains_are_the_same_bytes_everywhere(name: str) -> None:
    assert digest_of(first_texts(name, 40)) == PINNED[name]


@pytest.mark.parametrize("name", [domain.name for domain in GENERATED])
def test_another_seed_writes_other_documents(name: str) -> None:
    assert not set(first_texts(name, 40, seed=0)) & set(first_texts(name, 40, seed=1))


def test_generated_text_does_not_depend_on_hash_randomisation() -> None:
    code = (
        "import hashlib, itertools; from trainer.corpus.domains import DOMAINS\n"
        "texts = [t for d in DOMAINS if d.layer == 'generated' for t in itertools.islice(d.texts(3), 5)]\n"
        "print(hashlib.sha256(repr(texts).encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_the_whole_corpus_has_thirteen_domains_of_equal_size(tmp_path: Path) -> None:
    if package_folder("torch") is None or package_folder("sympy") is None:
        pytest.skip("two of the domains come with torch")
    corpus = build_corpus(CorpusConfig(bytes_per_domain=60_000), quiet=True, root=tmp_path)
    assert len(corpus.domains) == 13
    assert corpus.manifest["absent"] == []
    for name, entry in corpus.manifest["domains"].items():
        assert 40_000 < entry["bytes"] <= 60_000, name
        assert entry["validation_documents"] >= 1, name


def test_without_torch_its_domains_are_absent_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.corpus.installed.package_folder", lambda name: None)
    corpus = build_corpus(CorpusConfig(bytes_per_domain=5_000), quiet=True, root=tmp_path)
    assert corpus.manifest["absent"] == ["cpp", "doctest"]
    assert len(corpus.domains) == 11


@pytest.mark.parametrize("name", [domain.name for domain in FOUND])
def test_found_domains_come_in_the_same_order_each_time(name: str) -> None:
    texts = first_texts(name, 30)
    if not texts:
        pytest.skip(f"nothing of {name} is installed here")
    assert texts == first_texts(name, 30)
    assert all(text.strip() and text.endswith("\n") for text in texts)


def test_the_manifest_tells_what_the_files_hold(generated) -> None:
    for name, entry in generated.manifest["domains"].items():
        content = (generated.path / f"{name}.jsonl").read_bytes()
        rows = [orjson.loads(line) for line in content.splitlines()]
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["documents"] == len(rows)
        assert entry["bytes"] == sum(len(row["text"].encode()) for row in rows)
        assert entry["validation_documents"] == sum(row["split"] == "validation" for row in rows)
    assert {row.domain for row in generated.documents()} == set(generated.domains)


def test_no_document_is_there_twice_and_none_is_on_both_sides(generated) -> None:
    documents = list(generated.documents())
    assert len({document.text for document in documents}) == len(documents)
    sides = {split: {d.text for d in documents if d.split == split} for split in ("train", "validation")}
    assert sides["validation"]
    assert not sides["train"] & sides["validation"]


def test_a_document_keeps_its_side_when_others_are_added() -> None:
    ids = [document.id for document in (Document("x", f"text {i}") for i in range(500))]
    few = choose_held_out([Document("x", f"text {i}") for i in range(250)], 0.1)
    many = choose_held_out([Document("x", f"text {i}") for i in range(500)], 0.1)
    assert few <= many
    assert len(many) == sum(split_of(name, 0.1) == "validation" for name in ids)
    assert 25 <= len(many) <= 85  # 50 expected, five standard deviations


def test_a_small_domain_still_holds_one_document_out() -> None:
    held_out = choose_held_out([Document("x", f"text {i}") for i in range(10)], 1e-9)
    assert held_out == {min(Document("x", f"text {i}").id for i in range(10))}
    assert choose_held_out([Document("x", f"text {i}") for i in range(10)], 0.0) == set()


def test_copies_are_dropped_across_domains() -> None:
    documents = [Document("a", "one"), Document("b", "one"), Document("a", "two"), Document("a", " \n")]
    assert list(without_copies(documents)) == [documents[0], documents[2]]


def test_the_seed_and_the_size_are_part_of_the_key(tmp_path: Path) -> None:
    configs = [
        CorpusConfig(generated_only=True, bytes_per_domain=size, seed=seed)
        for size, seed in ((3_000, 0), (3_000, 1), (4_000, 0))
    ]
    corpora = [build_corpus(config, quiet=True, root=tmp_path) for config in configs]
    assert len({corpus.path for corpus in corpora}) == 3
    assert len({corpus.key for corpus in corpora}) == 3
    assert build_corpus(configs[0], quiet=True, root=tmp_path).path == corpora[0].path


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bytes_per_domain": 0}, "bytes_per_domain=0"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_config_out_of_range_is_refused(fields: dict, named: str) -> None:
    with pytest.raises(MoevizError, match=named):
        CorpusConfig(**fields)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MOEVIZ_CACHE", raising=False)
    assert cache_folder() == tmp_path / "xdg" / "moeviz"
    monkeypatch.setenv("MOEVIZ_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MoevizError, match=r"No space left on device; free space, or point MOEVIZ_CACHE"):
        cached("corpus", "key", fail, root=tmp_path)
    assert list((tmp_path / "corpus").iterdir()) == []


def test_a_cache_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoevizError, match="MOEVIZ_CACHE"):
        build_corpus(CorpusConfig(bytes_per_domain=100), quiet=True, root=tmp_path / "file")


def test_a_bug_while_building_is_not_dressed_up_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached("corpus", "key", fail, root=tmp_path)
    assert list((tmp_path / "corpus").iterdir()) == []


def test_abandoned_work_of_a_dead_builder_is_cleared_away(tmp_path: Path) -> None:
    old, young = tmp_path / "corpus" / ".a.x.tmp", tmp_path / "corpus" / ".b.y.tmp"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (0, 0))
    cached("corpus", "key", lambda folder: None, root=tmp_path)
    assert not old.exists()
    assert young.exists()


def _build_in_process(root: Path, barrier, results) -> None:
    barrier.wait()
    corpus = build_corpus(CorpusConfig(generated_only=True, bytes_per_domain=20_000), quiet=True, root=root)
    results.put(sum(1 for _ in corpus.documents()))


def test_builders_at_the_same_time_end_with_one_whole_corpus(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    builders = [
        context.Process(target=_build_in_process, args=(tmp_path, barrier, results)) for _ in range(3)
    ]
    for builder in builders:
        builder.start()
    counts = {results.get(timeout=300) for _ in builders}
    for builder in builders:
        builder.join(timeout=300)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    assert len(counts) == 1
    assert len(list((tmp_path / "corpus").iterdir())) == 1


def test_a_damaged_manifest_says_what_to_delete(generated, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(MoevizError, match="delete that folder"):
        type(generated)(tmp_path)
    assert json.loads((generated.path / "manifest.json").read_text())["seed"] == 0
