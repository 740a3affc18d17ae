"""Every engine takes the same steps: plain torch is the reference, bf16 and ZeRO are held against it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.lm import MoELanguageModel
from model.router import routers
from moeviz.errors import MoevizError
from trainer.balance import move_bias, training_loss
from trainer.config import EngineConfig, InputConfig, OptimConfig, TrainConfig
from trainer.engine import Engine, build_engine, choose_device, cpu_quota, physical_cores, set_threads
from trainer.precision import MasterWeights, cast_weights

V, B, S, MICRO = 61, 3, 8, 2
MODEL = ModelConfig(
    vocab_size=V, dim=16, num_layers=2, num_heads=2, max_seq_len=16, num_experts=4, top_k=2, expert_dim=16
)
DEEPSPEED = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(
    engine: str = "torch", stage: int = 0, dtype: str = "fp32", clip: float = 1.0, optimizer: str = "adamw"
) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        data=InputConfig(seq_len=S, batch_size=B, gradient_accumulation_steps=MICRO),
        optim=OptimConfig(grad_clip=clip, optimizer=optimizer),  # type: ignore[arg-type]
        engine=EngineConfig(engine=engine, zero_stage=stage, dtype=dtype, device="cpu"),  # type: ignore[arg-type]
    )


def engine_of(config: TrainConfig, seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    return build_engine(MoELanguageModel(config.architecture), config)


def batch_of(step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    ids = torch.randint(0, V, (B, S + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def steps(engine: Engine, config: TrainConfig, first: int, last: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps first .. last - 1."""
    told = []
    for step in range(first, last):
        loss, counts_LE = 0.0, torch.zeros(2, 4, dtype=torch.int64)
        for micro_batch in range(MICRO):
            output = engine.forward(*batch_of(step, micro_batch))
            engine.backward(
                training_loss(output, config.balance), share=1 / MICRO, last=micro_batch == MICRO - 1
            )
            loss += output.ce.item() / MICRO  # type: ignore[union-attr]
            counts_LE += output.expert_counts_LE
        norm = engine.step(1e-2).grad_norm
        move_bias(engine.module, engine.sum_ranks(counts_LE), config.balance)
        told.append((loss, norm))
    return told


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float]]:
    config = config_of()
    return steps(engine_of(config), config, 0, 5)


def test_micro_batches_add_up_to_one_large_batch() -> None:
    config, whole = config_of(clip=0.0), config_of(clip=0.0)
    engine, model = engine_of(config), engine_of(whole).module
    for micro_batch in range(MICRO):
        engine.backward(
            engine.forward(*batch_of(0, micro_batch)).ce,  # type: ignore[arg-type]
            share=1 / MICRO,
            last=micro_batch == MICRO - 1,
        )
    inputs, labels = (torch.cat(parts) for parts in zip(*(batch_of(0, m) for m in range(MICRO)), strict=True))
    model(inputs, labels).ce.backward()
    for (name, ours), theirs in zip(engine.module.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, rtol=1e-4, atol=1e-7)
    norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in model.parameters()))  # type: ignore[union-attr]
    assert engine.step(1e-3).grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("engine_name", ["torch", "deepspeed"])
def test_a_gradient_longer_than_the_limit_is_scaled_down_to_it(engine_name: str) -> None:
    """After one step AdamW's first moment is (1 - beta1) times the gradient it was given."""
    pytest.importorskip(engine_name, reason="DeepSpeed is not installed")
    limit = 1e-2
    config = config_of(engine_name, clip=limit)
    engine = engine_of(config)
    for micro_batch in range(MICRO):
        engine.backward(
            engine.forward(*batch_of(0, micro_batch)).ce,  # type: ignore[arg-type]
            share=1 / MICRO,
            last=micro_batch == MICRO - 1,
        )
    assert engine.step(1e-2).grad_norm > 10 * limit, "the norm is told as it was before clipping"
    moments = [state["exp_avg"] for state in engine._optimizer.state.values()]  # type: ignore[attr-defined]
    length = math.sqrt(sum(float(moment.square().sum()) for moment in moments))
    assert length == pytest.approx((1 - config.optim.beta1) * limit, rel=1e-3)
    engine.destroy()


def test_bf16_weights_follow_fp32_masters(reference: list[tuple[float, float]]) -> None:
    config = config_of(dtype="bf16")
    engine = engine_of(config)
    told = steps(engine, config, 0, 5)
    assert [loss for loss, _ in told] == pytest.approx([loss for loss, _ in reference], abs=5e-3)
    weights = engine.weights()
    assert weights["model.layers.0.mlp.experts.down_proj"].dtype == torch.bfloat16
    assert weights["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    assert weights["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_masters_keep_updates_that_bf16_would_lose() -> None:
    model = MoELanguageModel(MODEL)
    cast_weights(model, "bf16")
    masters = MasterWeights(model)
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight.fill_(1.0)
        master = dict(masters.named())["model.embed_tokens.weight"].fill_(1.0)
        for _ in range(8):
            master += 2.0**-10
            masters.publish()
    assert weight[0, 0].item() == 1.0 + 2.0**-7, (
        "eight updates below bf16's resolution of 1/128 arrive together"
    )


def test_routers_keep_fp32_weights_in_a_bf16_model() -> None:
    model = MoELanguageModel(MODEL)
    cast_weights(model, "bf16")
    assert {weight.dtype for router in routers(model) for weight in router.parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_torch_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        resume_equals_going_on(config_of(dtype=dtype), tmp_path / dtype)


@pytest.mark.parametrize(("stage", "dtype"), DEEPSPEED)
def test_deepspeed_takes_the_steps_of_plain_torch(
    stage: int, dtype: str, reference: list[tuple[float, float]], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    config = config_of("deepspeed", stage, dtype)
    engine = engine_of(config)
    told = steps(engine, config, 0, 5)
    tolerance = 1e-5 if dtype == "fp32" else 5e-3
    assert [loss for loss, _ in told] == pytest.approx([loss for loss, _ in reference], abs=tolerance)
    assert [norm for _, norm in told] == pytest.approx([norm for _, norm in reference], rel=10 * tolerance)
    bias_E = engine.weights()["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias_E.dtype == torch.float32
    assert bias_E.abs().sum() > 0
    engine.destroy()
    resume_equals_going_on(config, tmp_path)


def resume_equals_going_on(config: TrainConfig, folder: Path) -> None:
    """4 steps == 2 steps, save, an engine from other weights, load, 2 steps; bit for bit."""
    folder.mkdir(exist_ok=True)
    engine = engine_of(config)
    all_at_once = steps(engine, config, 0, 4)
    expected = engine.weights()
    engine.destroy()
    engine = engine_of(config)
    before = steps(engine, config, 0, 2)
    weights = engine.weights()
    engine.save_state(folder)
    engine.destroy()
    engine = engine_of(config, seed=99)
    engine.load_state(weights, folder)
    after = steps(engine, config, 2, 4)
    resumed = engine.weights()
    engine.destroy()
    assert before + after == all_at_once
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(MoevizError, match=r"device=cuda:99"):
        choose_device("cuda:99")
    with pytest.raises(MoevizError, match=r"device=toaster is no device"):
        choose_device("toaster")
    assert choose_device("cpu") == torch.device("cpu")


def test_threads_default_to_physical_cores_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert set_threads(None) == min(physical_cores(), cpu_quota()) >= 1
    assert set_threads(1) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set_threads(None) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 1 << 16),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 1 << 16),
        ({}, 1 << 16),
    ],
)
def test_a_container_is_taken_at_its_word(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota(tmp_path) == expected
