"""A compiled step changes the cost of a text and nothing else, and says what it cannot be made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.attention_config import LatentConfig, MLAConfig, ReachConfig, RopeConfig
from model.block_config import BlockConfig
from model.compiled_step import CompiledStep
from model.config import ModelConfig
from model.expert_config import ExpertConfig, RouterConfig
from model.generate import Drafts, Sampling, generate
from model.kv_cache import KVCache
from model.kv_eviction import SinksAndRecent
from model.lm import MoELanguageModel

LENGTH, NEW = 9, 14
GREEDY = Sampling(max_new_tokens=NEW, temperature=0)
BASE = ModelConfig(
    vocab_size=61, dim=32, num_layers=3, num_heads=4, num_experts=5, top_k=2, expert_dim=16, max_seq_len=64,
    first_dense_layers=1, dense_ffn_dim=32, init_std=0.2,
)  # fmt: skip
MLA = MLAConfig(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
STRETCHED: dict[str, Any] = {"rope_factor": 2.0, "rope_trained_len": 16}
MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped": {"num_kv_heads": 2, "qk_norm": "head", "attention_bias": "all"},
    "multi-query": {"num_kv_heads": 1, "reach": ReachConfig(head_sinks=True)},
    "mla": {"attention": "mla", "mla": MLA},
    "gpt-2": {"block": BlockConfig(norm="layer", positions="learned", dense_layer="gelu")},
    "local-global": {
        "reach": ReachConfig(window=5, global_every=2, sink_tokens=2),
        "rope": RopeConfig(local_rope_base=100.0),
    },
    "pattern": {"reach": ReachConfig(sparsity="strided", sparse_block=3)},
    "dynamic": {"rope": RopeConfig(rope_scaling="dynamic", **STRETCHED)},
    "neighbours": {"rope": RopeConfig(rotary_share=0.5, rope_pairs="neighbours")},
    "groups": {
        "num_experts": 6,
        "router": RouterConfig(score="sigmoid", selection_bias=True, num_groups=3, top_groups=2),
        "num_shared_experts": 1,
        "experts": ExpertConfig(shared_expert_gate=True),
    },
    "biases": {
        "router": RouterConfig(router_bias=True),
        "experts": ExpertConfig(expert_bias=True, expert_activation="clamped"),
    },
    "tied": {"tie_embeddings": True},
}


@pytest.fixture
def traced() -> Iterator[None]:
    """Programs are run as they were traced: what is compiled of them is torch's business, and costs seconds."""
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield


def _model(**values: Any) -> MoELanguageModel:
    torch.manual_seed(0)
    model = MoELanguageModel(replace(BASE, **values)).eval()
    for name, parameter in model.named_parameters():  # biases and sinks begin at 0
        if name.endswith(("bias", "sinks")):
            nn.init.normal_(parameter, std=0.3)
    return model


def _ids(batch: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, BASE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_full_passes(name: str, batch: int) -> None:
    model, ids = _model(**MODELS[name]), _ids(batch, LENGTH + NEW)
    # As long as what is read in one pass: dynamic positions are stretched for it.
    cache = KVCache(model.config, batch_size=batch, max_length=LENGTH + NEW, bounded=False)
    with torch.no_grad():
        expected = model(ids).logits_BSV
        model(ids[:, :LENGTH], cache=cache)
    step = CompiledStep(model, cache)
    got = torch.stack([step(ids[:, at : at + 1]) for at in range(LENGTH, LENGTH + NEW)], dim=1)
    torch.testing.assert_close(got, expected[:, LENGTH:], rtol=1e-4, atol=1e-4)
    assert cache.length == LENGTH + NEW
    with pytest.raises(ValueError, match=f"{LENGTH + NEW + 1} tokens exceed the cache's capacity"):
        step(ids[:, :1])


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["multi-head", "mla", "local-global", "dynamic"])
def test_a_padded_batch_writes_the_same_text(name: str) -> None:
    model, ids = _model(**{**MODELS[name], "reach": ReachConfig()}), _ids(3)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :1] = 0
    plain = generate(model, ids, GREEDY, attention_mask_BS=mask)
    assert torch.equal(generate(model, ids, GREEDY, attention_mask_BS=mask, compile=True), plain)


