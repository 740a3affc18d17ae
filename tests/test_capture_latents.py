"""What is recorded of latents equals a loop over tokens, heads and slots, from weights and inputs, in float64."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from capture_models import VOCAB, Kept, small_model
from torch import Tensor, nn

from model.attention_config import LatentConfig, MLAConfig
from moeviz.capture.latent_batch import blocks
from moeviz.capture.latent_sites import find_latents, spread
from moeviz.capture.latents import LatentSlot
from moeviz.capture.probe import attach
from moeviz.policy import SamplingPolicy
from moeviz.records import LatentRecord, LoadRecord

BATCH, LENGTH, RANK, QUERY_RANK, SLOTS, CHUNK = 3, 14, 10, 12, 3, 4
MLA: dict[str, Any] = {
    "attention": "mla",
    "num_kv_heads": None,
    "mla": MLAConfig(
        q_lora_rank=QUERY_RANK, kv_lora_rank=RANK, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
    ),
}
TWO_STAGE: dict[str, Any] = {
    "attention": "latent",
    "latents": LatentConfig(num_latents=SLOTS, latent_chunk=CHUNK),
    "init_std": 0.6,
}
ALL = SamplingPolicy(route_every=0, attention_every=0, latent_every=1, latent_layers="all")


def ids() -> Tensor:
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))


def recorded(
    model: nn.Module, policy: SamplingPolicy = ALL, **call: Any
) -> dict[tuple[int, str], LatentRecord]:
    """One training step."""
    sink = Kept()
    with attach(model, sink, policy=policy) as probe:
        model(ids(), **call)
        probe.step(loss=1.0)
    assert probe.failures.count == 0
    return {(record.layer, record.name): record for record in sink.of(LatentRecord)}


def inputs_of(model: nn.Module, part: str, **call: Any) -> list[np.ndarray]:
    """What every module whose name ends with `part` was called with, float64 [B, S, D]."""
    seen: list[np.ndarray] = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(
                (args[0] if args else kwargs["hidden_states"]).detach().double().numpy()
            ),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if name.endswith(part)
    ]
    model(ids(), **call)
    for handle in handles:
        handle.remove()
    return seen


def normed(x: np.ndarray, norm: Any) -> np.ndarray:
    """RMSNorm by its formula."""
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 1e-6)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * norm.weight.detach().double().numpy()


def weight(linear: nn.Module) -> np.ndarray:
    return linear.weight.detach().double().numpy()  # type: ignore[operator, union-attr]


def erank(matrix: np.ndarray) -> float:
    singular = np.linalg.svd(matrix, compute_uv=False)
    share = singular[singular > 0] / singular.sum()
    return math.exp(-sum(p * math.log(p) for p in share))


def check_mla(
    attention: Any, x_BSD: np.ndarray, records: dict[str, LatentRecord], nope: int, heads: int
) -> None:
    """All that is stored of one MLA layer, from the hidden states that went in."""
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    c_TR = normed((x_TD @ weight(attention.kv_a_proj_with_mqa).T)[:, :RANK], attention.kv_a_layernorm)
    kv = records["kv"]
    centred = c_TR - c_TR.mean(axis=0)
    assert kv.tokens == len(c_TR)
    np.testing.assert_allclose(kv.grid_XSC[0], c_TR[:LENGTH], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kv.singular_XR[0], np.linalg.svd(centred, compute_uv=False), rtol=1e-4)
    np.testing.assert_allclose(kv.profile_XC[0], centred.std(axis=0), rtol=1e-4)
    variances = np.linalg.eigvalsh(np.cov(c_TR.T))
    up = weight(attention.kv_b_proj).reshape(heads, -1, RANK)
    expected = {
        "latent_pr": variances.sum() ** 2 / (variances**2).sum(),
        "latent_erank": erank(centred),
        "latent_util": erank(centred) / RANK,
        "latent_erank_k": erank(centred @ up[:, :nope].reshape(-1, RANK).T),
        "latent_erank_v": erank(centred @ up[:, nope:].reshape(-1, RANK).T),
        "latent_dead": 0.0,
    }
    order = np.sort(variances)[::-1]
    expected["latent_dim90"] = next(n for n in range(1, RANK + 1) if order[:n].sum() >= 0.9 * order.sum())
    assert kv.values == pytest.approx(expected, rel=1e-4)
    q_TR = normed(x_TD @ weight(attention.q_a_proj).T, attention.q_a_layernorm)
    np.testing.assert_allclose(records["q"].grid_XSC[0], q_TR[:LENGTH], rtol=1e-4, atol=1e-5)
    assert records["q"].values == pytest.approx({"latent_q_erank": erank(q_TR - q_TR.mean(axis=0))}, rel=1e-4)


def test_compressed_latents_are_those_of_the_formula() -> None:
    model = small_model(**MLA)
    records = recorded(model)
    assert set(records) == {(layer, name) for layer in range(3) for name in ("kv", "q")}
    for layer, x_BSD in enumerate(inputs_of(model, "self_attn")):
        own = {name: records[layer, name] for name in ("kv", "q")}
        check_mla(model.model.layers[layer].self_attn, x_BSD, own, nope=6, heads=4)


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
def test_hugging_face_models_show_the_same(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=QUERY_RANK, kv_lora_rank=RANK,
        qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, initializer_range=0.2,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    records = recorded(model)
    assert [site.kind for site in find_latents(model)] == ["mla", "mla"]
    for layer, x_BSD in enumerate(inputs_of(model, "self_attn")):
        own = {name: records[layer, name] for name in ("kv", "q")}
        check_mla(model.model.layers[layer].self_attn, x_BSD, own, nope=6, heads=4)


def stages_by_hand(attention: Any, x_SD: np.ndarray, valid: list[int], theta: float) -> tuple[Any, Any, int]:
    """(read [G][M][token], write [H][t][M], where the last whole chunk starts), one number at a time."""
    groups, slots, width = attention.latents.shape
    scale, heads = width**-0.5, attention.q_proj.out_features // width

    def project(linear: nn.Module, count: int) -> np.ndarray:
        return (x_SD @ weight(linear).T).reshape(len(x_SD), count, width).transpose(1, 0, 2)

    queries, keys = project(attention.q_proj, heads), project(attention.k_proj, groups)
    latents = attention.latents.detach().double().numpy()

    def turn(x: np.ndarray, distance: int) -> np.ndarray:
        half = width // 2
        angle = distance * theta ** (-2 * np.arange(half) / width)
        first, second = x[:half], x[half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        )

    def reading(g: int, m: int, below: int) -> dict[int, float]:
        scores = {s: math.exp(keys[g][s] @ latents[g][m] * scale) for s in valid if s < below}
        total = sum(scores.values())
        return {s: score / total for s, score in scores.items()}

    end = valid[-1] + 1
    start = max((end // CHUNK - 1) * CHUNK, 0) or (end - 1) // CHUNK * CHUNK
    read = [[reading(g, m, start) for m in range(slots)] for g in range(groups)]
    write: list[list[list[float]]] = [[] for _ in range(heads)]
    for h in range(heads):
        g = h * groups // heads
        for t in valid:
            begin = t // CHUNK * CHUNK
            if not any(s < begin for s in valid):
                continue
            means = [sum(p * keys[g][s] for s, p in reading(g, m, begin).items()) for m in range(slots)]
            query = turn(queries[h][t], t - begin)
            scores = [math.exp(query @ mean * scale) for mean in means]
            near = [math.exp(query @ turn(keys[g][s], s - begin) * scale) for s in valid if begin <= s <= t]
            write[h].append([score / (sum(scores) + sum(near)) for score in scores])
    return read, write, start


def entropy(values: Any) -> float:
    return -sum(p * math.log(p) for p in values if p > 0)


@pytest.mark.parametrize("padded", [False, True])
def test_both_stages_equal_a_loop(padded: bool) -> None:
    model = small_model(**TWO_STAGE)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    lengths = [LENGTH, 11, 7] if padded else [LENGTH] * BATCH
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    call: dict[str, Any] = {"attention_mask_BS": mask} if padded else {}
    records = recorded(model, **call)
    assert set(records) == {(layer, name) for layer in range(3) for name in ("read", "write")}
    for layer, x_BSD in enumerate(inputs_of(model, "self_attn", **call)):
        attention = model.model.layers[layer].self_attn
        by_hand = [
            stages_by_hand(attention, x_SD, list(range(length)), model.config.rope_base)
            for x_SD, length in zip(x_BSD, lengths, strict=True)
        ]
        check_first_stage(records[layer, "read"], [read for read, _, _ in by_hand])
        check_second_stage(records[layer, "write"], by_hand, lengths)


def check_first_stage(record: LatentRecord, reads: list[Any]) -> None:
    assert record.heads == (0, 1)
    assert (record.first, record.length) == (0, len(reads[0][0][0]))
    for g in range(2):
        shown = np.array([list(slot.values()) for slot in reads[0][g]]).T
        np.testing.assert_allclose(record.grid_XSC[g], shown, rtol=1e-4, atol=1e-6)
        singular = np.linalg.svd(shown, compute_uv=False)
        np.testing.assert_allclose(record.singular_XR[g], singular, rtol=1e-3, atol=1e-6)
    entropies = [
        [[entropy(slot.values()) / math.log(len(slot)) for slot in head] for head in read] for read in reads
    ]
    np.testing.assert_allclose(record.profile_XC, np.mean(entropies, axis=0), rtol=1e-4)
    overlaps = []
    for head in (head for read in reads for head in read):
        a = [np.array(list(slot.values())) for slot in head]
        cosines = [
            a[i] @ a[j] / np.linalg.norm(a[i]) / np.linalg.norm(a[j])
            for i in range(SLOTS)
            for j in range(SLOTS)
            if i != j
        ]
        overlaps.append(np.mean(cosines))
    expected = {"read_entropy": np.mean(entropies), "slot_overlap": np.mean(overlaps)}
    assert record.values == pytest.approx(expected, rel=1e-4)


def check_second_stage(record: LatentRecord, by_hand: list[Any], lengths: list[int]) -> None:
    assert record.heads == (0, 1, 2, 3)
    assert (record.first, record.length) == (
        CHUNK,
        lengths[0] - CHUNK,
    )  # the first chunk has no slots to read
    shares, effective, dead, choices, ranks = [], [], [], [], []
    for h in range(4):
        tokens = [row for _, write, _ in by_hand for row in write[h]]
        mass = np.mean(tokens, axis=0)
        shares.append(mass.sum())
        part = mass / mass.sum()
        np.testing.assert_allclose(record.profile_XC[h], part, rtol=1e-4)
        np.testing.assert_allclose(record.grid_XSC[h], by_hand[0][1][h], rtol=1e-4, atol=1e-6)
        effective.append(math.exp(entropy(part)))
        dead.append(sum(p < 0.02 / SLOTS for p in part))
        choices.append(np.mean([entropy(np.array(row) / sum(row)) / math.log(SLOTS) for row in tokens]))
        maps = []
        for (read, write, start), length in zip(by_hand, lengths, strict=True):
            last = [
                row
                for t, row in zip(range(CHUNK, length), write[h], strict=True)
                if start <= t < start + CHUNK
            ]
            slots = np.array([list(slot.values()) for slot in read[h // 2]])
            maps.append(np.array(last) @ slots)
        ranks += [erank(one) for one in maps]
        singular = np.linalg.svd(maps[0], compute_uv=False)[:SLOTS]
        np.testing.assert_allclose(record.singular_XR[h], singular, rtol=1e-3, atol=1e-5)
    expected = {
        "slot_share": np.mean(shares),
        "slot_n_eff": np.mean(effective),
        "slot_dead": np.mean(dead),
        "write_entropy": np.mean(choices),
        "eff_map_rank": np.mean(ranks),
    }
    assert record.values == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", [MLA, TWO_STAGE], ids=["mla", "two-stage"])
def test_training_does_not_notice(kind: dict[str, Any]) -> None:
    def train(watched: bool) -> list[Tensor]:
        model = small_model(**kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = attach(model, Kept(), policy=ALL) if watched else None
        for _ in range(3):
            loss = model(ids(), ids()).ce
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if probe is not None:
                probe.step(loss=loss)
        if probe is not None:
            probe.close()
        return [loss.detach(), *(parameter.detach() for parameter in model.parameters())]

    for watched, alone in zip(train(True), train(False), strict=True):
        assert torch.equal(watched, alone)


@pytest.mark.parametrize("kind", [MLA, TWO_STAGE], ids=["mla", "two-stage"])
@pytest.mark.parametrize("where", ["hooks", "after the forward", "in the writer"])
def test_failures_cost_pictures_and_no_loads(
    kind: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken on purpose")

    model, sink = small_model(**kind), Kept()
    if where == "in the writer":  # what a deferred batch raises is the sink's business
        monkeypatch.setattr("moeviz.capture.latent_batch.LatentRecords.__iter__", fail)
    elif where == "after the forward":
        monkeypatch.setattr("moeviz.capture.latent_tap.LatentTap._collect", fail)
    elif kind is TWO_STAGE:
        monkeypatch.setattr("moeviz.capture.latents._reading", fail)
    else:
        frozen = MappingProxyType[str, Tensor]({})
        monkeypatch.setattr(LatentSlot, "clear", lambda slot: setattr(slot, "latents", frozen))
        monkeypatch.setattr(LatentSlot, "__init__", LatentSlot.clear)
    with attach(model, sink, policy=ALL) as probe:
        for _ in range(2):
            model(ids(), ids()).ce.backward()
            probe.step(loss=1.0)
    assert probe.failures.count > 0
    assert not sink.of(LatentRecord)
    assert [record.step for record in sink.of(LoadRecord)] == [0, 1]


def test_no_more_tokens_than_asked_for_are_looked_at() -> None:
    records = recorded(small_model(**MLA), SamplingPolicy(latent_every=1, latent_layers=1, latent_tokens=20))
    assert {layer for layer, _ in records} == {1}
    assert records[1, "kv"].tokens == 20
    model, sink = small_model(**MLA), Kept()
    with attach(model, sink, policy=SamplingPolicy(latent_every=2, latent_tokens=100)) as probe:
        for _ in range(3):
            for _ in range(3):  # micro-batches of 42 tokens
                model(ids())
            probe.step(loss=1.0)
    steps = {record.step: record.tokens for record in sink.of(LatentRecord)}
    assert steps[2] == 100
    assert set(steps) == {0, 2}
    assert steps[0] <= 100


def test_padding_is_left_out() -> None:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 5:] = 0
    record = recorded(small_model(**MLA), attention_mask_BS=mask)[0, "kv"]
    assert record.tokens == 2 * LENGTH + 5


def test_a_model_without_latents_records_no_sequence_for_them() -> None:
    sink = Kept()
    with attach(small_model(), sink, policy=ALL) as probe:
        model = probe._tap._root
        model(ids())
        probe.step(loss=1.0)
    assert probe.info.latents == ()
    assert {type(record) for record in sink.records} == {LoadRecord, type(sink.records[-1])}


def test_layers_are_spread_evenly() -> None:
    assert spread(12, 4) == (1, 4, 7, 10)
    assert spread(3, 8) == spread(3, "all") == (0, 1, 2)
    assert spread(0, "all") == spread(5, 0) == ()


def test_blocks_keep_sums_and_means() -> None:
    values = np.arange(10.0).reshape(1, 10, 1)
    np.testing.assert_allclose(blocks(values, mean=True, rows=4)[0, :, 0], [1, 4, 7, 9])
    np.testing.assert_allclose(blocks(values, mean=False, rows=4)[0, :, 0], [3, 12, 21, 9])
    np.testing.assert_allclose(blocks(values, mean=True, rows=10), values)


def test_compiled_models_show_the_same() -> None:
    one = {"num_layers": 1, "first_dense_layers": 0}
    for kind in (MLA | one, TWO_STAGE | one):
        eager = recorded(small_model(**kind))
        model, sink = small_model(**kind), Kept()
        with attach(model, sink, policy=ALL) as probe:
            torch.compile(model, backend="eager")(ids())
            probe.step(loss=1.0)
        found = {(record.layer, record.name): record for record in sink.of(LatentRecord)}
        assert set(found) == set(eager)
        for place, record in found.items():
            np.testing.assert_allclose(record.grid_XSC, eager[place].grid_XSC, rtol=1e-4, atol=1e-5)
