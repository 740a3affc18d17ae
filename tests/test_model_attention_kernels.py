"""Every kernel behind the one call computes the eager formula, and is asked only for what it can do."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import model.attention_kernels
from model.attention_config import ReachConfig
from model.attention_core import AttentionCore, EagerCore, SdpaCore
from model.attention_kernels import FlashCore, FlexCore, build_core
from model.config import ModelConfig
from model.masks import Reach, visible_keys

HEADS, WIDTH = 4, 8
REACHES: dict[str, ReachConfig] = {
    "all": ReachConfig(),
    "window": ReachConfig(window=4),
    "window and first tokens": ReachConfig(window=3, sink_tokens=2),
    "strided": ReachConfig(sparsity="strided", sparse_block=3),
    "fixed": ReachConfig(sparsity="fixed", sparse_block=4, sink_tokens=1),
    "blocks in a window": ReachConfig(sparsity="blocks", sparse_block=3, window=5),
}


def _config(reach: str, **more: Any) -> ModelConfig:
    return ModelConfig(dim=HEADS * WIDTH, num_heads=HEADS, num_kv_heads=2, reach=REACHES[reach], **more)


def _call(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, queries), (2, keys), (2, keys))
    draws = (torch.randn(2, heads, length, WIDTH, generator=generator) for heads, length in shapes)
    q, k, v = (x.to(dtype) for x in draws)
    return q, k, v


def _may_read(reach: ReachConfig, query: int, key: int) -> bool:
    """The rules as sentences, one pair of positions at a time."""
    if key > query:
        return False
    if key < reach.sink_tokens:
        return True
    if reach.window is not None and query - key >= reach.window:
        return False
    block = reach.sparse_block
    if reach.sparsity == "strided":
        return query - key < block or (query - key) % block == 0
    if reach.sparsity == "fixed":
        return query // block == key // block or key % block == block - 1
    if reach.sparsity == "blocks":
        return key // block >= query // block - 1
    return True


@pytest.mark.parametrize("reach", REACHES)
def test_masks_follow_the_rules(reach: str) -> None:
    mask = visible_keys(Reach.of(REACHES[reach], 0), 9, 12, None, torch.device("cpu"))
    assert mask.shape == (1, 1, 9, 12)
    for s in range(9):
        for c in range(12):
            assert bool(mask[0, 0, s, c]) == _may_read(REACHES[reach], 3 + s, c)
    assert bool(mask.any(-1).all())


CALLS = [
    *itertools.product([SdpaCore], REACHES, [(11, 11), (3, 11), (1, 11)]),
    (FlexCore, "all", (11, 11)),
    *((FlexCore, reach, (3, 11)) for reach in REACHES if reach != "all"),
]


@pytest.mark.parametrize(("core", "reach", "lengths"), CALLS)
@pytest.mark.parametrize("extra", ["nothing", "padding", "sinks", "whole mask"])
def test_kernels_equal_the_formula(
    core: type[AttentionCore], reach: str, lengths: tuple[int, int], extra: str
) -> None:
    config, call, (queries, keys) = _config(reach), _call(*lengths), lengths
    mask: Tensor | None = None
    if extra == "padding":
        mask = torch.arange(keys) >= torch.tensor([[3], [0]])
    elif extra == "whole mask":
        mask = torch.rand(2, HEADS, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[..., -1] = True
    sinks_H = torch.tensor([-1.0, 0.0, 2.0, 5.0]) if extra == "sinks" else None
    with torch.no_grad():
        expected = EagerCore(config)(*call, mask, sinks_H=sinks_H)
        torch.testing.assert_close(core(config)(*call, mask, sinks_H=sinks_H), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [4, 8, 12])
@pytest.mark.parametrize("sinks", [False, True])
def test_values_may_have_a_width_of_their_own(width: int, sinks: bool) -> None:
    config, (q, k, _) = _config("all"), _call(7, 7)
    v = torch.randn(2, 2, 7, width, generator=torch.Generator().manual_seed(3))
    sinks_H = torch.tensor([-1.0, 0.0, 2.0, 5.0]) if sinks else None
    expected = EagerCore(config)(q, k, v, sinks_H=sinks_H)
    torch.testing.assert_close(SdpaCore(config)(q, k, v, sinks_H=sinks_H), expected, rtol=1e-4, atol=1e-5)


def test_sinks_learn_through_the_fused_kernel() -> None:
    config, operands = _config("window"), [x.requires_grad_() for x in _call(7, 7)]
    sinks_H = torch.tensor([-1.0, 0.0, 2.0, 5.0], requires_grad=True)
    upstream = torch.randn(2, HEADS, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    grads = [
        torch.autograd.grad(core(config)(*operands, sinks_H=sinks_H), [*operands, sinks_H], upstream)
        for core in (EagerCore, SdpaCore)
    ]
    for eager, fused in zip(*grads, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)


def _flash_by_the_book(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """flash_attn_func as its documentation says: [B, S, H, D], causal mask aligned to the bottom right, query
    i reads keys i + C - S - left .. i + C - S + right, -1 means no limit, heads of one even width.
    """
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.shape[-1] % 8 == 0
    queries, keys = q.shape[1], k.shape[1]
    at = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    visible = key <= at if causal else torch.ones(queries, keys, dtype=torch.bool)
    if window_size[0] >= 0:
        visible &= key >= at - window_size[0]
    if window_size[1] >= 0:
        visible &= key <= at + window_size[1]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bchd->bhsc", q.float(), k.float()) * softmax_scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhsc,bchd->bshd", weights, v.float()).to(q.dtype)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """flash-attn as documented, on a CPU that passes for CUDA; counts its calls."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return _flash_by_the_book(*args, **kwargs)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = counted  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("flash_attn", loader=None)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(model.attention_kernels, "_half_on_cuda", lambda x: x.dtype is torch.bfloat16)
    model.attention_kernels._flash_attn.cache_clear()
    yield calls  # type: ignore[misc]
    model.attention_kernels._flash_attn.cache_clear()


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize(("queries", "keys"), [(11, 11), (3, 11), (1, 11)])
@pytest.mark.parametrize("extra", ["nothing", "padding", "sinks"])
def test_flash_is_called_as_documented_and_only_for_what_it_can(
    flash: list[int], reach: str, queries: int, keys: int, extra: str
) -> None:
    config, call = _config(reach), _call(queries, keys, torch.bfloat16)
    mask = torch.arange(keys) >= torch.tensor([[3], [0]]) if extra == "padding" else None
    sinks_H = torch.tensor([-1.0, 0.0, 2.0, 5.0]) if extra == "sinks" else None
    core = build_core(config, 0)
    assert isinstance(core, FlashCore)
    actual = core(*call, mask, sinks_H=sinks_H)
    expected = EagerCore(config)(*(x.float() for x in call), mask, sinks_H=sinks_H)
    torch.testing.assert_close(actual.float(), expected, rtol=3e-2, atol=3e-2)
    able = (extra == "nothing" and reach in ("all", "window")) or (extra == "sinks" and reach == "all")
    assert len(flash) == able


