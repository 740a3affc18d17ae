"""Token files are read where they are, split once, and checked against the vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeviz.errors import MoevizError
from trainer.data import DataConfig, open_data
from trainer.data_tokens import TokenFormat, token_shards
from trainer.tokenizer import train_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 900, size=5000).astype(np.uint16)


def write(path: Path, tokens: np.ndarray = TOKENS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    return path


@pytest.mark.parametrize("name", ["ids.npy", "ids.bin"])
def test_one_file_is_cut_once_into_head_and_tail(name: str, tmp_path: Path) -> None:
    shards = token_shards(write(tmp_path / name), TokenFormat(vocab_size=900), validation_fraction=0.1)
    train, held_out = shards.tokens("train", "ids"), shards.tokens("validation", "ids")
    assert np.array_equal(np.concatenate([train, held_out]), TOKENS)
    assert len(held_out) == 500
    assert isinstance(train, np.memmap)


def test_the_cut_is_at_the_end_of_a_document(tmp_path: Path) -> None:
    tokens = np.tile(np.array([1, 2, 3, 4, 5, 6, 0], dtype=np.uint16), 100)
    token_format = TokenFormat(vocab_size=10, eos_id=0)
    shards = token_shards(write(tmp_path / "ids.npy", tokens), token_format, validation_fraction=0.1)
    assert shards.tokens("train", "ids")[-1] == 0
    assert shards.starts("train", "ids").tolist() == list(range(0, len(shards.tokens("train", "ids")), 7))


def test_train_and_val_files_keep_their_split(tmp_path: Path) -> None:
    write(tmp_path / "mix" / "code" / "train.bin", TOKENS[:3000])
    write(tmp_path / "mix" / "code" / "val.bin", TOKENS[3000:])
    write(tmp_path / "mix" / "train.bin", TOKENS[:40])
    shards = token_shards(tmp_path / "mix", TokenFormat(vocab_size=900))
    assert set(shards.arrays) == {("train", "code"), ("validation", "code"), ("train", "mix")}
    assert np.array_equal(shards.tokens("validation", "code"), TOKENS[3000:])


def test_files_of_one_folder_stay_apart(tmp_path: Path) -> None:
    write(tmp_path / "mix" / "web" / "a.bin", TOKENS[:3000])
    write(tmp_path / "mix" / "web" / "b.bin", TOKENS[3000:])
    shards = token_shards(tmp_path / "mix", TokenFormat(vocab_size=900), validation_fraction=0)
    assert shards.domains == ("web/a", "web/b")
    assert shards.num_tokens("train") == 5000


def test_a_validation_source_of_tokens(tmp_path: Path) -> None:
    config = DataConfig(
        source=str(write(tmp_path / "a.bin", TOKENS[:4000])),
        validation_source=str(write(tmp_path / "b.npy", TOKENS[4000:])),
        vocab_size=900,
    )
    data = open_data(config, root=tmp_path / "cache")
    assert (data.shards.num_tokens("train"), data.shards.num_tokens("validation")) == (4000, 1000)
    assert data.tokenizer is None
    assert not (tmp_path / "cache").exists()


def test_the_named_tokenizer_gives_vocabulary_and_eos(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["to be or not to be"], vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer.json")
    ids = np.array([*tokenizer.encode("to be"), tokenizer.eos_id] * 50, dtype=np.uint32)
    config = DataConfig(
        source=str(write(tmp_path / "a.npy", ids)), tokenizer=str(tmp_path / "tokenizer.json")
    )
    data = open_data(config)
    assert data.vocab_size == tokenizer.vocab_size
    assert data.shards.eos_id == tokenizer.eos_id
    assert len(data.shards.starts("train", "a")) > 40


def test_wide_vocabularies_are_read_in_32_bits(tmp_path: Path) -> None:
    wide = TOKENS.astype(np.uint32) + 70_000
    path = write(tmp_path / "a.bin", wide)
    shards = token_shards(path, TokenFormat(vocab_size=100_000), validation_fraction=0)
    assert np.array_equal(shards.tokens("train", "a"), wide)


@pytest.mark.parametrize(
    ("content", "token_format", "message"),
    [
        (TOKENS, TokenFormat(vocab_size=800), r"token id \d+ at position \d+, outside a vocabulary of 800"),
        (TOKENS.astype(np.uint32), TokenFormat(vocab_size=900), "looks like uint32"),
        (TOKENS[:0], TokenFormat(vocab_size=900), "is empty"),
        (TOKENS[:5].view(np.uint8)[:9], TokenFormat(vocab_size=900), "9 bytes, no multiple of uint16"),
    ],
)
def test_bin_files_that_do_not_fit(
    content: np.ndarray, token_format: TokenFormat, message: str, tmp_path: Path
) -> None:
    with pytest.raises(MoevizError, match=message):
        token_shards(write(tmp_path / "a.bin", content), token_format)


def test_the_first_id_out_of_range_is_the_one_named(tmp_path: Path) -> None:
    tokens = TOKENS.copy()
    tokens[[1234, 2000]] = 901
    with pytest.raises(MoevizError, match="token id 901 at position 1234,"):
        token_shards(write(tmp_path / "a.npy", tokens), TokenFormat(vocab_size=900))


@pytest.mark.parametrize("array", [TOKENS.reshape(50, 100), TOKENS.astype(np.float32), TOKENS[:0]])
def test_arrays_that_are_no_list_of_ids(array: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match="one dimension of integers"):
        token_shards(write(tmp_path / "a.npy", array), TokenFormat(vocab_size=900))


def test_negative_ids_and_files_that_are_no_array(tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match="token id -1"):
        token_shards(write(tmp_path / "a.npy", np.array([1, -1])), TokenFormat(vocab_size=900))
    (tmp_path / "b.npy").write_bytes(b"no array")
    with pytest.raises(MoevizError, match=r"no \.npy array"):
        token_shards(tmp_path / "b.npy", TokenFormat(vocab_size=900))


def test_missing_files_and_text_beside_tokens(tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match="no file or folder"):
        open_data(DataConfig(source=str(tmp_path / "none.bin")))
    write(tmp_path / "a.bin")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(MoevizError, match="text beside token files needs the tokenizer"):
        open_data(DataConfig(source=str(tmp_path / "a.bin"), validation_source=str(tmp_path / "b.txt")))
    with pytest.raises(MoevizError, match="text beside token files needs the tokenizer"):
        open_data(DataConfig(source=str(tmp_path / "a.bin"), validation_source="builtin"))
