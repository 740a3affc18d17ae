"""Recorded maps against what eager attention itself computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from capture_models import VOCAB, Kept, mixtral, small_model
from torch import Tensor, nn

from model.attention import set_attention_core
from model.attention_config import LatentConfig, ReachConfig
from model.attention_core import EagerCore
from moeviz.capture.attention import averaging, block_maps, choose_heads, pattern, select
from moeviz.capture.probe import attach
from moeviz.capture.reading import AttentionCall
from moeviz.policy import SamplingPolicy
from moeviz.records import AttentionRecord, SequenceRecord

EVERY_HEAD = SamplingPolicy(route_every=1, route_sequences="all", attention_every=1, attention_heads=99)
B, S = 2, 9


def ids_and_mask(padded: bool) -> tuple[Tensor, Tensor]:
    """Token ids and a mask that pads the first row on the left and the second on the right."""
    ids_BS = torch.randint(1, VOCAB, (B, S), generator=torch.Generator().manual_seed(8))
    mask_BS = torch.ones(B, S, dtype=torch.long)
    if padded:
        mask_BS[0, :3] = 0
        mask_BS[1, 7:] = 0
    return ids_BS, mask_BS


def recorded(model: nn.Module, *args: Any, **kwargs: Any) -> list[AttentionRecord]:
    """All maps of one forward, measured although the model does not train."""
    sink = Kept()
    with attach(model, sink, policy=EVERY_HEAD, when="always") as probe, torch.no_grad():
        model(*args, **kwargs)
        probe.step()
    return sink.of(AttentionRecord)


def cut(weights_SC: Tensor, valid_S: Tensor) -> np.ndarray:
    """The rows and columns of a sequence's own tokens."""
    return weights_SC[valid_S][:, valid_S].float().numpy()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_maps_of_a_fused_model_equal_the_eager_attentions_of_its_twin(
    padded: bool, window: int | None
) -> None:
    fused = mixtral(sliding_window=window, attn_implementation="sdpa").eval()
    eager = mixtral(sliding_window=window, attn_implementation="eager").eval()
    ids_BS, mask_BS = ids_and_mask(padded)
    arguments = {"input_ids": ids_BS, "attention_mask": mask_BS, "use_cache": False}
    with torch.no_grad():
        truth = eager(**arguments, output_attentions=True).attentions
    maps = recorded(fused, **arguments)
    assert len(maps) == 3 * B * 4
    for one in maps:
        expected = cut(truth[one.layer][one.seq, one.head], mask_BS[one.seq].bool())
        np.testing.assert_allclose(one.map_QC, expected, atol=1e-5)
        np.testing.assert_allclose(one.map_QC.sum(-1), 1, atol=1e-5)
        assert (one.q_len, one.k_len) == expected.shape


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_maps_with_sinks_and_with_latent_heads_equal_eager_attentions(name: str) -> None:
    from test_capture_families import FAMILIES, build

    model = build(name, **{**FAMILIES[name].config, "sliding_window": 4}).eval()
    model.set_attn_implementation("eager")
    for parameter_name, parameter in model.named_parameters():
        if "sinks" in parameter_name:
            nn.init.normal_(parameter)
    ids_BS, _ = ids_and_mask(False)
    with torch.no_grad():
        truth = model(input_ids=ids_BS, output_attentions=True, use_cache=False).attentions
    maps = recorded(model, input_ids=ids_BS, use_cache=False)
    assert len(maps) == 3 * B * 4
    for one in maps:
        np.testing.assert_allclose(one.map_QC, truth[one.layer][one.seq, one.head].numpy(), atol=1e-5)
    assert (min(one.map_QC.sum(-1).min() for one in maps) < 0.99) == (name == "gpt_oss")