def test_flash_takes_values_narrower_than_keys(flash: list[int]) -> None:
    """MLA: heads of 8 for scores and 4 for values."""
    config, (q, k, v) = _config("all"), _call(5, 5, torch.bfloat16)
    actual = FlashCore(config)(q, k, v[..., :4])
    expected = EagerCore(config)(q.float(), k.float(), v[..., :4].float())
    torch.testing.assert_close(actual.float(), expected, rtol=3e-2, atol=3e-2)
    assert flash == [1]


def test_flash_leaves_float32_to_sdpa(flash: list[int]) -> None:
    FlashCore(_config("all"))(*_call(5, 5))
    assert flash == []


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_without_flash_attn_auto_is_sdpa_and_flash_explains_itself() -> None:
    assert type(build_core(_config("all"), 0)) is SdpaCore
    model.attention_kernels._flash_attn.cache_clear()
    with pytest.raises(
        ModuleNotFoundError, match=r"attention_kernel=flash needs flash-attn; run: pip install"
    ):
        build_core(_config("all", attention_kernel="flash"), 0)


@pytest.mark.parametrize(("name", "core"), [("eager", EagerCore), ("sdpa", SdpaCore), ("flex", FlexCore)])
def test_a_kernel_can_be_named(name: Any, core: type[AttentionCore]) -> None:
    assert type(build_core(_config("all", attention_kernel=name), 0)) is core
