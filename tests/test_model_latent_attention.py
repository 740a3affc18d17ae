"""Two-stage latent attention equals a loop over positions that uses only what each position may know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_config import LatentConfig, ReachConfig
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.kv_latents import LatentState
from model.latent_attention import LatentAttention, LatentCore, LatentRead
from model.lm import MoELanguageModel
from model.rope import rope_tables, rotate

BATCH, HEADS, KV_HEADS, WIDTH, LATENTS, CHUNK = 2, 4, 2, 6, 3, 4


def _config(**more: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "vocab_size": 29, "dim": HEADS * WIDTH, "num_layers": 2, "num_heads": HEADS, "num_kv_heads": KV_HEADS,
            "attention": "latent", "latents": LatentConfig(num_latents=LATENTS, latent_chunk=CHUNK),
            "num_experts": 3, "expert_dim": 8, "max_seq_len": 64, "init_std": 0.4, **more,
        }
    )  # fmt: skip


def _attention() -> LatentAttention:
    torch.manual_seed(0)
    attention = LatentAttention(_config(attention_bias="all", qk_norm="head"))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return attention


def _by_hand(attention: LatentAttention, x_SD: Tensor, t: int, valid_S: Tensor) -> Tensor:
    """What position t of one sequence puts out: both stages, in float64, one head at a time."""
    scale, start = WIDTH**-0.5, t // CHUNK * CHUNK
    queries, keys = (x[0].double() for x in attention._queries_and_keys(x_SD[None]))
    values = attention._split(attention.v_proj(x_SD[None]))[0].double()
    past = [s for s in range(start) if valid_S[s]]
    near = [s for s in range(start, t + 1) if valid_S[s] or s == t]

    def turn(x_D: Tensor, position: int) -> Tensor:
        """By the distance from the start of the chunk."""
        pair = torch.arange(WIDTH // 2).double()
        angle = (position - start) * 10_000.0 ** (-2 * pair / WIDTH)
        first, second = x_D[: WIDTH // 2], x_D[WIDTH // 2 :]
        return torch.cat(
            (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        )

    heads = []
    for h in range(HEADS):
        k, v = keys[h // 2], values[h // 2]
        columns, contents = [], []
        for latent in attention.latents[h // 2].double() if past else []:
            stage_1 = (k[past] @ latent * scale).softmax(0)
            columns.append(stage_1 @ k[past])
            contents.append(stage_1 @ v[past])
        columns += [turn(k[s], s) for s in near]
        contents += [v[s] for s in near]
        stage_2 = (torch.stack(columns) @ turn(queries[h, t], t) * scale).softmax(0)
        heads.append(stage_2 @ torch.stack(contents))
    return attention.o_proj(torch.cat(heads).float())


@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, 3 * CHUNK + 2])
@pytest.mark.parametrize("padded", [False, True])
def test_every_position_equals_the_loop(length: int, padded: bool) -> None:
    attention = _attention()
    x_BSD = torch.randn(BATCH, length, HEADS * WIDTH)
    valid_BS = torch.ones(BATCH, length, dtype=torch.bool)
    if padded:  # the first chunk of one sequence says nothing at all, and one token of the other
        valid_BS[0, : min(CHUNK + 1, length - 1)] = False
        valid_BS[1, length // 2] = False
    actual = attention(x_BSD, rope_tables(_config(), 0, length, x_BSD), valid_BS if padded else None)
    for b in range(BATCH):
        for t in range(length):
            expected = _by_hand(attention, x_BSD[b], t, valid_BS[b])
            torch.testing.assert_close(actual[b, t], expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_loop() -> None:
    attention, length = _attention(), 2 * CHUNK + 1
    x_BSD = torch.randn(1, length, HEADS * WIDTH, requires_grad=True)
    wanted = [*attention.parameters(), x_BSD]
    valid_S = torch.ones(length, dtype=torch.bool)
    loop = torch.stack([_by_hand(attention, x_BSD[0], t, valid_S) for t in range(length)])
    upstream = torch.randn_like(loop)
    expected = torch.autograd.grad(loop, wanted, upstream)
    actual = torch.autograd.grad(
        attention(x_BSD, rope_tables(_config(), 0, length, x_BSD))[0], wanted, upstream
    )
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_first_chunk_of_padding_leaves_gradients_finite() -> None:
    attention, length = _attention(), 3 * CHUNK
    x_BSD = torch.randn(1, length, HEADS * WIDTH)
    valid_BS = torch.arange(length)[None] >= CHUNK + 1
    attention(x_BSD, rope_tables(_config(), 0, length, x_BSD), valid_BS).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in attention.parameters() if p.grad is not None)
    assert attention.latents.grad is not None


def test_large_scores_do_not_overflow() -> None:
    read = LatentRead(_config())
    latents = torch.full((KV_HEADS, LATENTS, WIDTH), 40.0)
    k = torch.randn(1, KV_HEADS, 5 * CHUNK, WIDTH) * torch.linspace(30, 0.1, 5 * CHUNK)[:, None]
    states = read(latents, k, torch.randn_like(k))
    assert all(bool(x.isfinite().all()) for x in states)
    assert states.k_BGMD.shape == (1, KV_HEADS, 6, LATENTS, WIDTH)


def test_reading_on_from_a_state_equals_reading_at_once() -> None:
    torch.manual_seed(0)
    read = LatentRead(_config())
    latents = torch.randn(KV_HEADS, LATENTS, WIDTH)
    k, v = torch.randn(2, BATCH, KV_HEADS, 5 * CHUNK, WIDTH)
    whole = read(latents, k, v)
    cut = 2 * CHUNK
    first = read(latents, k[:, :, :cut], v[:, :, :cut])
    before = LatentState(*(x[:, :, -1] for x in first))
    rest = read(latents, k[:, :, cut:], v[:, :, cut:], None, before)
    for a, b in zip(whole, rest, strict=True):
        torch.testing.assert_close(b, a[:, :, 2:])


def test_both_stages_can_be_rebuilt_by_hooks() -> None:
    """Stage 1 from the arguments of `read`, stage 2 from those of `core`; their product makes the output."""
    torch.manual_seed(0)
    model = MoELanguageModel(_config())
    attention: Any = model.model.layers[1].self_attn
    seen: dict[str, Any] = {}
    attention.read.register_forward_hook(lambda module, args, out: seen.update(read=args))
    attention.core.register_forward_hook(lambda module, args, out: seen.update(core=args, out=out))
    length = 3 * CHUNK + 2
    model(torch.randint(29, (BATCH, length)))
    latents_GMD, k_BGCD, v_BGCD = seen["read"][:3]
    q_BHSD, keys, values, mask = seen["core"]
    core: LatentCore = attention.core
    visible = core.visible_keys(length, keys.shape[2], mask, keys.device)
    scores = q_BHSD @ keys.repeat_interleave(2, 1).transpose(-1, -2) * core.softmax_scale
    stage_2 = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    torch.testing.assert_close(stage_2 @ values.repeat_interleave(2, 1), seen["out"])
    chunks = core.num_chunks(keys.shape[2])
    assert chunks == 4
    stage_1 = torch.zeros(BATCH, KV_HEADS, chunks, LATENTS, length)
    for n in range(1, chunks):
        past = k_BGCD[:, :, : n * CHUNK]
        scores = torch.einsum("gmd,bgcd->bgmc", latents_GMD, past) * attention.read.softmax_scale
        stage_1[:, :, n, :, : n * CHUNK] = scores.softmax(-1)
    means = (stage_1 @ v_BGCD[:, :, None]).flatten(2, 3)
    torch.testing.assert_close(means, values[:, :, : chunks * LATENTS])
    through = stage_2[..., : chunks * LATENTS] @ stage_1.flatten(2, 3).repeat_interleave(2, 1)
    effective = through + stage_2[..., chunks * LATENTS :]
    torch.testing.assert_close(effective @ v_BGCD.repeat_interleave(2, 1), seen["out"])
    assert not bool(effective.triu(1).any())
    torch.testing.assert_close(effective.sum(-1), torch.ones(BATCH, HEADS, length))


def test_a_shift_by_whole_chunks_of_the_same_past_changes_nothing() -> None:
    """Distances count from the start of a chunk: absolute positions are nowhere."""
    attention = _attention()
    x_BSD = torch.randn(1, CHUNK, HEADS * WIDTH)
    tables = [rope_tables(_config(), start, CHUNK, x_BSD) for start in (0, 5 * CHUNK)]
    assert torch.equal(attention(x_BSD, tables[0]), attention(x_BSD, tables[1]))
    q = torch.randn(1, 1, CHUNK, WIDTH)
    assert torch.equal(rotate(q, tables[0])[:, :, 0], q[:, :, 0])


def test_a_cache_costs_the_same_at_any_length() -> None:
    torch.manual_seed(0)
    model = MoELanguageModel(_config())
    cache = KVCache(model.config, batch_size=1)
    sizes = set()
    for piece in torch.randint(29, (1, 50)).split(5, dim=1):
        model(piece, cache=cache)
        sizes.add(cache.num_bytes)
    assert len(sizes) == 1


def test_a_window_on_top_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention=latent with .*window=4.* has two reaches"):
        _config(reach=ReachConfig(window=4))
    with pytest.raises(ValueError, match="num_latents=0 is below 1"):
        LatentConfig(num_latents=0)


@pytest.mark.parametrize(
    "values", [{"dim": 96}, {"dim": 48, "init_std": 0.05}, {"dim": 96, "qk_norm": "head"}]
)
def test_latents_begin_apart(values: dict[str, Any]) -> None:
    """Scores spread by 0.75; were they normal, the cosine of two latents' weights were exp(-0.75^2) = 0.57."""
    torch.manual_seed(0)
    shape = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "attention": "latent",
        "num_layers": 1,
        "init_std": 0.02,
        **values,
    }
    sizes = LatentConfig(num_latents=16, latent_chunk=64)
    lm = MoELanguageModel(ModelConfig(vocab_size=300, **shape, latents=sizes, max_seq_len=1024))
    read: Any = lm.model.layers[0].self_attn.read
    seen: list[Tensor] = []
    read.register_forward_hook(
        lambda module, args, out: seen.append(
            torch.einsum("gmd,bgcd->bgmc", *args[:2]) * module.softmax_scale
        )
    )
    lm(torch.randint(300, (8, 1024)))
    assert seen[0].detach().std().item() == pytest.approx(0.75, rel=0.2)
    weights = torch.nn.functional.normalize(seen[0].softmax(-1), dim=-1)
    cosines = weights @ weights.transpose(-1, -2)
    apart = cosines[..., ~torch.eye(16, dtype=torch.bool)]
    assert 0.4 < apart.mean().item() < 0.75
