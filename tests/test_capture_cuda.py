"""On a GPU: the same numbers as on a CPU, through pinned memory, without one wait in the training thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from capture_models import BIASED, VOCAB, Kept, small_model

from moeviz.capture.probe import attach
from moeviz.capture.tap import Tap
from moeviz.capture.transfer import HostCopy, index_tensor
from moeviz.policy import SamplingPolicy
from moeviz.records import AttentionRecord, LoadRecord, SequenceRecord, TokenRoutingRecord

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OFTEN = SamplingPolicy(route_every=1, route_sequences=2, attention_every=1)
STEPS = 3


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any call in here that waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Deferring(Kept):
    """Keeps what a writer thread would work on later."""

    def materialize(self) -> Kept:
        done = Kept()
        for batch in self.records:
            for record in batch.materialize():
                done.write(record)
        return done


def recorded(device: str, guard: Callable[[], Any]) -> Kept:
    """Forwards of the same batches, padded, in two micro-batches a step."""
    model, sink = small_model(router=BIASED).to(device), Deferring()
    generator = torch.Generator().manual_seed(0)
    mask_BS = torch.ones(3, 9, dtype=torch.long)
    mask_BS[1, 6:] = 0
    with attach(model, sink, policy=OFTEN, defer=True) as probe:
        for step in range(STEPS):
            loss = torch.zeros((), device=device)
            for _ in range(2):
                ids_BS = torch.randint(0, VOCAB, (3, 9), generator=generator).to(device)
                output = model(ids_BS, ids_BS.roll(-1, 1), attention_mask_BS=mask_BS.to(device))
                loss = loss + output.ce.detach()
            if step == 0:
                probe.step(loss=loss)  # looks at what it saw, and waits for it: once
                continue
            with guard():
                probe.step(loss=loss)
        assert probe.failures.count == 0
    return sink.materialize()


def test_hooks_and_steps_never_wait_and_see_what_a_cpu_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_open", "_end"):
        original, calls = getattr(Tap, name), [0]

        def without_waiting(tap: Tap, *args: Any, original: Any = original, calls: list[int] = calls) -> None:
            calls[0] += 1
            if calls[0] <= 2:  # the first step checks what adapters claim
                original(tap, *args)
                return
            with no_waiting():
                original(tap, *args)

        monkeypatch.setattr(Tap, name, without_waiting)
    on_gpu = recorded("cuda", no_waiting)
    monkeypatch.undo()
    on_cpu = recorded("cpu", nullcontext)
    for mine, its in zip(on_gpu.of(LoadRecord), on_cpu.of(LoadRecord), strict=True):
        assert (mine.step, mine.tokens) == (its.step, its.tokens)
        assert mine.counts_LE.tolist() == its.counts_LE.tolist()
        np.testing.assert_allclose(mine.prob_sum_LE, its.prob_sum_LE, rtol=1e-4)
        np.testing.assert_array_equal(mine.bias_LE, its.bias_LE)
        for name, sums_L in its.token_sums.items():
            np.testing.assert_allclose(mine.token_sums[name], sums_L, rtol=1e-3, err_msg=name)
    for mine, its in zip(on_gpu.of(TokenRoutingRecord), on_cpu.of(TokenRoutingRecord), strict=True):
        assert (mine.experts_LNSK == its.experts_LNSK).all()
    for mine, its in zip(on_gpu.of(SequenceRecord), on_cpu.of(SequenceRecord), strict=True):
        assert (mine.token_ids_NS == its.token_ids_NS).all()
    for mine, its in zip(on_gpu.of(AttentionRecord), on_cpu.of(AttentionRecord), strict=True):
        np.testing.assert_allclose(mine.map_QC, its.map_QC, atol=1e-4)


def test_copies_are_pinned_start_without_waiting_and_arrive_whole() -> None:
    big = torch.arange(2**22, device="cuda")
    on_host = torch.arange(5)
    with no_waiting():
        copy = HostCopy({"a": big * 2, "b": big.float() + 0.5, "c": on_host})
    assert copy._host["a"].is_pinned()
    assert copy._host["b"].is_pinned()
    assert len(copy._events) == 1
    arrays = copy.arrays()
    np.testing.assert_array_equal(arrays["a"], 2 * np.arange(2**22))
    np.testing.assert_array_equal(arrays["b"], np.arange(2**22, dtype=np.float32) + 0.5)
    np.testing.assert_array_equal(arrays["c"], np.arange(5))


def test_indices_reach_the_device_without_waiting() -> None:
    with no_waiting():
        rows_N = index_tensor([3, 1, 2], torch.device("cuda"))
    assert rows_N.tolist() == [3, 1, 2]
