"""Laws of the whole model, over the configurations that it covers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model.experts
from model.config import ModelConfig, RouterConfig
from model.kv_cache import KVCache
from model.lm import ModelOutput, MoELanguageModel
from model.presets import PRESETS

SMALL = {"vocab_size": 37, "dim": 32, "num_layers": 3, "num_heads": 4, "max_seq_len": 32}
SMALL |= {"num_experts": 4, "top_k": 2, "expert_dim": 16}
BIASED = RouterConfig(score="sigmoid", selection_bias=True, num_groups=2, top_groups=1, scale=1.5)
CONFIGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "biased": {"num_kv_heads": 2, "num_shared_experts": 1, "router": BIASED},
    "topk first": {"num_kv_heads": 1, "router": RouterConfig(score="softmax_topk"), "tie_embeddings": True},
    "dense first": {"first_dense_layers": 1, "qk_norm": "head", "head_dim": 6},
    "dense": {"first_dense_layers": 3, "qk_norm": "projection"},
    "one expert": {"num_experts": 1, "top_k": 1},
    "all experts": {"top_k": 4, "router": RouterConfig(norm_topk=False)},
    "many experts": {"num_experts": 64, "top_k": 8},
}


def _model(name: str = "biased", *, std: float = 0.2) -> MoELanguageModel:
    torch.manual_seed(2)
    model = MoELanguageModel(ModelConfig(**{**SMALL, **CONFIGS[name]}, init_std=std))
    for buffer in model.buffers():
        buffer.normal_(std=0.1)
    return model


def _ids(batch: int = 3, length: int = 11, vocab: int = 37) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(7))


def _train(model: MoELanguageModel, ids_BS: Tensor) -> ModelOutput:
    out = model(ids_BS, ids_BS.roll(-1, dims=1))
    assert out.ce is not None
    (out.ce + 0.01 * out.aux["balance"].sum() + 0.001 * out.aux["z"].sum()).backward()
    return out


def _row_by_row(x_NI: Tensor, weights_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The grouped product with the same rounding for a row whoever its neighbours are."""
    experts_N = torch.searchsorted(ends_E, torch.arange(len(x_NI)), right=True)
    return torch.stack([weights_EOI[expert] @ row for row, expert in zip(x_NI, experts_N, strict=True)])


def _prefix_and_rest(model: MoELanguageModel, cut: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits before and after `cut`, of one text and of another that differs from it from `cut` on."""
    ids_BS = _ids()
    other_BS = ids_BS.clone()
    other_BS[:, cut:] = (ids_BS[:, cut:] + 1) % 37
    one, other = (model(ids).logits_BSV.detach() for ids in (ids_BS, other_BS))
    return one[:, :cut], other[:, :cut], one[:, cut:], other[:, cut:]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cut", [1, 6, 10])
def test_no_position_sees_the_future(name: str, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another suffix of the same length leaves every bit of the prefix's logits as it was."""
    monkeypatch.setattr(model.experts, "grouped_mm", _row_by_row)
    prefix, same, rest, changed = _prefix_and_rest(_model(name), cut)
    assert torch.equal(prefix, same)
    assert not torch.allclose(rest, changed)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_suffix_moves_the_prefix_by_rounding_only(name: str) -> None:
    """As it runs, the suffix decides how many rows an expert multiplies at once: rounding, nothing more."""
    prefix, same, _, _ = _prefix_and_rest(_model(name).double(), 6)
    torch.testing.assert_close(prefix, same, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pieces", [[11], [5, 6], [4, 1, 1, 5], [1] * 11], ids=str)
def test_reading_in_pieces_with_a_cache_equals_one_pass(name: str, pieces: list[int]) -> None:
    model, ids_BS = _model(name), _ids()
    cache = KVCache(model.config, batch_size=3)
    logits = [model(piece, cache=cache).logits_BSV for piece in ids_BS.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids_BS).logits_BSV, rtol=1e-4, atol=1e-4)
    assert cache.length == 11


def test_cache_with_left_padding_equals_the_text_alone() -> None:
    model, ids_BS = _model(), _ids(2, 9)
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :4] = 0
    cache = KVCache(model.config, batch_size=2)
    model(ids_BS[:, :6], attention_mask_BS=mask_BS[:, :6], cache=cache)
    padded = model(ids_BS[:, 6:], attention_mask_BS=mask_BS, cache=cache).logits_BSV
    alone = model(ids_BS[:1, 4:]).logits_BSV
    torch.testing.assert_close(padded[:1], alone[:, 2:], rtol=1e-4, atol=1e-4)


def test_a_truncated_cache_reads_another_continuation() -> None:
    model, ids_BS = _model(), _ids()
    cache = KVCache(model.config, batch_size=3)
    model(ids_BS[:, :8], cache=cache)
    cache.truncate(5)
    logits = model(ids_BS[:, 5:], cache=cache).logits_BSV
    torch.testing.assert_close(logits, model(ids_BS).logits_BSV[:, 5:], rtol=1e-4, atol=1e-4)


