"""Whatever a core of our model does (window, sinks, pattern, latents), recorded maps are what it read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeviz.capture.probe
from model.attention import set_attention_core
from model.attention_config import LatentConfig, MLAConfig, ReachConfig, RopeConfig
from model.attention_core import AttentionCore, EagerCore
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.kv_eviction import HeavyHitters, SinksAndRecent
from model.lm import MoELanguageModel
from moeviz.capture.adapters import named_tuple
from moeviz.capture.attention import pattern
from moeviz.capture.reading import AttentionCall
from moeviz.policy import SamplingPolicy
from moeviz.records import AttentionRecord

BATCH, LENGTH, HEADS = 2, 13, 4
MLA = MLAConfig(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
LATENT = LatentConfig(num_latents=3, latent_chunk=4)
YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_trained_len": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2},
    "window": {"num_kv_heads": 2, "reach": ReachConfig(window=4)},
    "local-global with kept tokens": {"reach": ReachConfig(window=4, global_every=2, sink_tokens=2)},
    "learned sinks": {"num_kv_heads": 2, "reach": ReachConfig(window=4, global_every=2, head_sinks=True)},
    "pattern": {"reach": ReachConfig(sparsity="strided", sparse_block=3)},
    "mla": {"attention": "mla", "mla": MLA, "rope": RopeConfig(**YARN, yarn_mscale_all_dim=1.0)},
    "mla with a window and sinks": {
        "attention": "mla", "mla": MLA, "reach": ReachConfig(window=5, head_sinks=True),
    },
    "two-stage": {"attention": "latent", "num_kv_heads": 2, "latents": LATENT},
}  # fmt: skip


def _model(variant: str, core: type[AttentionCore] | None = None) -> MoELanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=29, dim=32, num_layers=2, num_heads=HEADS, num_experts=4, expert_dim=8, max_seq_len=32,
        init_std=0.3, **VARIANTS[variant],
    )  # fmt: skip
    model = MoELanguageModel(config)
    if core is not None:
        set_attention_core(model, core, config)
    return model


def _ids() -> Tensor:
    return torch.randint(29, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def _weights(core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The weights of a call: its output where value c is the c-th unit vector."""
    q, k, _, *rest = args
    unit = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    return core.forward(q, k, unit, *rest, **kwargs).detach()


class _Calls:
    """Every call of the attention cores of a model: what they read, and what the adapter makes of it."""

    def __init__(self, model: MoELanguageModel) -> None:
        self.weights: list[Tensor] = []
        self.patterns: list[Tensor] = []
        for layer in model.model.layers:
            core: nn.Module = layer.self_attn.core  # type: ignore[union-attr, assignment]
            core.register_forward_pre_hook(self._see, with_kwargs=True)
            site = named_tuple.find_core("core", core, None)
            assert site is not None
            site.attach(self._observe)

    def _see(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.weights.append(_weights(core, args, kwargs))

    def _observe(self, call: AttentionCall) -> None:
        """At once: keys of a cache are overwritten by later tokens."""
        groups = call.q_BHSD.shape[1] // call.k_BGCD.shape[1]
        whole = call._replace(k_BGCD=call.k_BGCD.repeat_interleave(groups, dim=1))
        self.patterns.append(pattern(whole).detach())

    def check(self) -> None:
        assert len(self.patterns) == len(self.weights) > 0
        for actual, expected in zip(self.patterns, self.weights, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


class _Keep:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def write(self, record: Any) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_maps_are_what_was_read(variant: str) -> None:
    """End to end: hooks, choice of heads, records, in a step of training on the fused core."""
    model, sink = _model(variant).train(), _Keep()
    seen = _Calls(model)
    policy = SamplingPolicy(attention_every=1, attention_heads=HEADS, attention_size=64)
    probe = moeviz.capture.probe.attach(model, sink, policy=policy)
    model(_ids(), _ids()).ce.backward()
    probe.step(loss=1.0)
    probe.close()
    maps = {(r.layer, r.seq, r.head): r.map_QC for r in sink.records if isinstance(r, AttentionRecord)}
    assert len(maps) == 2 * BATCH * HEADS
    for (layer, seq, head), map_QC in maps.items():
        expected = seen.weights[layer][seq, head]
        torch.testing.assert_close(torch.from_numpy(map_QC), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "two-stage"])
@pytest.mark.parametrize("padded", [False, True])
def test_patterns_equal_the_eager_core(variant: str, padded: bool) -> None:
    model = _model(variant, EagerCore)
    seen = _Calls(model)
    mask_BS = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask_BS[0, : 3 * padded] = 0
    model(_ids(), attention_mask_BS=mask_BS)
    seen.check()


@pytest.mark.parametrize("variant", VARIANTS)
def test_patterns_are_right_while_decoding_from_a_cache(variant: str) -> None:
    """Rings hold keys out of order, MLA reads its latents: the mask of the call says what is what."""
    model = _model(variant)
    seen = _Calls(model)
    cache = KVCache(model.config, batch_size=BATCH)
    for piece in _ids().split([6, 1, 1, 5], dim=1):
        model(piece, cache=cache)
    seen.check()


@pytest.mark.parametrize("eviction", [SinksAndRecent(sinks=1, recent=4), HeavyHitters(heavy=2, recent=3)])
@pytest.mark.parametrize("variant", ["grouped", "mla"])
def test_patterns_are_right_when_a_cache_forgets(variant: str, eviction: Any) -> None:
    model = _model(variant)
    seen = _Calls(model)
    cache = KVCache(model.config, batch_size=BATCH, eviction=eviction)
    for piece in _ids().split(1, dim=1):
        model(piece, cache=cache)
    seen.check()
    assert seen.patterns[-1].shape[-1] == 6  # what is kept, and the new token


def test_sinks_take_weight_and_give_none() -> None:
    model = _model("learned sinks")
    for layer in model.model.layers:
        nn.init.constant_(layer.self_attn.sinks, 2.0)  # type: ignore[union-attr, arg-type]
    seen = _Calls(model)
    model(_ids())
    assert all(bool((weights.sum(-1) < 1).all()) for weights in seen.weights)
    seen.check()
