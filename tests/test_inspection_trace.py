"""An inspected checkpoint says what the model itself decides, in the table, in the run and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.config import ModelConfig, RouterConfig
from model.lm import MoELanguageModel
from moeviz.cli import main
from moeviz.errors import MoevizError
from moeviz.inspection.checkpoint import OpenedCheckpoint
from moeviz.inspection.trace import passages, trace
from moeviz.store.queries import attention_index, attention_map, trace_arrays
from moeviz.store.reader import open_run

VOCAB = [chr(97 + index) for index in range(20)]


def opened(model: nn.Module, max_seq_len: int = 16) -> OpenedCheckpoint:
    return OpenedCheckpoint(
        path=Path("nowhere"),
        name="tiny",
        model=model.eval(),
        encode=lambda text: [VOCAB.index(letter) for letter in text],
        token_texts=VOCAB,
        max_seq_len=max_seq_len,
    )


def tiny_model() -> MoELanguageModel:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=len(VOCAB),
        dim=16,
        num_layers=2,
        num_heads=2,
        num_experts=5,
        top_k=2,
        expert_dim=12,
        max_seq_len=16,
        init_std=0.5,
        router=RouterConfig(score="sigmoid", selection_bias=True),
    )
    model = MoELanguageModel(config)
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.gate.e_score_correction_bias)  # else the bias path is not exercised
    return model


def decisions_of(model: MoELanguageModel, ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(experts [L, S, K], weights [L, S, K], loss [S-1]) read by hooks of the test's own."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda _m, _a, out: seen.append((out.expert_ids_TK, out.weights_TK))
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits_BSV[0]
    for handle in handles:
        handle.remove()
    log_probs = logits.double().log_softmax(-1)
    loss = [-float(log_probs[at, ids[at + 1]]) for at in range(len(ids) - 1)]
    return (
        np.stack([ids_TK.numpy() for ids_TK, _ in seen]),
        np.stack([weights_TK.numpy() for _, weights_TK in seen]),
        np.array(loss),
    )


def test_trace_is_what_the_model_decides(tmp_path: Path) -> None:
    model, text = tiny_model(), "abcabdtsrq"
    trace(opened(model), [text, "hello"[:4] + "o"], tmp_path / "run")
    experts_LSK, weights_LSK, loss_S = decisions_of(model, [VOCAB.index(c) for c in text])
    with open_run(tmp_path / "run") as store:
        found = trace_arrays(store, 0, 0)
        maps = attention_index(store)
        some_map = attention_map(store, 0, 1, 1, 0)
    assert found.texts == tuple(text)
    np.testing.assert_array_equal(found.experts_LSK, experts_LSK)
    np.testing.assert_allclose(found.weights_LSK, weights_LSK, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(found.loss_S[:-1], loss_S, rtol=1e-5)
    assert np.isnan(found.loss_S[-1])
    assert len(maps) == 2 * 2 * 2  # layers x heads x sequences
    np.testing.assert_allclose(some_map.sum(1), 1, atol=0.03)
    assert np.all(np.triu(some_map, 1) == 0)


def test_long_text_is_cut_not_lost() -> None:
    found = passages(opened(tiny_model(), max_seq_len=4), ["abcdefghij", "abc"])
    assert [len(passage.token_ids) for passage in found] == [4, 4, 2, 3]
    assert [passage.label for passage in found] == ["text 1.1", "text 1.2", "text 1.3", "text 2"]


def test_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoevizError, match="text 2 is empty"):
        trace(opened(tiny_model()), ["abc", ""], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def mixtral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: tiny random Mixtral and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hub") / "mixtral-dwarf"
    torch.manual_seed(5)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_huggingface_folder_is_traced(
    mixtral_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, MixtralForCausalLM

    text, run = "The fox ran. x = 3", tmp_path / "run"
    capsys.readouterr()
    assert main(["inspect", str(mixtral_folder), "--text", text, "--run", str(run), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    ids = AutoTokenizer.from_pretrained(mixtral_folder)(text, return_tensors="pt")["input_ids"]
    model = MixtralForCausalLM.from_pretrained(mixtral_folder)
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    assert len(rows) == ids.shape[1] * 3
    for row in rows:
        probs = logits[row["layer"]][row["pos"]].softmax(-1)
        top = probs.topk(2)
        assert row["token_id"] == int(ids[0, row["pos"]])
        assert row["experts"] == top.indices.tolist()
        np.testing.assert_allclose(row["weights"], (top.values / top.values.sum()).tolist(), atol=3e-3)


def test_table_shows_every_token(
    mixtral_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "inspect",
        str(mixtral_folder),
        "--text",
        "fox",
        "--run",
        str(tmp_path / "run"),
        "--layers",
        "2",
        "0",
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.index("layer 2") < out.index("layer 0")
    assert "6 experts top-2" in out
    assert "layer 1" not in out
    for letter in "fox":
        assert f" {letter} " in out


def test_errors_say_what_to_do(
    mixtral_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "missing")]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    argv = ["inspect", str(mixtral_folder), "--text", "fox", "--run", str(tmp_path / "run")]
    assert main([*argv, "--layers", "9"]) == 1
    assert "MoE layers 0 to 2" in capsys.readouterr().err
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text((mixtral_folder / "config.json").read_text())
    assert main(["inspect", str(tmp_path / "copy")]) == 1
    assert "cannot open" in capsys.readouterr().err
