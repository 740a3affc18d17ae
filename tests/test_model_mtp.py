"""Further tokens are predicted as transformers' MtpModel does, and counted as a loop over positions counts them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from model.attention import set_attention_core
from model.attention_config import LatentConfig, MLAConfig, ReachConfig
from model.attention_core import EagerCore
from model.block_config import BlockConfig
from model.config import ModelConfig
from model.expert_config import RouterConfig
from model.flops import forward_flops, mtp_flops, training_flops
from model.generate import Sampling, generate
from model.head_config import HeadConfig
from model.hf import from_hf, to_hf
from model.lm import ModelOutput, MoELanguageModel
from model.mtp import MTPModule
from model.router import routers

SMALL: dict[str, Any] = {"vocab_size": 37, "dim": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
SMALL |= {"num_experts": 4, "expert_dim": 6, "init_std": 0.2}
MLA = MLAConfig(q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2, "qk_norm": "head"},
    "windowed": {"reach": ReachConfig(window=3, global_every=2), "tie_embeddings": True},
    "mla": {"attention": "mla", "mla": MLA},
    "latent": {"attention": "latent", "latents": LatentConfig(num_latents=3, latent_chunk=4)},
    "gpt2": {
        "block": BlockConfig(norm="layer", positions="learned", dense_layer="gelu"),
        "num_shared_experts": 1,
    },
}


def _model(name: str = "grouped", depth: int = 2) -> MoELanguageModel:
    torch.manual_seed(3)
    return MoELanguageModel(ModelConfig(**{**SMALL, **CONFIGS[name]}, heads=HeadConfig(mtp_depth=depth)))


def _text(batch: int = 3, length: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens, and the one behind each."""
    ids_BS = torch.randint(37, (batch, length + 1), generator=torch.Generator().manual_seed(5))
    return ids_BS[:, :-1], ids_BS[:, 1:]


