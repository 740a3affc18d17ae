"""What waits for the writer's thread comes to the same sums as what is summed in its step, and holds little memory."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from capture_models import BIASED, Kept, batches, loss_of, mixtral, small_model, train
from torch import nn

from moeviz.capture.load_batch import LoadBatch
from moeviz.capture.probe import Probe, attach
from moeviz.policy import EVERYTHING, SamplingPolicy
from moeviz.records import LoadRecord, TokenRoutingRecord

MODELS: dict[str, Callable[[], nn.Module]] = {
    "softmax": small_model,
    "sigmoid with bias": lambda: small_model(router=BIASED),
    "layers of two shapes": lambda: small_model(num_layers=4, first_dense_layers=0),
    "mixtral": mixtral,
}
NO_SAMPLES = SamplingPolicy(route_every=0, attention_every=0)


class Late:
    """A sink that takes deferred work and does it at the end, in a thread of its own, as the background writer."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.records: list[Any] = []

    def write(self, item: Any) -> None:
        self.items.append(item)

    def work(self) -> None:
        def materialize() -> None:
            loads = [item for item in self.items if isinstance(item, LoadBatch)]
            LoadBatch.prepare(loads)
            for item in self.items:
                self.records += item.materialize() if hasattr(item, "materialize") else [item]

        thread = threading.Thread(target=materialize)
        thread.start()
        thread.join()

    def flush(self) -> None: ...

    def close(self) -> None: ...


def waiting(probe: Probe) -> int:
    return len(probe._tap.collector.step.piles)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", [NO_SAMPLES, EVERYTHING], ids=["loads", "everything"])
def test_late_sums_are_the_sums(
    name: str, padded: bool, policy: SamplingPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list(batches(5, 2, padded=padded))
    late, model = Late(), MODELS[name]()
    probe = attach(model, late, policy=policy, defer=True)
    waited: list[int] = []

    def after(loss: float) -> None:
        waited.append(waiting(probe))
        probe.step(loss=loss)

    first = train(model, steps, after)
    late.work()
    assert waited[0] <= waited[1] / 2, "the first decisions are looked at before anything is promised"
    assert min(waited[1:]) >= 2, "both micro-batches of every later step wait"

    monkeypatch.setattr("moeviz.capture.backlog.ROOM_BYTES", 0)
    now, model = Kept(), MODELS[name]()
    probe = attach(model, now, policy=policy)
    second = train(model, steps, lambda loss: probe.step(loss=loss))
    assert first.same_bits(second)

    found = [record for record in late.records if isinstance(record, LoadRecord)]
    assert [load.step for load in found] == [0, 1, 2, 3, 4]
    for mine, its in zip(found, now.of(LoadRecord), strict=True):
        assert mine.tokens == its.tokens
        np.testing.assert_array_equal(mine.counts_LE, its.counts_LE)
        for field in ("prob_sum_LE", "weight_sum_LE", "bias_LE"):
            one, other = getattr(mine, field), getattr(its, field)
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert mine.token_sums.keys() == its.token_sums.keys()
        for key, sums_L in mine.token_sums.items():
            np.testing.assert_allclose(sums_L, its.token_sums[key], rtol=1e-4, atol=1e-5)
    routed = [record for record in late.records if isinstance(record, TokenRoutingRecord)]
    for mine_rows, its_rows in zip(routed, now.of(TokenRoutingRecord), strict=True):
        np.testing.assert_array_equal(mine_rows.experts_LNSK, its_rows.experts_LNSK)


def test_what_does_not_fit_is_summed_at_once_and_room_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    per_micro_batch = 2 * 27 * (6 * 4 + 2 * 4 + 2 * 8)  # layers x tokens x (logits, weights, ids)
    monkeypatch.setattr("moeviz.capture.backlog.ROOM_BYTES", 3 * per_micro_batch)
    late, model = Late(), small_model()
    probe = attach(model, late, policy=NO_SAMPLES, defer=True)
    waited: list[int] = []

    def after(loss: float) -> None:
        waited.append(waiting(probe))
        if len(waited) == 4:
            late.work()  # what waited is done
            late.items.clear()
        probe.step(loss=loss)

    train(model, list(batches(8, 1)), after)
    assert waited == [0, 1, 1, 1, 1, 1, 0, 0]
    late.items.clear()  # a queue that drops what it holds gives back the room as well
    gc.collect()
    for batch in next(batches(1, 1)):
        loss_of(model, batch).backward()
    assert waiting(probe) == 1


def test_a_mask_that_is_filled_anew_for_every_micro_batch_may_wait() -> None:
    late, model = Late(), small_model()
    probe = attach(model, late, policy=NO_SAMPLES, defer=True)
    mask_BS, valid = torch.ones(3, 9, dtype=torch.bool), []
    for step in range(3):
        for batch in next(batches(1, 2, seed=step)):
            mask_BS.fill_(True)[0, 2 + step :] = False
            valid.append(int(mask_BS.sum()))
            output = model(batch.ids_BS, batch.ids_BS.roll(-1, 1), attention_mask_BS=mask_BS)
            output.ce.backward()
        probe.step()
    late.work()
    loads = [record for record in late.records if isinstance(record, LoadRecord)]
    assert [int(load.counts_LE[0].sum()) for load in loads] == [
        2 * (one + other) for one, other in zip(valid[::2], valid[1::2], strict=True)
    ]


def test_sums_come_without_the_package_that_spares_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    late, model = Late(), small_model()
    probe = attach(model, late, policy=NO_SAMPLES, defer=True)
    train(model, list(batches(3, 1)), lambda loss: probe.step(loss=loss))
    late.work()
    loads = [record for record in late.records if isinstance(record, LoadRecord)]
    assert [int(load.counts_LE[0].sum()) for load in loads] == [54, 54, 54]