def test_a_full_cache_says_so() -> None:
    model = _model()
    with pytest.raises(ValueError, match=r"11 tokens exceed the cache's capacity=10"):
        model(_ids(), cache=KVCache(model.config, batch_size=3, max_length=10))


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_sum_to_tokens_times_k(name: str) -> None:
    model = _model(name)
    config = model.config
    counts_LE = model(_ids()).expert_counts_LE
    assert counts_LE.shape == (config.num_moe_layers, config.num_experts)
    assert counts_LE.sum(dim=1).tolist() == [33 * config.top_k] * config.num_moe_layers
    mask_BS = torch.ones(3, 11)
    mask_BS[1, 7:] = 0
    counts_LE = model(_ids(), attention_mask_BS=mask_BS).expert_counts_LE
    assert counts_LE.sum(dim=1).tolist() == [29 * config.top_k] * config.num_moe_layers


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_the_logits(name: str) -> None:
    model, ids_BS = _model(name), _ids()
    labels_BS = ids_BS.roll(-1, dims=1)
    labels_BS[0, 4:] = -100
    logits_BSV = model(ids_BS).logits_BSV
    out = model(ids_BS, labels_BS)
    assert out.logits_BSV is None
    torch.testing.assert_close(out.ce, F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten()))
    each = F.cross_entropy(logits_BSV.transpose(1, 2), labels_BS, reduction="none")
    torch.testing.assert_close(out.token_loss_BS, each.detach())
    assert {key: value.shape for key, value in out.aux.items()} == {
        "balance": (model.config.num_moe_layers,),
        "z": (model.config.num_moe_layers,),
    }


def test_a_labelled_and_an_unlabelled_pass_report_what_they_must() -> None:
    plain = _model()(_ids())
    assert plain.ce is None
    assert plain.token_loss_BS is None
    assert plain.aux == {}
    assert not plain.expert_counts_LE.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_memory_and_nothing_else(name: str) -> None:
    model = _model(name).train()
    runs = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        out = _train(model, _ids())
        runs.append((out.ce, out.expert_counts_LE, [p.grad.clone() for p in model.parameters()]))
    (ce, counts_LE, grads), (other_ce, other_counts_LE, other_grads) = runs
    assert torch.equal(ce, other_ce)
    assert torch.equal(counts_LE, other_counts_LE)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


def test_gradient_checkpointing_runs_each_block_again() -> None:
    model, calls = _model().train(), Counter[int]()
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=index: calls.update([i]))
    model.gradient_checkpointing_enable()
    _train(model, _ids())
    assert calls == {0: 2, 1: 2, 2: 2}


class _CountTopK(TorchDispatchMode):
    """Counts how often torch really ranks experts."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten.topk.default
        return func(*args, **(kwargs or {}))


def test_gradient_checkpointing_never_chooses_experts_twice() -> None:
    """Chosen again, a tie may fall the other way, and gradients would be those of other experts."""
    model = _model().train()
    model.gradient_checkpointing_enable()
    with _CountTopK() as forward:
        ce = model(_ids(), _ids()).ce
    with _CountTopK() as backward:
        ce.backward()
    assert forward.calls == 9  # best two of a group, groups, experts: in three layers
    assert backward.calls == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiling_gives_one_graph_and_the_same_numbers(dtype: torch.dtype) -> None:
    model = _model().to(dtype).train()
    eager = _train(model, _ids())
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    out = _train(compiled, _ids())
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(out.ce, eager.ce, rtol=tolerance, atol=tolerance)
    assert torch.equal(out.expert_counts_LE, eager.expert_counts_LE)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns_and_is_named_once(name: str) -> None:
    model = _model(name)
    _train(model, _ids())
    parameters = dict(model.named_parameters())
    assert len({id(p) for p in model.parameters()}) == len(parameters)
    assert [key for key, p in parameters.items() if p.grad is None or not bool(p.grad.any())] == []


def test_tied_embeddings_are_one_matrix() -> None:
    model = _model("topk first")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_initial_loss_is_near_that_of_guessing() -> None:
    torch.manual_seed(0)
    model = MoELanguageModel(PRESETS["demo"]())
    ids_BS = torch.randint(4096, (2, 64))
    assert model(ids_BS, ids_BS.roll(1, dims=1)).ce.item() == pytest.approx(8.32, abs=0.1)  # ln 4096


def test_the_residual_stream_does_not_grow_with_depth() -> None:
    torch.manual_seed(0)
    scales = []
    for depth in (2, 16):
        model = MoELanguageModel(ModelConfig(**{**SMALL, "num_layers": depth}, init_std=0.2))
        stream: list[Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, args, kept=stream: kept.append(args[0]))
        model(_ids())
        scales.append(stream[0].std().item())
    assert scales[1] < 1.5 * scales[0]


@pytest.mark.parametrize("name", ["softmax", "biased"])
def test_a_step_down_the_gradient_lowers_the_loss(name: str) -> None:
    model, ids_BS = _model(name, std=0.02), _ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(_train(model, ids_BS).ce.item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_autocast_trains_in_float32_weights() -> None:
    model = _model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = _train(model, _ids())
    exact = model(_ids(), _ids().roll(-1, dims=1))
    torch.testing.assert_close(out.ce, exact.ce, rtol=2e-2, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train_a_step(name: str) -> None:
    """Every preset's own wiring, narrowed so that it fits in a test."""
    full = PRESETS[name]()
    narrow = {"vocab_size": 53, "dim": 32, "head_dim": 8, "expert_dim": 8, "num_layers": 2}
    narrow |= {"max_seq_len": 16, "first_dense_layers": min(full.first_dense_layers, 2)}
    model = MoELanguageModel(ModelConfig(**{**vars(full), **narrow}))
    _train(model, _ids(2, 8, 53))
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