def _by_position(model: MoELanguageModel, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """The paper's equations 21 to 25, one sequence, one depth and one position at a time."""
    hidden_BSD, _ = model.model(ids_BS)
    losses = []
    for depth, module in enumerate(model.mtp, start=1):
        embedded_BSD = model.model.embed_tokens(ids_BS[:, depth:])
        hidden_BSD = module(hidden_BSD[:, : ids_BS.shape[1] - depth], embedded_BSD)
        terms = []
        for row in range(len(ids_BS)):
            for i in range(ids_BS.shape[1] - depth):
                label = int(labels_BS[row, i + depth])
                if label != -100:
                    terms.append(-(model.lm_head.weight @ hidden_BSD[row, i]).log_softmax(0)[label])
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_a_loop_over_positions(name: str) -> None:
    model, (ids_BS, labels_BS) = _model(name), _text()
    labels_BS = labels_BS.clone()
    labels_BS[0, 3], labels_BS[2, 6:] = -100, -100
    gradients = []
    for loss in (model(ids_BS, labels_BS).aux["mtp"], _by_position(model, ids_BS, labels_BS)):
        model.zero_grad()
        loss.backward()
        gradients.append(
            (loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert all(n in gradients[0][1] for n, _ in model.named_parameters() if n.startswith("mtp."))


def test_a_module_is_that_of_transformers() -> None:
    """With its weights, hidden states equal `MtpLayer`'s: norms, order of the projection, block, last norm."""
    theirs_config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    llama = LlamaForCausalLM(theirs_config)
    theirs = MtpLayer(theirs_config, LlamaDecoderLayer, LlamaRMSNorm, 0)
    ours = MTPModule(ModelConfig(**SMALL, num_kv_heads=2))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    names = {
        name.replace("mtp_block", "block").replace("post_norm", "norm"): value
        for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(names)
    before_BSD, embedded_BSD = torch.randn(2, 2, 7, 16).unbind()
    # transformers counts from the further token's position; distances are the same.
    positions_BS = torch.arange(1, 8).expand(2, 7)
    turns = llama.model.rotary_emb(before_BSD, positions_BS)
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    expected = theirs(embedded_BSD, before_BSD, turns, mask, positions_BS, None)
    torch.testing.assert_close(ours(before_BSD, embedded_BSD), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_module_reads_no_token_behind_its_own(name: str) -> None:
    """Position i of module k has read the tokens up to i + k, and is asked for the next one."""
    model, (ids_BS, _) = _model(name).double().eval(), _text()
    other_BS = ids_BS.clone()
    other_BS[:, 6:] = (ids_BS[:, 6:] + 1) % 37
    states = []
    for text_BS in (ids_BS, other_BS):
        hidden_BSD, _ = model.model(text_BS)
        states.append([])
        for depth, module in enumerate(model.mtp, start=1):
            hidden_BSD = module(hidden_BSD[:, :-1], model.model.embed_tokens(text_BS[:, depth:]))
            states[-1].append(hidden_BSD)
    for depth, (one, other) in enumerate(zip(*states, strict=True), start=1):
        seen = 6 - depth
        torch.testing.assert_close(one[:, :seen], other[:, :seen], rtol=0, atol=1e-12)
        assert not torch.allclose(one[:, seen], other[:, seen])


def _alone(model: MoELanguageModel, pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The loss of texts read one by one: each depth's mean over all of their positions together."""
    sums, counts = torch.zeros(2), torch.zeros(2)
    for ids_S, labels_S in pieces:
        hidden_BSD, _ = model.model(ids_S[None])
        for depth, module in enumerate(model.mtp, start=1):
            if depth < len(ids_S):
                hidden_BSD = module(hidden_BSD[:, :-1], model.model.embed_tokens(ids_S[None, depth:]))
                logits_BSV = model.lm_head(hidden_BSD).logits_BSV
                sums[depth - 1] += F.cross_entropy(logits_BSV[0], labels_S[depth:], reduction="sum").detach()
                counts[depth - 1] += len(labels_S) - depth
    return (sums / counts).mean()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str) -> None:
    model, (ids_BS, labels_BS) = _model(), _text(2)
    mask_BS, labels_BS = torch.ones_like(ids_BS), labels_BS.clone()
    padding = slice(0, 4) if side == "left" else slice(5, None)
    mask_BS[0, padding], labels_BS[0, padding] = 0, -100
    text = slice(4, None) if side == "left" else slice(0, 5)
    expected = _alone(model, [(ids_BS[0, text], labels_BS[0, text]), (ids_BS[1], labels_BS[1])])
    out = model(ids_BS, labels_BS, attention_mask_BS=mask_BS)
    torch.testing.assert_close(out.aux["mtp"].detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["ids", "token"])
@pytest.mark.parametrize("name", ["grouped", "windowed", "mla"])
def test_each_document_counts_as_if_it_stood_alone(name: str, how: str) -> None:
    model, (ids_BS, labels_BS) = _model(name), _text(1)
    ids_BS = ids_BS.masked_fill(ids_BS == 7, 8)
    ids_BS[0, 4], ids_BS[0, 5] = 7, 7  # one document of five tokens, one of one, one of three
    more: dict[str, Any] = {}
    if how == "ids":
        more["document_ids_BS"] = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 2]])
    else:
        model.separate_documents(7)
    together = model(ids_BS, labels_BS, **more).aux["mtp"]
    model.separate_documents(None)
    pieces = list(zip(ids_BS[0].split([5, 1, 3]), labels_BS[0].split([5, 1, 3]), strict=True))
    torch.testing.assert_close(together.detach(), _alone(model, pieces), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_of_parameters_and_operations_are_those_of_the_model(name: str) -> None:
    model, plain = _model(name), _model(name, depth=0)
    config, without = model.config, plain.config
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    assert config.num_mtp_parameters() == sum(p.numel() for p in model.mtp.parameters())
    assert config.num_active_parameters() == without.num_active_parameters()
    assert training_flops(config) == training_flops(without) + 3 * mtp_flops(config)
    assert forward_flops(config) == forward_flops(without)


@pytest.mark.parametrize("values", [{}, {"block": BlockConfig(norm="layer", dense_layer="gelu")}], ids=str)
def test_operations_are_those_that_torch_counts(values: dict[str, Any]) -> None:
    length, depth = 9, 2
    config = ModelConfig(**SMALL, **values, heads=HeadConfig(mtp_depth=depth))
    model = MoELanguageModel(config).eval()
    set_attention_core(model, EagerCore, config)
    ids_BS, labels_BS = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64)
    hidden_BSD = torch.zeros(1, length, 16)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.mtp.losses(
            hidden_BSD,
            ids_BS,
            labels_BS,
            embed=model.model.embed_tokens,
            cross_entropy=lambda hidden, labels: model.lm_head(hidden).logits_BSV.mean(),
        )
    # The eager core multiplies the whole square of which a causal query reads the lower half.
    upper = sum(2 * 2 * 16 * (length - cut) * (length - cut - 1) / 2 for cut in range(1, depth + 1))
    assert counter.get_total_flops() == pytest.approx(length * mtp_flops(config, length) + upper)


def test_further_tokens_change_nothing_but_the_training_loss() -> None:
    model, (ids_BS, labels_BS) = _model(), _text()
    plain = MoELanguageModel(replace(model.config, heads=HeadConfig()))
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("mtp.")})
    with torch.no_grad():
        assert torch.equal(model(ids_BS).logits_BSV, plain(ids_BS).logits_BSV)
        assert "mtp" not in model(ids_BS, labels_BS).aux  # nobody trains on it
    ours, theirs = model(ids_BS, labels_BS), plain(ids_BS, labels_BS)
    assert torch.equal(ours.ce, theirs.ce)
    assert torch.equal(ours.expert_counts_LE, theirs.expert_counts_LE)
    assert len(list(routers(model))) == len(list(routers(plain)))
    greedy = Sampling(max_new_tokens=4, temperature=0)
    assert torch.equal(generate(model, ids_BS[:, :4], greedy), generate(plain, ids_BS[:, :4], greedy))


