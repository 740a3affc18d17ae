"""The micro-batch may shrink without changing the step: same rows, same losses up to rounding, same resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import TOY, StopAfter, corpus_cache, no_packing, toy

from model.lm import MoELanguageModel
from moeviz.errors import MoevizError
from moeviz.store import queries_series as queries
from moeviz.store.reader import open_run
from trainer.data_batches import Batch
from trainer.engine import Engine, build_engine
from trainer.micro_batches import cut, free_memory_bytes
from trainer.text import open_text
from trainer.train import TrainResult, train

__all__ = ["corpus_cache", "no_packing"]

pytestmark = pytest.mark.usefixtures("no_packing")

QUIET: dict[str, Any] = {"evaluation": {"eval_every": 0}}


def batch(first: int, rows: int) -> Batch:
    ids = np.arange(first, first + rows)[:, None] * np.ones((1, 3), dtype=np.int64)
    return Batch(
        ids, ids + 1, tuple(f"d{row}" for row in range(first, first + rows)), np.arange(first, first + rows)
    )


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 6), (4, [4, 2]), (6, [6]), (9, [6])])
def test_cutting_keeps_rows_and_their_order(size: int, expected: list[int]) -> None:
    parts = cut([batch(0, 3), batch(3, 3)], size)
    assert [len(part.domains) for part in parts] == expected
    assert [name for part in parts for name in part.domains] == [f"d{row}" for row in range(6)]
    assert np.concatenate([part.input_ids_BS for part in parts])[:, 0].tolist() == list(range(6))
    assert np.concatenate([part.positions_B for part in parts]).tolist() == list(range(6))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], int]], list[int]]:
    """A model that runs out of memory above `limit(calls so far)` sequences; returns the sizes that were tried."""

    def install(limit: Callable[[int], int]) -> list[int]:
        tried: list[int] = []
        honest = MoELanguageModel.forward

        def forward(self: Any, input_ids_BS: torch.Tensor, *args: Any, **more: Any) -> Any:
            if not (self.training and torch.is_grad_enabled()):
                return honest(self, input_ids_BS, *args, **more)
            tried.append(len(input_ids_BS))
            output = honest(self, input_ids_BS, *args, **more)
            if len(input_ids_BS) > limit(len(tried)):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return output

        monkeypatch.setattr(MoELanguageModel, "forward", forward)
        return tried

    return install


def events_of(run: Path, kind: str) -> list[str]:
    with open_run(run) as store:
        events = queries.events(store)
    return [str(detail) for detail in events[events["kind"] == kind]["detail"]]


def stopped(config: Any, after: int) -> TrainResult:
    watcher = StopAfter(after)
    return train(config, progress=watcher, interrupt=watcher.interrupt)


@pytest.mark.parametrize("log_routing", [False, True])
def test_running_out_of_memory_in_the_middle_of_a_step_does_not_change_the_run(
    log_routing: bool, memory: Callable[[Callable[[int], int]], list[int]], tmp_path: Path
) -> None:
    whole = train(toy(tmp_path / "whole", **QUIET))
    tried = memory(lambda calls: 4 if calls < 4 else 1)
    config = toy(tmp_path / "run", engine={"auto_batch": True}, log_routing=log_routing, **QUIET)
    result = train(config)
    # Of a whole step's 4 sequences on: the trial (one sequence to measure, then 4), a step, then 4, 2, 1 at a time.
    assert tried[:6] == [1, 4, 4, 4, 2, 1]
    assert set(tried[6:]) == {1}
    assert result.losses == pytest.approx(whole.losses, abs=1e-5)
    told = events_of(tmp_path / "run", "micro_batch")
    assert ["largest that fits" in each for each in told] == [True, False, False]
    if log_routing:
        with open_run(tmp_path / "run") as store:
            counted = store.sql("SELECT DISTINCT list_sum(counts) AS n FROM expert_load")["n"].tolist()
        assert counted == [4 * 16 * 2], "what was tried in vain is not counted"


def test_a_resumed_run_cuts_as_the_first_did(
    memory: Callable[[Callable[[int], int]], list[int]], tmp_path: Path
) -> None:
    """Noise is drawn for each micro-batch, so another cut would choose other experts."""
    noisy = replace(TOY.model, router=replace(TOY.model.router, router_noise="gumbel"))
    memory(lambda calls: 2)
    options: dict[str, Any] = {"model": noisy, "engine": {"auto_batch": True}, **QUIET}
    whole = train(toy(tmp_path / "whole", **options))
    config = toy(tmp_path / "run", **options)
    first = stopped(config, after=3)
    memory(lambda calls: 4)
    second = train(replace(config, run=None, resume=str(config.run)))
    assert first.losses + second.losses == whole.losses


def test_without_permission_the_remedy_is_told(
    memory: Callable[[Callable[[int], int]], list[int]], tmp_path: Path
) -> None:
    memory(lambda calls: 1)
    with pytest.raises(MoevizError, match=r"step 0 ran out of memory .* of 2 sequences; add --auto-batch"):
        train(toy(tmp_path / "run", **QUIET))


def test_a_sequence_that_does_not_fit_is_told(
    memory: Callable[[Callable[[int], int]], list[int]], tmp_path: Path
) -> None:
    tried = memory(lambda calls: 0 if calls > 1 else 9)
    with pytest.raises(
        MoevizError, match=r"not one sequence of 16 tokens fits into memory; shorten --seq-len"
    ):
        train(toy(tmp_path / "run", engine={"auto_batch": True}, **QUIET))
    assert tried == [1, 4, 2, 1]


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(self: Any, *args: Any, **more: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(MoELanguageModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(toy(tmp_path / "run", **QUIET))


def test_deepspeed_takes_the_same_steps_in_smaller_pieces(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    whole = train(toy(tmp_path / "whole", **QUIET))
    options: dict[str, Any] = {
        "engine": {"engine": "deepspeed", "zero_stage": 1, "auto_batch": True},
        **QUIET,
    }
    config = toy(tmp_path / "run", **options)
    result = train(config)
    assert result.losses == pytest.approx(whole.losses, abs=1e-5)


@pytest.mark.parametrize("auto_batch", [False, True])
def test_recomputing_activations_changes_no_bit(auto_batch: bool, tmp_path: Path) -> None:
    noisy = replace(TOY.model, router=replace(TOY.model.router, router_noise="shazeer", router_jitter=0.1))
    parts: dict[str, Any] = {"auto_batch": auto_batch}
    plain = train(toy(tmp_path / "plain", model=noisy, engine=parts, **QUIET))
    config = toy(tmp_path / "again", model=noisy, engine={**parts, "gradient_checkpointing": True}, **QUIET)
    assert train(config).losses == plain.losses


def test_losses_that_look_further_get_what_they_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The global balance loss sees the counts of the micro-batches before it, the contrastive one sees domains."""
    router = replace(TOY.model.router, balance_scope="global", orthogonality=True)
    heads = replace(TOY.model.heads, contrastive_width=8)
    seen: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]] = []
    honest = MoELanguageModel.forward

    def forward(
        self: Any, input_ids_BS: torch.Tensor, labels_BS: torch.Tensor | None = None, **more: Any
    ) -> Any:
        output = honest(self, input_ids_BS, labels_BS, **more)
        seen.append(
            (more.get("counts_so_far_LE"), more["sequence_labels_B"], output.expert_counts_LE.clone())
        )
        assert {"balance", "orthogonality", "contrastive"} <= output.aux.keys()
        return output

    monkeypatch.setattr(MoELanguageModel, "forward", forward)
    model = replace(TOY.model, router=router, heads=heads)
    config = toy(tmp_path / "run", model=model, max_steps=1, balance={"balance": "aux"}, **QUIET)
    train(config)
    (before, labels, counts), (so_far, _, _) = seen
    assert before is None
    assert so_far is not None
    assert torch.equal(so_far, counts)
    batches = open_text(config, quiet=True).batches
    names = [batches.domains[label] for label in labels.tolist()]
    assert tuple(names) == batches.batch(0).domains