@pytest.mark.usefixtures("traced")
def test_draws_a_cache_that_goes_on_and_its_storage_are_the_same() -> None:
    model, ids = _model(), _ids(1)
    drawn = replace(GREEDY, temperature=1.0, top_p=0.9, repetition_penalty=1.3)
    texts = []
    for compiled in (False, True):
        cache = KVCache(model.config, batch_size=1, storage="int8", bounded=False)
        first = generate(model, ids, drawn, cache=cache, compile=compiled)
        second = generate(model, first[:, -1:], drawn, cache=cache, compile=compiled)
        texts.append(torch.cat((first, second), dim=1))
        # The last token of the first text was not read yet, that of the second never is.
        assert cache.length == LENGTH + 2 * NEW - 1
    assert torch.equal(*texts)


@pytest.mark.usefixtures("traced")
def test_one_program_serves_texts_of_different_lengths_and_a_training_model_stays_one() -> None:
    model = _model().train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generate(model, _ids(1), GREEDY, compile=True)
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # One for the step, and one for the prompt's few rows, into the experts and out of them.
    assert programs == 3
    generate(model, _ids(1, 5), replace(GREEDY, max_new_tokens=20), compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == programs
    assert model.training


@pytest.mark.usefixtures("traced")
def test_hooks_that_come_and_go_between_two_tokens_are_seen() -> None:
    model, ids = _model(), _ids(1, LENGTH + NEW)
    cache = KVCache(model.config, batch_size=1, max_length=LENGTH + NEW, bounded=False)
    with torch.no_grad():
        plain = model(ids).logits_BSV
        model(ids[:, :LENGTH], cache=cache)
    step = CompiledStep(model, cache)
    handle = None
    for at in range(LENGTH, LENGTH + 6):
        if at in (LENGTH + 2, LENGTH + 3):
            if handle is not None:
                handle.remove()  # another one takes its place: as many hooks as before
            factor = 2.0 if handle is None else 3.0
            handle = model.lm_head.register_forward_pre_hook(
                lambda _, args, f=factor: (f * args[0], *args[1:])
            )
        elif at == LENGTH + 4 and handle is not None:
            handle.remove()
        expected = {LENGTH + 2: 2.0, LENGTH + 3: 3.0}.get(at, 1.0) * plain[:, at]
        torch.testing.assert_close(step(ids[:, at : at + 1]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_compiler_makes_of_it_predicts_what_full_passes_do(dtype: torch.dtype) -> None:
    model = _model(num_kv_heads=2, first_dense_layers=0).to(dtype)
    ids = _ids(1)
    written = generate(model, ids, GREEDY, compile=True)
    with torch.no_grad():
        logits = model(torch.cat((ids, written[:, :-1]), dim=1)).logits_BSV[0, LENGTH - 1 :].float()
    chosen = logits.gather(1, written[0, :, None]).squeeze(1)
    # The most likely token, or in bfloat16 one that rounding makes as likely.
    near = 0 if dtype == torch.float32 else 2**-5 * logits.abs().max().item()
    assert bool((chosen >= logits.amax(dim=-1) - near).all())
    if dtype == torch.float32:
        assert torch.equal(written, generate(model, ids, GREEDY))


def test_what_has_no_fixed_shapes_is_refused(tmp_path: Path) -> None:
    latent = _model(attention="latent", latents=LatentConfig(num_latents=3, latent_chunk=4))
    with pytest.raises(ValueError, match="compile=True does not fit attention=latent"):
        generate(latent, _ids(1), GREEDY, compile=True)
    model = _model(reach=ReachConfig(window=5))
    with pytest.raises(ValueError, match="drafts do not go together"):
        generate(model, _ids(1), GREEDY, drafts=Drafts(), compile=True)
    streaming = KVCache(BASE, batch_size=1, eviction=SinksAndRecent(sinks=2, recent=6))
    mapped = KVCache(BASE, batch_size=1, storage="mapped", folder=tmp_path)
    for cache in (KVCache(model.config, batch_size=1), streaming, mapped):
        with pytest.raises(
            ValueError, match="does not fit a cache that forgets, overwrites or lies in files"
        ):
            generate(model, _ids(1), GREEDY, cache=cache, compile=True)


def test_a_machine_without_a_compiler_says_so() -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    nowhere = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with (
        inductor.patch(nowhere),
        pytest.raises(ValueError, match=r"compile=True failed .*it needs a C\+\+ compiler"),
    ):
        generate(_model(dim=24, num_heads=2), _ids(1), GREEDY, compile=True)