def _train(model: MoELanguageModel) -> tuple[ModelOutput, dict[str, Tensor]]:
    model.zero_grad()
    out = model(*_text())
    (out.ce + 0.3 * out.aux["mtp"]).backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_recomputed_or_compiled_the_loss_and_its_gradients_are_the_same() -> None:
    model = _model(depth=1).train()
    out, grads = _train(model)
    model.gradient_checkpointing_enable()
    calls: list[int] = []
    model.mtp[0].block.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    again, again_grads = _train(model)
    assert len(calls) == 2
    assert torch.equal(out.aux["mtp"], again.aux["mtp"])
    assert all(torch.equal(grads[n], again_grads[n]) for n in grads)
    model.gradient_checkpointing_disable()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    other, other_grads = _train(compiled)
    torch.testing.assert_close(out.aux["mtp"], other.aux["mtp"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grads, {n.removeprefix("_orig_mod."): g for n, g in other_grads.items()}, rtol=1e-4, atol=1e-5
    )


def test_training_learns_to_see_further() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        out, _ = _train(model)
        optimizer.step()
        losses.append(out.aux["mtp"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_text_too_short_to_look_ahead_costs_nothing() -> None:
    model = _model()
    ids_BS, labels_BS = _text(2, 2)
    first = model.mtp[0](model.model(ids_BS).hidden_BSD[:, :-1], model.model.embed_tokens(ids_BS[:, 1:]))
    expected = F.cross_entropy(model.lm_head(first).logits_BSV[:, 0], labels_BS[:, 1])
    # Of two depths the second has no position: it counts as 0 in their mean.
    torch.testing.assert_close(model(ids_BS, labels_BS).aux["mtp"], expected / 2)
    assert model(ids_BS[:, :1], labels_BS[:, :1]).aux["mtp"].item() == 0
    labels_BS = torch.full_like(labels_BS, -100)
    assert model(ids_BS, labels_BS).aux["mtp"].item() == 0


def test_a_negative_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mtp_depth=-1 is negative; 0"):
        HeadConfig(mtp_depth=-1)


def test_transformers_opens_a_model_that_saw_further(tmp_path: Path) -> None:
    """Modules of training stay behind, and theirs, in a folder of DeepSeek's, are passed over as well."""
    torch.manual_seed(0)
    experts: dict[str, Any] = {"first_dense_layers": 1, "num_shared_experts": 1}
    router = RouterConfig(score="sigmoid", selection_bias=True)
    heads = HeadConfig(mtp_depth=1, contrastive_width=3)
    config = ModelConfig(
        **{**SMALL, "expert_dim": 8}, **experts, attention="mla", mla=MLA, router=router, heads=heads
    )
    model, (ids_BS, _) = MoELanguageModel(config).eval(), _text()
    folder = to_hf(model, tmp_path / "ours", family="deepseek_v3")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected_BSV = model(ids_BS).logits_BSV
        torch.testing.assert_close(theirs(ids_BS).logits, expected_BSV, rtol=1e-4, atol=1e-4)
    weights, data = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert [name for name in weights if "mtp" in name or "contrastive" in name] == []
    weights |= {f"model.layers.2.{name}": torch.ones(3) for name in ("eh_proj.weight", "enorm.weight")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**data, "num_nextn_predict_layers": 1}))
    again = from_hf(folder)
    assert again.config.heads == HeadConfig()
    with torch.no_grad():
        torch.testing.assert_close(again(ids_BS).logits_BSV, expected_BSV)