def test_simbal_brings_the_rows_of_a_router_closer_to_orthonormal(tmp_path: Path) -> None:
    model = replace(TOY.model, router=replace(TOY.model.router, orthogonality=True))
    gaps = []
    for coefficient in (0.0, 1.0):
        config = toy(
            tmp_path / str(coefficient),
            model=model,
            balance={"balance": "none", "z_coef": 0.0, "orthogonality_coef": coefficient},
            **QUIET,
        )
        checkpoint = train(config).checkpoint
        assert checkpoint is not None
        weight_ED = load_file(checkpoint / "model.safetensors")["model.layers.0.mlp.gate.weight"]
        gaps.append(float((weight_ED @ weight_ED.T - torch.eye(4)).abs().sum()))
    assert gaps[1] < gaps[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_runs_out_of_memory_is_fitted(tmp_path: Path) -> None:
    """With a sliver of the device's memory a large batch is cut until it fits, and the losses are those of halves."""
    sliver = 64 * 2**20 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(sliver)
    try:
        options: dict[str, Any] = {"data": {"batch_size": 512, "gradient_accumulation_steps": 1}, **QUIET}
        config = toy(tmp_path / "run", engine={"auto_batch": True, "device": "cuda"}, max_steps=2, **options)
        result = train(config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert result.steps_done == 2
    assert "largest that fits" in events_of(tmp_path / "run", "micro_batch")[0]


def test_a_container_grants_less_than_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  4096 kB\nMemAvailable:  3000 kB\n")
    assert free_memory_bytes(tmp_path / "meminfo", tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    assert free_memory_bytes(tmp_path / "meminfo", tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(tmp_path / "meminfo", tmp_path) == 3000 * 1024


def test_padded_text_keeps_its_domains() -> None:
    text = open_text(TOY, quiet=True)
    parts = cut([text.batches.batch(0, micro) for micro in range(2)], 3)
    assert [len(part.domains) for part in parts] == [3, 1]


@pytest.mark.parametrize(
    ("engine", "stage", "last"),
    [
        ("torch", 0, False),
        ("torch", 0, True),
        ("deepspeed", 0, False),
        ("deepspeed", 1, True),
        ("deepspeed", 2, False),
        ("deepspeed", 3, False),
    ],
)
def test_what_is_discarded_leaves_no_trace(engine: str, stage: int, last: bool) -> None:
    """A step begun in vain and begun anew is the step; its gradients are cleared whether it was complete or not."""
    pytest.importorskip(engine, reason="DeepSpeed is not installed")
    config = toy(Path("none"), engine={"engine": engine, "zero_stage": stage})
    ids = torch.randint(0, 280, (4, 17), generator=torch.Generator().manual_seed(3))

    def step_of(built: Engine) -> None:
        for half, final in ((slice(0, 2), False), (slice(2, 4), True)):
            built.backward(built.forward(ids[half, :-1], ids[half, 1:]).ce, share=0.5, last=final)  # type: ignore[arg-type]
        assert built.step(1e-2).taken

    results = []
    for vain in (False, True):
        torch.manual_seed(0)
        built = build_engine(MoELanguageModel(config.model), config)
        step_of(built)
        if vain:
            built.backward(100 * built.forward(ids[:1, :-1], ids[:1, 1:]).ce, last=last)  # type: ignore[operator]
            built.discard()
        step_of(built)
        step_of(built)
        results.append(built.weights())
        built.destroy()
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []
