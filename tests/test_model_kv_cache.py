"""A cache changes the cost and nothing else, takes the bytes it says, and forgets only what it must."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import Attention, attend
from model.attention_config import LatentConfig, MLAConfig, ReachConfig, RopeConfig
from model.attention_core import EagerCore
from model.block_config import BlockConfig
from model.config import ModelConfig
from model.kv_cache import KVCache, cache_bytes
from model.kv_eviction import HeavyHitters, SinksAndRecent, attention_mass
from model.kv_layer import Held
from model.kv_slots import Int8Slots
from model.lm import MoELanguageModel
from model.rope import rope_tables, rotate

BATCH, LENGTH, TRAINED = 2, 23, 16
BASE: dict[str, Any] = {
    "vocab_size": 37, "dim": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 32, "init_std": 0.2,
    "first_dense_layers": 2, "dense_ffn_dim": 32,
}  # fmt: skip
"""Without experts: they multiply rows together, and rounding would turn into another choice."""
MLA = MLAConfig(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
ATTENTIONS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped": {"num_kv_heads": 2, "qk_norm": "head", "attention_bias": "all"},
    "multi-query": {"num_kv_heads": 1},
    "gpt-2": {
        "attention_bias": "all",
        "block": BlockConfig(norm="layer", positions="learned", dense_layer="gelu"),
    },
    "mla": {"attention": "mla", "mla": MLA, "attention_bias": "qkv"},
    "latent": {
        "attention": "latent",
        "num_kv_heads": 2,
        "latents": LatentConfig(num_latents=3, latent_chunk=4),
    },
}
STRETCHED: dict[str, Any] = {"rope_factor": 2.0, "rope_trained_len": TRAINED}
POSITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_scaling": "linear", **STRETCHED},
    "ntk": {"rope_scaling": "ntk", **STRETCHED},
    "dynamic": {"rope_scaling": "dynamic", **STRETCHED},
    "yarn": {"rope_scaling": "yarn", "yarn_mscale_all_dim": 1.0, **STRETCHED},
    "llama3": {"rope_scaling": "llama3", **STRETCHED},
    "half": {"rotary_share": 0.5, "rope_pairs": "neighbours"},
}
REACHES: dict[str, dict[str, Any]] = {
    "all": {},
    "window": {"window": 5},
    "local-global": {"window": 5, "global_every": 2, "sink_tokens": 2},
    "sinks": {"window": 4, "global_every": 2, "head_sinks": True},
    "strided": {"sparsity": "strided", "sparse_block": 3},
    "fixed in a window": {"sparsity": "fixed", "sparse_block": 3, "window": 9, "sink_tokens": 1},
    "blocks": {"sparsity": "blocks", "sparse_block": 4},
}
COMBINATIONS = [
    (attention, position, reach)
    for attention, position, reach in itertools.product(ATTENTIONS, POSITIONS, REACHES)
    if attention != "latent" or reach == "all"
    if attention != "gpt-2" or position == "plain"
]


def _model(attention: str, position: str = "plain", reach: str = "all", **more: Any) -> MoELanguageModel:
    torch.manual_seed(1)
    config = ModelConfig(
        **{
            **BASE,
            **ATTENTIONS[attention],
            "rope": RopeConfig(**POSITIONS[position]),
            "reach": ReachConfig(**REACHES[reach]),
            **more,
        }
    )
    model = MoELanguageModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", ".sinks")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def _ids(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(37, (batch, length), generator=torch.Generator().manual_seed(7))


def _read(model: MoELanguageModel, cache: KVCache, pieces: list[int], ids_BS: Tensor | None = None) -> Tensor:
    ids_BS = _ids() if ids_BS is None else ids_BS
    logits = [model(piece, cache=cache).logits_BSV for piece in ids_BS.split(pieces, dim=1)]
    return torch.cat([piece for piece in logits if piece is not None], dim=1)


@pytest.mark.parametrize(("attention", "position", "reach"), COMBINATIONS)
def test_reading_in_pieces_equals_one_pass(attention: str, position: str, reach: str) -> None:
    """Whole chunks, single tokens, and pieces longer than the window, past the trained length."""
    model = _model(attention, position, reach)
    full = model(_ids()).logits_BSV
    for pieces in ([7, 1, 1, 10, 4], [1, 2, 19, 1]):
        cache = KVCache(model.config, batch_size=BATCH, max_length=LENGTH)
        torch.testing.assert_close(_read(model, cache, pieces), full, rtol=1e-4, atol=1e-4)
        assert cache.length == LENGTH


@pytest.mark.parametrize(("attention", "position", "reach"), COMBINATIONS)
def test_a_suffix_changes_no_bit_of_the_prefix(attention: str, position: str, reach: str) -> None:
    model, cut = _model(attention, position, reach), 11
    ids_BS = _ids()
    other_BS = torch.cat((ids_BS[:, :cut], (ids_BS[:, cut:] + 1) % 37), dim=1)
    one, other = model(ids_BS).logits_BSV, model(other_BS).logits_BSV
    assert torch.equal(one[:, :cut], other[:, :cut])
    assert not torch.allclose(one[:, cut:], other[:, cut:])


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name not in ("latent", "gpt-2")])
@pytest.mark.parametrize("reach", ["all", "local-global"])
def test_left_padding_changes_nothing_that_is_read(attention: str, reach: str) -> None:
    """Without tokens that stay visible: the first positions are those of the padding."""
    model = _model(attention, reach=reach)
    if model.config.reach.sink_tokens:
        model = _model(attention, reach="sinks")
    ids_BS, pad = _ids(), 4
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :pad] = 0
    cache = KVCache(model.config, batch_size=BATCH)
    logits = []
    for start, stop in ((0, 9), (9, 10), (10, 16), (16, 17)):
        out = model(ids_BS[:, start:stop], attention_mask_BS=mask_BS[:, :stop], cache=cache)
        logits.append(out.logits_BSV)
    alone = model(ids_BS[:1, pad:17]).logits_BSV
    torch.testing.assert_close(torch.cat(logits, dim=1)[:1, pad:], alone, rtol=1e-4, atol=1e-4)


BUFFERS = [
    ("latent", "all", "dense"),
    *itertools.product(("grouped", "mla"), ("all", "window", "local-global"), ("dense", "int8", "mapped")),
]


@pytest.mark.parametrize(("attention", "reach", "storage"), BUFFERS)
@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16])
def test_buffers_take_the_bytes_of_the_formula(
    attention: str, reach: str, storage: Any, element: torch.dtype, tmp_path: Path
) -> None:
    config = _model(attention, reach=reach).config
    folder = tmp_path if storage == "mapped" else None
    cache = KVCache(config, batch_size=BATCH, storage=storage, folder=folder, dtype=element)
    size = {"batch_size": BATCH, "storage": storage, "element_bytes": element.itemsize}
    assert cache.num_bytes == cache_bytes(config, **size)
    if storage == "mapped":
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == sum(
            layer._keys.num_bytes + layer._values.num_bytes for layer in cache.layers
        )


def test_bytes_a_token_are_those_of_the_papers() -> None:
    """Full: 2 * G * D numbers a layer; MLA: R + P; a window and two-stage latents: none beyond their bound."""

    def per_token(model: MoELanguageModel) -> float:
        sizes = [cache_bytes(model.config, batch_size=1, max_length=length) for length in (1000, 1001)]
        return (sizes[1] - sizes[0]) / model.config.num_layers

    assert per_token(_model("multi-head")) == 2 * 4 * 8 * 4
    assert per_token(_model("grouped")) == 2 * 2 * 8 * 4
    assert per_token(_model("mla")) == (10 + 4) * 4
    assert per_token(_model("grouped", reach="window")) == 0
    assert per_token(_model("latent")) == 0


def test_buffers_stay_as_they_were_made() -> None:
    for attention, reach in (("grouped", "window"), ("latent", "all"), ("mla", "local-global")):
        model = _model(attention, reach=reach)
        cache = KVCache(model.config, batch_size=BATCH)
        before = cache.num_bytes
        _read(model, cache, [9, 1, 13])
        assert cache.num_bytes == before


def test_an_int8_number_is_off_by_a_254th_of_the_largest_at_most() -> None:
    x = torch.randn(2, 3, 50, 16) * torch.logspace(-6, 6, 50)[:, None]
    slots = Int8Slots((2, 3, 50, 16), torch.device("cpu"), torch.float32)
    slots.write(slice(50), x)
    bound = x.abs().amax(dim=-1, keepdim=True) / 254
    assert bool(((slots.read(slice(50)) - x).abs() <= bound * (1 + 1e-5)).all())
    assert slots.num_bytes == 2 * 3 * 50 * (16 + 4)


@pytest.mark.parametrize("attention", ["multi-head", "grouped", "mla"])
@pytest.mark.parametrize("reach", ["all", "window"])
def test_an_int8_cache_moves_logits_by_a_percent(attention: str, reach: str) -> None:
    model = _model(attention, reach=reach)
    cache = KVCache(model.config, batch_size=BATCH, storage="int8")
    full = model(_ids()).logits_BSV
    error = (_read(model, cache, [7, 1, 1, 10, 4]) - full).norm() / full.norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("attention", ["grouped", "mla"])
@pytest.mark.parametrize("reach", ["all", "window"])
def test_a_mapped_cache_lies_in_files(attention: str, reach: str, tmp_path: Path) -> None:
    model = _model(attention, reach=reach)
    cache = KVCache(model.config, batch_size=BATCH, storage="mapped", folder=tmp_path)
    torch.testing.assert_close(
        _read(model, cache, [7, 1, 1, 10, 4]), model(_ids()).logits_BSV, rtol=1e-4, atol=1e-4
    )
    numbers = torch.frombuffer(bytearray((tmp_path / "layer-0-keys").read_bytes()), dtype=torch.float32)
    assert torch.equal(numbers, cache.layers[0]._keys.read(slice(None)).flatten())
    assert bool(numbers.any())


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name not in ("latent", "gpt-2")])
@pytest.mark.parametrize("eviction", [SinksAndRecent(recent=40), HeavyHitters(heavy=20, recent=20)])
def test_a_budget_that_is_never_reached_forgets_nothing(attention: str, eviction: Any) -> None:
    model = _model(attention)
    cache = KVCache(model.config, batch_size=BATCH, eviction=eviction)
    torch.testing.assert_close(
        _read(model, cache, [7, 1, 1, 10, 4]), model(_ids()).logits_BSV, rtol=1e-4, atol=1e-4
    )


def _one_layer(attention: str, **more: Any) -> tuple[Attention, ModelConfig, Tensor]:
    model = _model(attention, num_layers=1, first_dense_layers=1, **more)
    x_BSD = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    return model.model.layers[0].self_attn, model.config, x_BSD  # type: ignore[union-attr, return-value]


def test_streaming_reads_sinks_and_recent_tokens_at_the_places_of_the_cache() -> None:
    """StreamingLLM token by token, against projections of the kept tokens turned by hand."""
    attention, config, x_BSD = _one_layer("grouped")
    cache = KVCache(config, batch_size=BATCH, eviction=SinksAndRecent(sinks=2, recent=5))
    for step in range(LENGTH):
        start, length = cache.rope_range(1)
        rope = rope_tables(config, start, length, x_BSD)
        actual = attention(x_BSD[:, step : step + 1], rope, None, cache.layers[0])
        kept = [s for s in range(step) if s < 2 or s >= step - 5] + [step]
        if len(kept) > 8:
            kept = kept[:2] + kept[-6:]
        x = x_BSD[:, kept]
        places = rope_tables(config, 0, len(kept), x)
        q, k = (rotate(part, places) for part in attention._queries_and_keys(x))
        v = attention._split(attention.v_proj(x))
        heads = EagerCore(config)(q[:, :, -1:], k, v)
        torch.testing.assert_close(actual, attention.o_proj(heads.transpose(1, 2).flatten(2)))
    assert cache.length == LENGTH
    assert cache.layers[0].num_held == 7


def test_streaming_goes_on_past_the_trained_length() -> None:
    """No position beyond the cache is ever used, and memory does not grow."""
    model = _model("multi-head")
    cache = KVCache(model.config, batch_size=1, eviction=SinksAndRecent(sinks=2, recent=8))
    before = cache.num_bytes
    for piece in _ids(1, 70).split(1, dim=1):
        assert sum(cache.rope_range(1)) <= 11
        assert bool(model(piece, cache=cache).logits_BSV.isfinite().all())
    assert cache.length == 70 > model.config.max_seq_len
    assert (
        cache.num_bytes
        == before
        == cache_bytes(model.config, batch_size=1, eviction=SinksAndRecent(sinks=2, recent=8))
    )


def test_streaming_never_stretches_what_fits() -> None:
    """Dynamic RoPE is for the places in use, not for the tokens that went by."""
    model, plain = _model("grouped", "dynamic"), _model("grouped")
    eviction = SinksAndRecent(sinks=2, recent=8)
    caches = [KVCache(m.config, batch_size=1, max_length=500, eviction=eviction) for m in (model, plain)]
    for piece in _ids(1, 40).split(4, dim=1):
        dynamic, as_trained = (
            m(piece, cache=c).logits_BSV for m, c in zip((model, plain), caches, strict=True)
        )
        assert torch.equal(dynamic, as_trained)


@pytest.mark.parametrize("attention_name", ["grouped", "mla"])
def test_heavy_hitters_keep_what_was_read_most(attention_name: str) -> None:
    """A loop over heads with the attention mass of the keys still held."""
    attention, config, x_BSD = _one_layer(attention_name)
    cache = KVCache(config, batch_size=BATCH, eviction=HeavyHitters(heavy=3, recent=4))
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    layer = cache.layers[0]
    observe = layer.observe
    layer.observe = lambda *args: (calls.append((args[0], args[1], args[3])), observe(*args))[1]  # type: ignore
    heads = 1 if attention_name == "mla" else 2
    kept = [[list[int]() for _ in range(heads)] for _ in range(BATCH)]
    mass: dict[tuple[int, int, int], float] = {}
    for step in range(LENGTH):
        start, length = cache.rope_range(1)
        attention(x_BSD[:, step : step + 1], rope_tables(config, start, length, x_BSD), None, layer)
        q, k, visible = calls[-1]
        per_head = k.shape[1]
        for b, g in itertools.product(range(BATCH), range(heads)):
            positions = [*kept[b][g], step]
            readers = range(g * 4 // heads, (g + 1) * 4 // heads)
            for h in readers:
                scores = k[b, h * per_head // 4] @ q[b, h, 0] * attention.core.softmax_scale
                for position, weight in zip(positions, scores.softmax(0).tolist(), strict=True):
                    mass[b, g, position] = mass.get((b, g, position), 0.0) + weight
            old = sorted(positions[:-4], key=lambda p, b=b, g=g: -mass[b, g, p])[:3]
            kept[b][g] = sorted(old + positions[-4:])
        assert layer._positions_BGC.tolist() == kept  # type: ignore[union-attr]
        assert bool(visible.all())
    assert layer.num_held == 7


def test_attention_mass_of_all_keys_is_the_number_of_queries() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    mass_BGC = attention_mass(q, k, 0.3, torch.ones(1, 1, 5, 9, dtype=torch.bool), 2)
    assert mass_BGC.shape == (2, 2, 9)
    torch.testing.assert_close(mass_BGC.sum(-1), torch.full((2, 2), 5.0 * 2))


def test_a_head_reads_only_the_positions_it_keeps() -> None:
    """Positions that differ between heads become a mask for each head."""
    config = ModelConfig(dim=32, num_heads=4, num_kv_heads=2)
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    positions = torch.tensor([[[0, 4, 9], [-1, 7, 9]]])

    class _Cache:
        length, observes = 10, False

    core = EagerCore(config)
    actual = attend(core, q, Held(k, v, positions), None, _Cache(), None)  # type: ignore[arg-type]
    for h in range(4):
        keys = [0, 1, 2] if h < 2 else [1, 2]
        weights = (k[0, h // 2, keys] @ q[0, h, 0] * core.softmax_scale).softmax(0)
        torch.testing.assert_close(actual[0, h, 0], weights @ v[0, h // 2, keys])


def test_a_truncated_cache_reads_another_continuation() -> None:
    for attention, reach, back in (("mla", "all", 3), ("grouped", "window", 2), ("latent", "all", 4)):
        model, ids_BS = _model(attention, reach=reach), _ids()
        first = 5 if attention == "latent" else 4
        cache = KVCache(model.config, batch_size=BATCH)
        model(ids_BS[:, :first], cache=cache)
        cache.truncate(back)
        logits = model(ids_BS[:, back:], cache=cache).logits_BSV
        torch.testing.assert_close(logits, model(ids_BS).logits_BSV[:, back:], rtol=1e-4, atol=1e-4)


def test_what_is_forgotten_cannot_be_had_back() -> None:
    for attention, reach, eviction, message in (
        ("grouped", "window", None, r"length=3 .*holds 5; make the cache with bounded=False"),
        ("grouped", "all", SinksAndRecent(recent=4), "length=3 .*make one without eviction"),
        ("latent", "all", None, "length=3 lies in a closed chunk.*go back to 8"),
    ):
        model = _model(attention, reach=reach)
        cache = KVCache(model.config, batch_size=BATCH, eviction=eviction)
        model(_ids()[:, :10], cache=cache)
        with pytest.raises(ValueError, match=message):
            cache.truncate(3)


def test_an_unbounded_cache_of_a_window_goes_back_any_distance() -> None:
    model, ids_BS = _model("grouped", reach="window"), _ids()
    cache = KVCache(model.config, batch_size=BATCH, bounded=False)
    model(ids_BS[:, :20], cache=cache)
    cache.truncate(3)
    logits = model(ids_BS[:, 3:], cache=cache).logits_BSV
    torch.testing.assert_close(logits, model(ids_BS).logits_BSV[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "reach", "arguments", "message"),
    [
        (
            "grouped",
            "all",
            {"storage": "mapped"},
            "storage=mapped with folder=None; mapped storage needs a folder",
        ),
        ("grouped", "all", {"folder": Path("x")}, "storage=dense with folder=x"),
        (
            "grouped",
            "all",
            {"storage": "mapped", "folder": Path("x"), "device": "meta"},
            "storage=mapped does not fit device=meta",
        ),
        ("latent", "all", {"storage": "int8"}, "storage=int8.*do not fit attention=latent"),
        ("grouped", "window", {"eviction": SinksAndRecent(recent=4)}, "does not fit a model with a window"),
    ],
)
def test_errors_give_value_rule_and_remedy(
    attention: str, reach: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache(_model(attention, reach=reach).config, batch_size=1, **arguments)


def test_evictions_check_their_numbers() -> None:
    with pytest.raises(ValueError, match="recent=0 is below 1"):
        SinksAndRecent(recent=0)
    with pytest.raises(ValueError, match="keeps -1 early positions"):
        HeavyHitters(heavy=-1, recent=2)


def test_learned_positions_end() -> None:
    model = _model("gpt-2")
    ids_BS = torch.zeros(1, BASE["max_seq_len"] + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"33 tokens exceed max_seq_len=32, .* shorten the text"):
        model(ids_BS)
    with pytest.raises(ValueError, match="does not fit positions=learned"):
        KVCache(model.config, batch_size=1, eviction=SinksAndRecent(sinks=1, recent=4))
    with pytest.raises(ValueError, match="positions=learned does not fit attention=latent"):
        ModelConfig(attention="latent", block=BlockConfig(positions="learned"))
