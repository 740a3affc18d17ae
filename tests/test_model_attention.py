"""Attention cores agree with the formula, read no key they must not, and show a hook all it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import Attention, set_attention_core
from model.attention_core import EagerCore, SdpaCore, one_query
from model.config import ModelConfig
from model.lm import MoELanguageModel
from model.rope import rope_tables

HEADS, WIDTH = 4, 6


def _config(kv_heads: int) -> ModelConfig:
    return ModelConfig(dim=HEADS * WIDTH, num_heads=HEADS, num_kv_heads=kv_heads, vocab_size=17, num_layers=2)


def _qkv(kv_heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, WIDTH, generator=generator).requires_grad_()

    return draw(HEADS, queries), draw(kv_heads, keys), draw(kv_heads, keys)


def _formula(q: Tensor, k: Tensor, v: Tensor, valid_BC: Tensor | None) -> Tensor:
    """One query at a time, over the keys that it may read."""
    out = torch.zeros_like(q)
    offset, share = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    for b, h, s in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        keys = [c for c in range(offset + s + 1) if valid_BC is None or valid_BC[b, c] or c == offset + s]
        scores = k[b, h // share, keys] @ q[b, h, s] / WIDTH**0.5
        out[b, h, s] = scores.softmax(dim=0) @ v[b, h // share, keys]
    return out


@pytest.mark.parametrize("core", [EagerCore, SdpaCore])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 5), (3, 5), (1, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_cores_equal_the_formula(core: Any, kv_heads: int, queries: int, keys: int, padded: bool) -> None:
    q, k, v = _qkv(kv_heads, queries, keys)
    valid_BC = torch.arange(keys) >= torch.tensor([[2], [0]]) if padded else None
    actual = core(_config(kv_heads))(q, k, v, valid_BC)
    torch.testing.assert_close(actual, _formula(q.detach(), k.detach(), v.detach(), valid_BC))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_one_query_is_the_formula(kv_heads: int, padded: bool) -> None:
    q, k, v = (each.detach() for each in _qkv(kv_heads, 1, 5))
    v = torch.cat((v, v[..., :3].square()), dim=-1)  # values of a width of their own
    valid_BC = torch.arange(5) >= torch.tensor([[2], [0]]) if padded else None
    visible = None if valid_BC is None else valid_BC[:, None, None]
    got = one_query(q, k, v, visible, WIDTH**-0.5)
    for part in (slice(WIDTH), slice(3, None)):  # the formula has values of the width of keys
        torch.testing.assert_close(got[..., part], _formula(q, k, v[..., part], valid_BC))
    half = one_query(q.bfloat16(), k.bfloat16(), v.bfloat16(), visible, WIDTH**-0.5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), got, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fused_gradients_equal_eager(kv_heads: int) -> None:
    operands = _qkv(kv_heads, 7, 7)
    upstream = torch.sin(torch.arange(2 * HEADS * 7 * WIDTH).float()).view(2, HEADS, 7, WIDTH)
    grads = [
        torch.autograd.grad(core(_config(kv_heads))(*operands), operands, upstream)
        for core in (EagerCore, SdpaCore)
    ]
    for eager, fused in zip(*grads, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)


def test_a_hook_on_the_core_can_rebuild_its_output() -> None:
    """The contract with viewers: q, k, softmax_scale, causal and num_kv_groups give the weights."""
    model = MoELanguageModel(_config(2))
    seen: list[tuple[Any, tuple[Tensor, ...], Tensor]] = []
    core = model.model.layers[1].self_attn.core  # type: ignore[union-attr]
    core.register_forward_hook(lambda module, args, out: seen.append((module, args, out)))
    model(torch.randint(17, (2, 9)))
    ((module, args, out),) = seen
    q, k, v = args[:3]
    k, v = (x.repeat_interleave(module.num_kv_groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * module.softmax_scale
    assert module.causal
    weights = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf")).softmax(dim=-1)
    torch.testing.assert_close(weights @ v, out)


def test_attention_depends_on_distance_and_not_on_position() -> None:
    torch.manual_seed(0)
    config = _config(2)
    attention, x_BSD = Attention(config), torch.randn(2, 6, config.dim)
    near, far = (rope_tables(config, start, 6, x_BSD) for start in (0, 300))
    assert not torch.allclose(near.cos_SD, far.cos_SD)
    torch.testing.assert_close(attention(x_BSD, near), attention(x_BSD, far), rtol=1e-4, atol=1e-5)


def test_rope_tables_stay_exact_in_bfloat16_models() -> None:
    config = _config(2)
    exact = rope_tables(config, 0, 500, torch.zeros(1))
    rounded = rope_tables(config, 0, 500, torch.zeros(1, dtype=torch.bfloat16))
    assert torch.equal(rounded.cos_SD, exact.cos_SD.bfloat16())


def test_cores_can_be_exchanged() -> None:
    torch.manual_seed(0)
    config = _config(2)
    model, ids_BS = MoELanguageModel(config), torch.randint(17, (2, 9))
    fused = model(ids_BS).logits_BSV
    set_attention_core(model, EagerCore, config)
    assert all(isinstance(layer.self_attn.core, EagerCore) for layer in model.model.layers)
    torch.testing.assert_close(model(ids_BS).logits_BSV, fused)
