"""Tokenizers of Hugging Face: exact round trips, known lengths, and a clear refusal of what cannot end a text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moeviz.errors import MoevizError
from trainer.tokenizer import load_tokenizer
from trainer.tokenizer_hub import HubTokenizer

SHARED = Path(os.environ.get("MOEVIZ_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
OLMO = SHARED / "olmoe_routing" / "allenai_gpt-neox-olmo-dolma-v1_5.tokenizer.json"
TEXT = "def area(a, b):\n    return a * b  # naïve “quotes” 北京\n\n<|endoftext|> is text\n"


def byte_level(end: str = "<|endoftext|>") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[end],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    return tokenizer


def starcoder2() -> Tokenizer:
    """StarCoder2's kind: digits one by one, GPT-2's words, and marks for files and repositories besides the end."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens(["<fim_prefix>", "<repo_name>", "<file_sep>"])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Llama's kind: spaces as \u2581, bytes as <0x0A> where there is no character."""
    alphabet = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdefgh"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(alphabet)}, merges=[], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2, "</s>": 3}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> HubTokenizer:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    assert isinstance(loaded, HubTokenizer)
    return loaded


@pytest.mark.parametrize("make", [byte_level, starcoder2, sentence_piece])
def test_text_comes_back_and_its_length_is_the_sum_of_its_tokens(make, tmp_path: Path) -> None:
    tokenizer = saved(make(), tmp_path / "mine")
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    lengths_V = tokenizer.token_lengths()
    assert lengths_V is not None
    assert lengths_V[ids].sum() == len(TEXT.encode())
    assert lengths_V[tokenizer.eos_id] == 0
    assert tokenizer.eos_id not in ids, "what looks like the end of a document is text"
    assert tokenizer.name == "mine"


@pytest.mark.parametrize("make", [byte_level, starcoder2, sentence_piece])
def test_what_is_saved_with_a_run_is_the_same_tokenizer(make, tmp_path: Path) -> None:
    tokenizer = saved(make(), tmp_path / "mine")
    tokenizer.save(tmp_path / "kept.json")
    again = load_tokenizer(tmp_path / "kept.json")
    assert (again.key, again.name, again.eos_id) == (tokenizer.key, tokenizer.name, tokenizer.eos_id)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_a_batch_is_encoded_like_its_members(tmp_path: Path) -> None:
    tokenizer = saved(byte_level(), tmp_path / "mine")
    rows = tokenizer.encode_batch([TEXT, "a", ""])
    assert [row.tolist() for row in rows] == [tokenizer.encode(TEXT), tokenizer.encode("a"), []]
    assert all(row.dtype == np.uint32 for row in rows)


def test_every_id_has_a_text_that_spells_its_bytes(tmp_path: Path) -> None:
    tokenizer = saved(byte_level(), tmp_path / "mine")
    texts, lengths_V = tokenizer.token_texts(), tokenizer.token_lengths()
    assert lengths_V is not None
    assert len(texts) == len(lengths_V) == tokenizer.vocab_size
    for i, text in enumerate(texts):
        if "\\x" not in text and i != tokenizer.eos_id:
            assert len(text.encode()) == lengths_V[i], (i, text)


def test_the_end_of_a_document_is_what_the_config_beside_it_says(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    tokenizer = byte_level(end="<|endoftext|>")
    tokenizer.add_special_tokens(["<|done|>"])
    assert saved(tokenizer, folder).eos_id == tokenizer.token_to_id("<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|done|>"}}))
    assert load_tokenizer(folder).eos_id == tokenizer.token_to_id("<|done|>")


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tmp_path: Path) -> None:
    byte_level(end="<|pad|>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MoevizError, match=r"no token that ends a document.*tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_json_names_the_file(tmp_path: Path) -> None:
    content = json.loads(byte_level().to_str()) | {"model": {"type": "BPE", "vocab": 3}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MoevizError, match=r"cannot read .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_where_spaces_are_lost_no_length_is_claimed(tmp_path: Path) -> None:
    assert saved(word_piece(), tmp_path / "mine").token_lengths() is None


@pytest.mark.skipif(not OLMO.exists(), reason="needs the shared data: set MOEVIZ_SHARED_DATA")
def test_the_tokenizer_of_olmo_round_trips_and_its_lengths_add_up() -> None:
    tokenizer = load_tokenizer(OLMO)
    ids = tokenizer.encode(TEXT * 5 + "    " * 40)
    lengths_V = tokenizer.token_lengths()
    assert lengths_V is not None
    assert tokenizer.decode(ids) == TEXT * 5 + "    " * 40
    assert lengths_V[ids].sum() == len((TEXT * 5 + "    " * 40).encode())
    assert tokenizer.token_texts()[tokenizer.eos_id] == "<|endoftext|>"
