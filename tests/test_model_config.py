"""A config says what a model is and refuses what makes no sense, naming value, rule and remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from model.config import ModelConfig, RouterConfig
from model.expert_config import ExpertConfig
from model.lm import MoELanguageModel
from model.presets import PRESETS, from_depth


def test_a_config_is_read_without_torch() -> None:
    code = "import sys, model, model.config, model.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dict_round_trip_survives_json() -> None:
    config = ModelConfig(
        dim=48,
        num_heads=4,
        dense_layers=(1, 4),
        router=RouterConfig(score="sigmoid", num_groups=4, top_groups=2),
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("where", ["", "router"])
def test_from_dict_names_a_field_it_does_not_know(where: str) -> None:
    data = ModelConfig().to_dict()
    (data[where] if where else data)["flux"] = 1
    with pytest.raises(ValueError, match=r"flux is no field of .*newer version"):
        ModelConfig.from_dict(data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 8, "num_experts": 4}, "top_k=8 exceeds num_experts=4; lower top_k or add experts"),
        ({"dim": 30, "num_heads": 4}, "dim=30 is not a multiple of num_heads=4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"dim": 12, "num_heads": 4}, "head_dim=3 is odd"),
        (
            {"first_dense_layers": 7, "num_layers": 6},
            "first_dense_layers=7 is not between 0 and num_layers=6",
        ),
        ({"expert_dim": 0}, "expert_dim=0 is not positive"),
        ({"moe_every": 0}, "moe_every=0 is not positive"),
        ({"dense_layers": (1, 6)}, "names block 6, but num_layers=6"),
        ({"experts": ExpertConfig(shared_expert_gate=True)}, "shared_expert_gate=True has nothing to weigh"),
        ({"rope_base": -1.0}, "rope_base=-1.0 is not positive"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 is negative"),
        ({"router": RouterConfig(num_groups=3)}, "num_experts=8 is not a multiple of router.num_groups=3"),
        ({"top_k": 3, "router": RouterConfig(num_groups=4)}, "top_k=3 exceeds the 2 experts of"),
        ({"top_k": 1, "router": RouterConfig(num_groups=8)}, "group_score=top2_sum needs two experts"),
    ],
)
def test_errors_give_value_rule_and_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig(**values)
    assert ";" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": 0.0}, "router.scale=0.0 is not positive"),
        ({"num_groups": 0}, "router.num_groups=0 is below 1"),
        ({"num_groups": 2, "top_groups": 3}, "router.top_groups=3 is not between 1 and num_groups=2"),
    ],
)
def test_router_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterConfig(**values)


def test_routing_is_not_checked_where_no_layer_routes() -> None:
    assert ModelConfig(num_layers=2, first_dense_layers=2, num_experts=1, top_k=2).num_moe_layers == 0


SHAPES = [
    {},
    {"num_kv_heads": 1, "qk_norm": "head", "head_dim": 10},
    {"num_kv_heads": 2, "qk_norm": "projection", "tie_embeddings": True},
    {"first_dense_layers": 1, "num_shared_experts": 2, "shared_expert_dim": 5},
    {"first_dense_layers": 3},
    {"router": RouterConfig(selection_bias=True), "first_dense_layers": 1, "dense_ffn_dim": 11},
    {"router": RouterConfig(router_bias=True), "experts": ExpertConfig(expert_bias=True), "moe_every": 2},
    {"num_shared_experts": 1, "experts": ExpertConfig(shared_expert_gate=True), "dense_layers": (0, 2)},
    {"experts": ExpertConfig(expert_activation="gelu", expert_bias=True), "num_shared_experts": 1},
]


@pytest.mark.parametrize(
    ("values", "moe"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"first_dense_layers": 2}, [2, 3, 4, 5]),
        ({"moe_every": 2}, [1, 3, 5]),
        ({"moe_every": 2, "dense_layers": (3,), "first_dense_layers": 1}, [1, 5]),
    ],
)
def test_layers_with_experts(values: dict[str, Any], moe: list[int]) -> None:
    config = ModelConfig(num_layers=6, **values)
    assert [layer for layer in range(6) if config.is_moe(layer)] == moe
    assert config.num_moe_layers == len(moe)


@pytest.mark.parametrize("values", SHAPES)
def test_parameter_counts_are_those_of_the_model(values: dict[str, Any]) -> None:
    config = ModelConfig(
        vocab_size=31, dim=24, num_layers=3, num_heads=4, num_experts=5, top_k=2, expert_dim=7, **values
    )
    model = MoELanguageModel(config)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    idle = sum(
        p.numel() * 3 // 5 for name, p in model.named_parameters() if ".experts." in name
    )  # E - K = 3 of 5
    assert config.num_active_parameters() == config.num_parameters() - idle


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_named_after_their_function(name: str) -> None:
    preset = PRESETS[name]
    assert preset.__name__ == name.replace("-", "_")
    assert preset.__doc__
    idle = preset().num_parameters() - preset().num_active_parameters()
    assert (idle > 0) == (preset().num_moe_layers > 0)


def test_documented_sizes_are_true() -> None:
    optimal, demo = PRESETS["optimal"](), PRESETS["demo"]()
    assert f"{optimal.num_parameters() / 1e6:.1f}M parameters" in (PRESETS["optimal"].__doc__ or "")
    assert f"{optimal.num_active_parameters() / 1e6:.1f}M active" in (PRESETS["optimal"].__doc__ or "")
    assert f"{demo.num_parameters() / 1e6:.1f}M parameters" in (PRESETS["demo"].__doc__ or "")


def test_depth_dial_grows_everything() -> None:
    configs = [from_depth(depth) for depth in range(1, 25)]
    assert all(config.num_layers == depth for depth, config in enumerate(configs, start=1))
    sizes = [config.num_active_parameters() for config in configs]
    assert sizes == sorted(sizes)
    for config in configs:
        active_width = (config.top_k + config.num_shared_experts) * config.expert_dim
        assert 8 / 3 * config.dim <= active_width + 2
        assert active_width < 8 / 3 * config.dim + 32 * (config.top_k + 1)
    with pytest.raises(ValueError, match="depth=0 is below 1"):
        from_depth(0)
