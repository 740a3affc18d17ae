"""`moeviz export` writes a folder that transformers opens as the same function, or says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from safetensors.torch import load_file
from trainer_runs import toy

from model.config import ModelConfig, RouterConfig
from moeviz.cli import main
from trainer.checkpoint import load_checkpoint
from trainer.progress import Silent
from trainer.tokenizer import BytePairTokenizer
from trainer.tokenizer_export import as_hub_tokenizer
from trainer.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEVIZ_CACHE", str(folder / "cache"))
        sigmoid = {"router": RouterConfig(score="sigmoid"), "num_shared_experts": 1}
        train(toy(folder / "sigmoid", max_steps=2, model=sigmoid), progress=Silent())
        train(toy(folder / "softmax", max_steps=1), progress=Silent())
    return folder


def test_transformers_computes_the_same(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs / "sigmoid"), str(tmp_path / "out")]) == 0
    assert "step 2 of" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = load_checkpoint(next((runs / "sigmoid" / "checkpoints").glob("step-*"))).model
    ids_BS = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_BS).logits, ours(ids_BS).logits_BSV, rtol=1e-4, atol=1e-4)


def test_a_model_of_no_family_is_refused_in_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs / "softmax"), str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert "was not exported: no family of transformers computes this model" in line
    assert "router.selection_bias=True" in line
    assert main(["export", str(runs / "nowhere"), str(tmp_path / "out")]) == 1
    assert "no run at" in capsys.readouterr().err


TEXTS = (
    "The quick brown fox's 12345 jumps",
    "def f(x):\n\treturn  x ** 2   # why?\n\n\n",
    "Ünïcödé 漢字 🙂 \x00\xff",
    "",
    "   leading and trailing   ",
    "<|eos|> is text",
)


def test_their_tokenizer_gives_the_same_ids(runs: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / "sigmoid"), str(tmp_path / "out")]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_checkpoint(next((runs / "sigmoid" / "checkpoints").glob("step-*"))).tokenizer
    assert ours is not None
    for text in TEXTS[:-1]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text), text
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (None, ours.eos_id)


def test_overlapping_merges_are_all_listed() -> None:
    """Tokens that two different pairs make: tiktoken takes either, so both must be spelled out."""
    ranks = {bytes([value]): value for value in range(256)}
    for token in (b"ab", b"bc", b"abc", b"bcd", b"abcd", b"cd"):
        ranks[token] = len(ranks)
    encoding = tiktoken.Encoding(
        name="t", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|eos|>": 300}
    )
    inner = as_hub_tokenizer(BytePairTokenizer(encoding, 300))
    assert inner.token_to_id("<|eos|>") == 300
    for text in ("abcd", "abcdabc", "bcdab", "aabbccdd abcabcd", "xbcdx"):
        assert inner.encode(text).ids == encoding.encode_ordinary(text), text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_any_model_leave_as_one_file(dtype: torch.dtype, runs: Path, tmp_path: Path) -> None:
    words = ["--format", "safetensors", "--dtype", "bf16" if dtype == torch.bfloat16 else "fp32"]
    assert main(["export", str(runs / "softmax"), str(tmp_path / "out"), *words]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    trained = load_checkpoint(next((runs / "softmax" / "checkpoints").glob("step-*"))).model
    config = ModelConfig.from_dict(json.loads((tmp_path / "out" / "model.json").read_text()))
    assert config == trained.config
    assert weights.keys() == trained.state_dict().keys()
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(weights[name], trained.state_dict()[name].to(dtype))
    assert main(["export", str(runs / "softmax"), str(tmp_path / "out"), *words]) == 1
