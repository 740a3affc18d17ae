"""Rotary frequencies are those of transformers for every scaling, and of the formulas where it has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.attention_config import RopeConfig
from model.config import ModelConfig
from model.lm import MoELanguageModel
from model.rope import RopeTables, rope_tables, rotate
from model.rope_scaling import inverse_frequencies

WIDTH, BASE, TRAINED = 16, 5000.0, 32


def _config(**rope: Any) -> ModelConfig:
    return ModelConfig(dim=4 * WIDTH, num_heads=4, rope_base=BASE, rope=RopeConfig(**rope))


def _theirs(parameters: dict[str, Any], length: int | None = None) -> tuple[torch.Tensor, float]:
    kind = parameters["rope_type"]
    config = transformers.LlamaConfig(
        hidden_size=4 * WIDTH,
        num_attention_heads=4,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_theta": BASE, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


TRAINED_LEN: dict[str, Any] = {"rope_trained_len": TRAINED}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    "linear, half turned": (
        {"rope_factor": 3.0, "rotary_share": 0.5},
        {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5},
    ),
    "yarn": ({"rope_factor": 4.0, **TRAINED_LEN}, YARN),
    "yarn, own betas": (
        {"rope_factor": 4.0, "yarn_beta_fast": 2.0, "yarn_beta_slow": 0.25, **TRAINED_LEN},
        {**YARN, "beta_fast": 2.0, "beta_slow": 0.25},
    ),
    "yarn, not truncated": (
        {"rope_factor": 4.0, "yarn_beta_fast": 3.0, "yarn_truncate": False, **TRAINED_LEN},
        {**YARN, "beta_fast": 3.0, "truncate": False},
    ),
    "yarn, deepseek": (
        {"rope_factor": 4.0, "yarn_mscale": 0.707, "yarn_mscale_all_dim": 1.2, **TRAINED_LEN},
        {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2},
    ),
    "yarn, given factor": (
        {"rope_factor": 4.0, "yarn_attention_factor": 1.3, **TRAINED_LEN},
        {**YARN, "attention_factor": 1.3},
    ),
    "llama3": (
        {"rope_factor": 8.0, **TRAINED_LEN},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": TRAINED,
        },
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_factor_equal_transformers(name: str) -> None:
    ours, parameters = SCALINGS[name]
    config = _config(rope_scaling=parameters["rope_type"], **ours)
    expected, factor = _theirs(parameters)
    torch.testing.assert_close(inverse_frequencies(config), expected, rtol=1e-6, atol=0)
    assert config.rope.turn_factor == pytest.approx(factor)
    assert not torch.allclose(expected, inverse_frequencies(_config())[: len(expected)], rtol=1e-3)


@pytest.mark.parametrize("length", [1, TRAINED, TRAINED + 1, 3 * TRAINED])
def test_dynamic_frequencies_equal_transformers_at_each_length(length: int) -> None:
    config = _config(rope_scaling="dynamic", rope_factor=2.0, **TRAINED_LEN)
    expected, _ = _theirs({"rope_type": "dynamic", "factor": 2.0}, length)
    torch.testing.assert_close(inverse_frequencies(config, total_length=length), expected, rtol=1e-6, atol=0)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all() -> None:
    plain = inverse_frequencies(_config())
    stretched = inverse_frequencies(_config(rope_scaling="ntk", rope_factor=4.0))
    torch.testing.assert_close(plain[-1] / stretched[-1], torch.tensor(4.0))
    assert plain[0] == stretched[0]


def _twins(rope: dict[str, Any], parameters: dict[str, Any]) -> tuple[nn.Module, MoELanguageModel]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **shape,
            num_key_value_heads=2,
            intermediate_size=40,
            rms_norm_eps=1e-5,
            max_position_embeddings=TRAINED,
            rope_parameters={"rope_theta": BASE, **parameters},
        )
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    config = ModelConfig(
        vocab_size=31, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, first_dense_layers=2,
        dense_ffn_dim=40, rope_base=BASE, max_seq_len=4 * TRAINED,
        rope=RopeConfig(rope_scaling=parameters["rope_type"], **rope),
    )  # fmt: skip
    ours = MoELanguageModel(config)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("name", [*(name for name in SCALINGS if "half" not in name), "dynamic"])
def test_logits_equal_a_stretched_llama_beyond_the_trained_length(name: str) -> None:
    if name == "dynamic":
        theirs, ours = _twins({"rope_factor": 2.0, **TRAINED_LEN}, {"rope_type": "dynamic", "factor": 2.0})
    else:
        theirs, ours = _twins(*SCALINGS[name])
    ids_BS = torch.randint(31, (2, 2 * TRAINED))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids_BS).logits_BSV, theirs(ids_BS).logits, rtol=1e-4, atol=1e-4)


def test_a_partly_turned_head_equals_transformers() -> None:
    """GLM4's attention turns half of each head."""
    from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb

    config = _config(rotary_share=0.5)
    q, k = torch.randn(2, 4, 7, WIDTH), torch.randn(2, 2, 7, WIDTH)
    rope = rope_tables(config, 3, 7, q)
    assert rope.cos_SD.shape == (7, WIDTH // 2)
    expected = apply_rotary_pos_emb(q, k, rope.cos_SD[None], rope.sin_SD[None])
    for x, theirs in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(x, rope), theirs)
        assert torch.equal(rotate(x, rope)[..., WIDTH // 2 :], x[..., WIDTH // 2 :])


def test_neighbours_give_the_products_of_complex_numbers() -> None:
    """The original formula: neighbours are a complex number, turned by e^(i angle)."""
    config = _config()
    q, k = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    rope = rope_tables(config, 2, 5, q)
    angles = torch.arange(2, 7)[:, None] * inverse_frequencies(config)
    turned = [torch.view_as_complex(x.view(5, -1, 2)) * torch.polar(torch.ones(()), angles) for x in (q, k)]
    expected = (turned[0][:, None] * turned[1][None].conj()).real.sum(-1)
    actual = rotate(q, rope, "neighbours") @ rotate(k, rope, "neighbours").T
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_local_layers_have_their_own_base_and_are_not_stretched() -> None:
    config = _config(rope_scaling="yarn", rope_factor=4.0, local_rope_base=100.0, **TRAINED_LEN)
    local = rope_tables(config, 0, 50, torch.zeros(1), local=True)
    plain = ModelConfig(dim=4 * WIDTH, num_heads=4, rope_base=100.0)
    expected: RopeTables = rope_tables(plain, 0, 50, torch.zeros(1))
    assert torch.equal(local.cos_SD, expected.cos_SD)


def test_dynamic_answers_do_not_depend_on_what_was_read_before() -> None:
    _, ours = _twins({"rope_factor": 2.0, **TRAINED_LEN}, {"rope_type": "dynamic", "factor": 2.0})
    short_BS = torch.randint(31, (1, 20))
    before = ours(short_BS).logits_BSV
    ours(torch.randint(31, (1, 3 * TRAINED)))
    assert torch.equal(ours(short_BS).logits_BSV, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_factor": 0.5}, "rope_factor=0.5 is below 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling=yarn has no rope_trained_len"),
        ({"rope_trained_len": 0}, "rope_trained_len=0 is below 1"),
        ({"rotary_share": 1.5}, r"rotary_share=1.5 is not in \(0, 1\]"),
        ({"yarn_beta_slow": 40.0}, "yarn_beta_slow=40.0 is not between 0 and yarn_beta_fast=32.0"),
        ({"llama3_high_freq": 0.5}, "llama3_low_freq=1.0 is not between 0 and llama3_high_freq=0.5"),
    ],
)
def test_errors_give_value_rule_and_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig(**values)


def test_an_odd_share_of_a_head_cannot_turn_in_pairs() -> None:
    with pytest.raises(ValueError, match=r"head_dim=10 of which rotary_share=0.5 is odd"):
        ModelConfig(dim=40, num_heads=4, rope=RopeConfig(rotary_share=0.5))