def eager_weights(model: nn.Module, ids_BS: Tensor, mask_BS: Tensor | None) -> dict[int, Tensor]:
    """Weights [B, H, S, C] of each core, by handing it the identity as values."""
    found: dict[int, Tensor] = {}

    def ask(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        q_BHSD, k_BGCD, _, *rest = args
        eye = torch.eye(k_BGCD.shape[2]).expand(*k_BGCD.shape[:2], -1, -1)
        found[core.layer] = core.forward(q_BHSD, k_BGCD, eye, *rest, **kwargs)

    hooks = [
        m.register_forward_pre_hook(ask, with_kwargs=True)
        for m in model.modules()
        if hasattr(m, "visible_keys")
    ]
    with torch.no_grad():
        model(ids_BS, attention_mask_BS=mask_BS)
    for hook in hooks:
        hook.remove()
    return found


OWN: dict[str, dict[str, Any]] = {
    "grouped": {},
    "window": {"reach": ReachConfig(window=4)},
    "head sinks": {"reach": ReachConfig(head_sinks=True)},
    "strided": {"reach": ReachConfig(sparsity="strided", sparse_block=3)},
    "mla": {"attention": "mla", "num_kv_heads": None},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_maps_of_the_own_model_equal_its_eager_core(name: str, padded: bool) -> None:
    model = small_model(**OWN[name]).eval()
    ids_BS, mask_BS = ids_and_mask(padded)
    mask = mask_BS if padded else None
    maps = recorded(model, ids_BS, attention_mask_BS=mask)
    set_attention_core(model, EagerCore, model.config)
    truth = eager_weights(model, ids_BS, mask)
    assert len(maps) == 3 * B * 4
    for one in maps:
        expected = cut(truth[one.layer][one.seq, one.head], mask_BS[one.seq].bool())
        np.testing.assert_allclose(one.map_QC, expected, atol=1e-5)


def test_two_stage_latents_show_their_keys() -> None:
    model = small_model(attention="latent", latents=LatentConfig(num_latents=2, latent_chunk=4)).eval()
    ids_BS, _ = ids_and_mask(False)
    maps = recorded(model, ids_BS)
    truth = eager_weights(model, ids_BS, None)
    for one in maps:
        expected = truth[one.layer][one.seq, one.head].numpy()
        assert (one.q_len, one.k_len) == expected.shape == (S, 3 * 2 + S)
        np.testing.assert_allclose(one.map_QC, expected, atol=1e-5)


@pytest.fixture
def call() -> Iterator[AttentionCall]:
    generator = torch.Generator().manual_seed(2)
    q_BHSD, k_BGCD = (
        torch.randn(3, 6, 13, 8, generator=generator),
        torch.randn(3, 2, 13, 8, generator=generator),
    )
    return AttentionCall(q_BHSD, k_BGCD, 0.4)


def naive(call: AttentionCall, row: int, head: int) -> np.ndarray:
    """softmax(q k^T) of one head, query by query in float64."""
    q_SD = call.q_BHSD[row, head].double().numpy()
    k_CD = call.k_BGCD[row, head // (call.q_BHSD.shape[1] // call.k_BGCD.shape[1])].double().numpy()
    weights = np.zeros((len(q_SD), len(k_CD)))
    for s, q_D in enumerate(q_SD):
        first = 0 if call.window is None else max(0, s + 1 - call.window)
        z = np.array([q_D @ k_D * call.scale for k_D in k_CD[first : s + 1]])
        z = z if call.softcap is None else call.softcap * np.tanh(z / call.softcap)
        weights[s, first : s + 1] = np.exp(z) / np.exp(z).sum()
    return weights


@pytest.mark.parametrize("change", [{}, {"window": 3}, {"softcap": 0.5}])
def test_pattern_of_chosen_rows_and_heads_equals_a_loop(call: AttentionCall, change: dict[str, Any]) -> None:
    call = call._replace(**change)
    chosen = select(call, torch.tensor([2, 0]), (1, 4))
    weights = pattern(chosen)
    for n, row in enumerate((2, 0)):
        for j, head in enumerate((1, 4)):
            np.testing.assert_allclose(weights[n, j].numpy(), naive(call, row, head), atol=1e-6)


def test_block_maps_average_blocks_of_the_own_tokens(call: AttentionCall) -> None:
    valid_NS = torch.ones(1, 13, dtype=torch.bool)
    valid_NS[0, :2] = False
    call = call._replace(mask=torch.ones(3, 1, 13, 13, dtype=torch.bool).tril(), causal=False)
    chosen = select(call, torch.tensor([1]), (3,))
    full = pattern(chosen)[0, 0, 2:, 2:].numpy()
    pooled = block_maps(chosen, valid_NS, size=4)[0, 0].numpy()
    for i in range(4):
        for j in range(4):
            block = full[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            assert pooled[i, j] == pytest.approx(block.mean() if block.size else 0, abs=1e-6)


@pytest.mark.parametrize("size", [4, 128])
def test_rows_computed_in_chunks_change_nothing(
    call: AttentionCall, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    chosen = select(call, torch.tensor([0, 1, 2]), range(6))
    at_once = block_maps(chosen, None, size=size)
    monkeypatch.setattr("moeviz.capture.attention._CHUNK_BYTES", 4 * 3 * 6 * 13 * 2)
    torch.testing.assert_close(block_maps(chosen, None, size=size), at_once)


def test_a_map_with_as_many_cells_as_tokens_is_the_pattern(call: AttentionCall) -> None:
    chosen = select(call, torch.tensor([0, 1]), (1, 4))
    everywhere_NS = torch.ones(2, 13, dtype=torch.bool)
    maps = block_maps(chosen, None, size=13)
    assert torch.equal(maps, pattern(chosen))
    torch.testing.assert_close(maps, block_maps(chosen, everywhere_NS, size=13))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 100])
def test_averaging_uses_the_smallest_blocks_that_fit(length: int) -> None:
    average_PS = averaging(torch.ones(1, length, dtype=torch.bool), 8)[0]
    used = average_PS.sum(-1) > 0
    block = -(-length // 8)
    assert int(used.sum()) == -(-length // block) <= 8
    assert torch.allclose(average_PS[used].sum(-1), torch.ones(()))


@pytest.mark.parametrize(("num_heads", "wanted"), [(8, 4), (6, 4), (3, 8), (32, 5), (1, 1)])
def test_heads_are_spread_evenly(num_heads: int, wanted: int) -> None:
    heads = choose_heads(num_heads, wanted)
    assert len(set(heads)) == len(heads) == min(num_heads, wanted)
    assert set(heads) <= set(range(num_heads))
    gaps = np.diff(heads)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_training_records_few_maps_on_attention_steps_only() -> None:
    model, sink = small_model(), Kept()
    policy = SamplingPolicy(route_every=0, attention_every=2, attention_heads=2, attention_size=8)
    with attach(model, sink, policy=policy) as probe:
        for step in range(3):
            for _ in range(2):
                model(torch.randint(0, VOCAB, (3, 11)))
            probe.step()
            assert {one.step for one in sink.of(AttentionRecord)} == set(range(0, step + 1, 2))
    maps = sink.of(AttentionRecord)
    assert len(maps) == 2 * 2 * 3 * 2  # steps, sequences, cores, heads
    assert {one.map_QC.shape for one in maps} == {(6, 6)}
    texts = {(record.step, int(seq)) for record in sink.of(SequenceRecord) for seq in record.seqs}
    assert {(one.step, one.seq) for one in maps} <= texts


def test_lookup_of_attention_functions_is_restored() -> None:
    from transformers.modeling_utils import AttentionInterface

    before = AttentionInterface.get_interface
    first, second = attach(mixtral(), Kept()), attach(mixtral(), Kept())
    assert AttentionInterface.get_interface is not before
    first.close()
    second.close()
    assert AttentionInterface.get_interface is before
