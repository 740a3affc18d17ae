"""The tokenizer loses no byte, reloads as it was, and says what is wrong when it cannot be had."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import random
from pathlib import Path

import orjson
import pytest
import tiktoken

from moeviz.errors import MoevizError
from trainer.corpus import CorpusConfig, build_corpus
from trainer.data import open_tokenizer
from trainer.tokenizer import (
    EOS,
    BytePairTokenizer,
    Tokenizer,
    load_tokenizer,
    named_tokenizer,
    train_tokenizer,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory):
    config = CorpusConfig(bytes_per_domain=50_000)
    return build_corpus(config, quiet=True, root=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(corpus) -> Tokenizer:
    return train_tokenizer((document.text for document in corpus.documents()), vocab_size=2048)


def toy_bpe(text: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte pair encoding by the book: merge the pair of lowest rank until there is none."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, at = min(pairs, default=(1 << 30, 0))
        if rank == 1 << 30:
            return [ranks[part] for part in parts]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_the_vocabulary_is_the_size_asked_for_and_ends_with_eos(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 2048
    assert tokenizer.eos_id == 2047
    assert tokenizer.decode([2047]) == EOS


def test_every_domain_round_trips(tokenizer: Tokenizer, corpus) -> None:
    for document in corpus.documents():
        assert tokenizer.decode(tokenizer.encode(document.text)) == document.text


def test_any_bytes_round_trip(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        data = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 60)))
        ids = tokenizer.encoding._encode_bytes(data)
        assert tokenizer.encoding.decode_bytes(ids) == data


def test_all_256_bytes_have_a_token(tokenizer: Tokenizer) -> None:
    singles = {tokenizer.encoding.decode_single_token_bytes(i) for i in range(256)}
    assert singles == {bytes([value]) for value in range(256)}


def test_text_that_looks_like_eos_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a {EOS} b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a {EOS} b"


def test_encoding_agrees_with_byte_pair_encoding_by_the_book(tokenizer: Tokenizer) -> None:
    ranks = tokenizer.encoding._mergeable_ranks
    for word in ("gardener", "library", "remainder", "Großmutter", "подруга", "def"):
        assert tokenizer.encode(word) == toy_bpe(word.encode(), ranks)


def test_a_batch_is_encoded_like_its_members(tokenizer: Tokenizer, corpus) -> None:
    texts = [document.text for document in corpus.documents()][:50]
    rows = tokenizer.encode_batch(texts)
    assert [row.tolist() for row in rows] == [tokenizer.encode(text) for text in texts]
    assert rows[0].dtype == "uint32"


def test_training_twice_gives_the_same_tokenizer(tokenizer: Tokenizer, corpus) -> None:
    again = train_tokenizer((document.text for document in corpus.documents()), vocab_size=2048)
    assert again.key == tokenizer.key


def test_it_compresses_each_domain(tokenizer: Tokenizer, corpus) -> None:
    for name in corpus.domains:
        text = "".join(document.text for document in corpus.documents() if document.domain == name)
        assert len(text.encode()) / len(tokenizer.encode(text)) > 1.6, name


def test_a_saved_tokenizer_is_the_same_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.key == tokenizer.key
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.encode("the old bridge, 1234 мост\n") == tokenizer.encode("the old bridge, 1234 мост\n")
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).key == tokenizer.key


def test_a_small_text_gives_a_small_vocabulary() -> None:
    small = train_tokenizer(["to be or not to be"], vocab_size=4096)
    assert 257 < small.vocab_size < 300
    assert small.eos_id == small.vocab_size - 1
    assert small.decode(small.encode("to be é 漢")) == "to be é 漢"


def test_every_token_has_a_text(tokenizer: Tokenizer) -> None:
    texts = tokenizer.token_texts()
    assert len(texts) == tokenizer.vocab_size
    assert texts[tokenizer.eos_id] == EOS
    assert texts[ord("a")] == "a"
    assert texts[0xE2] == "\\xe2"
    for i in tokenizer.encode("The old ferryman knew the river."):
        assert texts[i].encode() == tokenizer.encoding.decode_single_token_bytes(i)


def test_ids_that_stand_for_nothing_have_a_text_too() -> None:
    ranks = {bytes([value]): value for value in range(256)}
    gap = tiktoken.Encoding("gap", pat_str=".", mergeable_ranks=ranks, special_tokens={EOS: 260})
    texts = BytePairTokenizer(gap, 260).token_texts()
    assert len(texts) == 261
    assert texts[257] == "<|unused 257|>"


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(MoevizError, match="vocab_size=256 is below 257"):
        train_tokenizer(["text"], vocab_size=256)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": "other"}', '{"format": "moeviz-tokenizer/1"}', "{"]
)
def test_a_file_that_is_no_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(MoevizError, match=r"no tokenizer of moeviz"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_file_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match="no tokenizer at"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MoevizError, match=r"no tokenizer 'gpt-9'.*cl100k_base"):
        open_tokenizer("gpt-9")


def test_offline_a_named_encoding_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(MoevizError, match=r"'p50k_base' is not here.*pip install bpe-openai"):
        named_tokenizer("p50k_base", cache=tmp_path)


def test_a_named_encoding_is_saved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer) -> None:
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=r"\S+|\s+",
        mergeable_ranks=tokenizer.encoding._mergeable_ranks,
        special_tokens={"<|endoftext|>": 5000},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    named = named_tokenizer("gpt2", cache=tmp_path)
    assert (named.eos_id, named.vocab_size) == (5000, 5001)
    named.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("a b c") == named.encode("a b c")


@pytest.mark.skipif(importlib.util.find_spec("bpe_openai") is None, reason="bpe-openai is not installed")
def test_bpe_openai_serves_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    named = named_tokenizer("cl100k_base", cache=tmp_path)
    assert named.encode("hello world") == [15339, 1917]


def test_the_saved_file_holds_readable_fields(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    content = orjson.loads((tmp_path / "tokenizer.json").read_bytes())
    assert content["special_tokens"] == {EOS: 2047}
    assert content["tokens"][base64.b64encode(b"the").decode()] == tokenizer.encoding.encode_single_token(
        "the"
    )


def test_saving_to_a_place_that_cannot_be_written_is_one_clear_error(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoevizError, match="cannot write"):
        tokenizer.save(tmp_path / "file" / "tokenizer.json")
