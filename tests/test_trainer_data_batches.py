"""Batches: a pure function of the step, every window once an epoch, domains in proportion, fixed validation."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from moeviz.errors import MoevizError
from trainer.data_batches import IGNORE, Batch, TokenBatches
from trainer.data_shards import Shards

SIZES = {"code": 701, "prose": 1403, "logs": 250}
"""Tokens of each domain; no two alike, none a multiple of the window."""
S = 10


def shards_of(sizes: dict[str, int], validation: dict[str, int] | None = None) -> Shards:
    """Every id is there once: domain number x 10,000 + position, and 5,000 more on the validation side."""
    arrays = {}
    for number, (name, size) in enumerate(sizes.items()):
        ids = np.arange(size, dtype=np.uint32) + 10_000 * number
        arrays["train", name] = ids, np.zeros(1, dtype=np.int64)
    for name, size in (validation or {}).items():
        ids = np.arange(size, dtype=np.uint32) + 10_000 * list(sizes).index(name) + 5_000
        arrays["validation", name] = ids, np.zeros(1, dtype=np.int64)
    return Shards(arrays, vocab_size=100_000, eos_id=None, key="test")  # type: ignore[arg-type]


def batches_of(**fields) -> TokenBatches:
    fields = {"batch_size": 4, "seq_len": S, "seed": 0, **fields}
    return TokenBatches(fields.pop("shards", shards_of(SIZES)), **fields)


def equal(one: Batch, other: Batch) -> bool:
    arrays = ("input_ids_BS", "labels_BS", "positions_B")
    same = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    return same and one.domains == other.domains


def test_a_batch_depends_on_its_place_alone() -> None:
    forward, backward = batches_of(), batches_of()
    steps = range(300)
    first = {step: forward.batch(step) for step in steps}
    assert all(equal(first[step], backward.batch(step)) for step in reversed(steps))


def test_another_seed_reads_in_another_order() -> None:
    one, other = batches_of(seed=0), batches_of(seed=1)
    assert not any(equal(one.batch(step), other.batch(step)) for step in range(20))


@pytest.mark.parametrize(
    ("micro_batches", "world", "batch_size"), [(1, 1, 24), (3, 1, 8), (2, 3, 4), (1, 4, 6)]
)
def test_how_a_step_is_divided_does_not_change_what_it_reads(
    micro_batches: int, world: int, batch_size: int
) -> None:
    whole = batches_of(batch_size=24)
    divided = batches_of(batch_size=batch_size, micro_batches=micro_batches)
    for step in (0, 7, 100):
        parts = [
            divided.batch(step, micro_batch, rank, world)
            for micro_batch in range(micro_batches)
            for rank in range(world)
        ]
        rows = np.concatenate([part.input_ids_BS for part in parts])
        assert np.array_equal(rows, whole.batch(step).input_ids_BS)


def test_rows_can_be_read_in_any_portions() -> None:
    batches = batches_of()
    whole = batches.rows(90, 60)
    parts = [batches.rows(90, 7), batches.rows(97, 50), batches.rows(147, 3)]
    assert np.array_equal(np.concatenate([part.labels_BS for part in parts]), whole.labels_BS)
    assert sum((part.domains for part in parts), ()) == whole.domains


def test_labels_are_the_next_tokens_and_a_row_is_of_one_domain() -> None:
    shards = shards_of(SIZES)
    batches = batches_of(shards=shards)
    for step in range(200):
        batch = batches.batch(step)
        assert batch.input_ids_BS.dtype == batch.labels_BS.dtype == np.int64
        assert batch.input_ids_BS.shape == batch.labels_BS.shape == (4, S)
        assert batch.input_ids_BS.flags.c_contiguous
        assert batch.input_ids_BS.flags.writeable
        for row, (domain, place) in enumerate(zip(batch.domains, batch.positions_B, strict=True)):
            ring = np.tile(np.asarray(shards.tokens("train", domain), dtype=np.int64), 2)
            assert np.array_equal(batch.input_ids_BS[row], ring[place : place + S])
            assert np.array_equal(batch.labels_BS[row], ring[place + 1 : place + S + 1])


@pytest.mark.parametrize("weights", ["natural", "uniform"])
def test_every_epoch_of_a_domain_visits_each_window_once(weights) -> None:
    batches = batches_of(weights=weights, batch_size=64)
    visits: dict[str, list[np.ndarray]] = {name: [] for name in SIZES}
    for step in range(60):
        batch = batches.batch(step)
        for row, name in enumerate(batch.domains):
            visits[name].append(batch.input_ids_BS[row])
    for name, size in SIZES.items():
        windows = size // S
        epochs = len(visits[name]) // windows
        assert epochs >= 2, name
        for epoch in range(epochs):
            read = Counter(np.concatenate(visits[name][epoch * windows : (epoch + 1) * windows]).tolist())
            assert set(read.values()) == {1}, (name, epoch)
            assert size - S < len(read) <= size


def test_epochs_differ_in_order_and_in_their_cuts() -> None:
    batches = batches_of(shards=shards_of({"one": 405}), batch_size=40)
    starts = [batches.batch(step).positions_B for step in range(4)]
    assert len({tuple(s) for s in starts}) == 4
    assert len({int(s[0]) % S for s in starts}) > 1


def test_rows_follow_the_weights_within_chance() -> None:
    weights = {"code": 1.0, "prose": 2.0, "logs": 5.0}
    batches = batches_of(weights=weights, batch_size=100)
    counts = Counter(name for step in range(80) for name in batches.batch(step).domains)
    expected = {name: 8000 * weight / 8 for name, weight in weights.items()}
    statistic = sum((counts[name] - expected[name]) ** 2 / expected[name] for name in weights)
    assert statistic < 15.2  # chi-square, 2 degrees of freedom, p = 0.0005


def test_domains_are_mixed_within_a_cycle() -> None:
    """Neighbouring rows are of the same domain as often as independent draws would be."""
    batches = batches_of(weights="uniform", batch_size=1)
    names = [batches.batch(step).domains[0] for step in range(3000)]
    same = sum(a == b for a, b in itertools.pairwise(names))
    assert abs(same - 1000) < 5 * np.sqrt(3000 * 1 / 3 * 2 / 3)


def test_natural_weights_end_all_epochs_together() -> None:
    batches = batches_of(batch_size=1)
    rows = sum(size // S for size in SIZES.values())
    counts = Counter(batches.rows(0, rows).domains)
    for name, size in SIZES.items():
        assert abs(counts[name] - size / S) <= 0.15 * size / S + 2


def test_a_domain_left_out_of_the_weights_is_never_read() -> None:
    batches = batches_of(weights={"logs": 1.0})
    assert {name for step in range(50) for name in batches.batch(step).domains} == {"logs"}


def test_a_tiny_weight_still_gets_rows() -> None:
    batches = batches_of(weights={"code": 1.0, "logs": 1e-9}, batch_size=1100)
    assert "logs" in batches.batch(0).domains


def test_a_domain_shorter_than_a_window_is_padded_and_not_learned() -> None:
    batches = batches_of(shards=shards_of({"short": 6}), batch_size=2)
    batch = batches.batch(0)
    assert batch.input_ids_BS[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0]
    assert batch.labels_BS[0].tolist() == [1, 2, 3, 4, 5] + [IGNORE] * 5


def test_validation_is_fixed_in_order_and_without_overlap() -> None:
    shards = shards_of(SIZES, {"code": 333})
    runs = [
        list(batches_of(shards=shards, seed=seed).validation("code", num_tokens=10_000)) for seed in (0, 1)
    ]
    assert all(equal(a, b) for a, b in zip(*runs, strict=True))
    tokens = np.concatenate([batch.input_ids_BS.ravel() for batch in runs[0]])
    assert tokens.tolist() == list(range(5000, 5000 + 330))
    labels = np.concatenate([batch.labels_BS.ravel() for batch in runs[0]])
    assert labels.tolist() == list(range(5001, 5001 + 330))
    assert [len(batch.domains) for batch in runs[0]] == [4] * 8 + [1]


def test_validation_stops_at_the_number_of_tokens_asked_for() -> None:
    batches = batches_of(shards=shards_of(SIZES, {"code": 333, "logs": 4}))
    assert sum(b.input_ids_BS.size for b in batches.validation("code", num_tokens=59)) == 50
    (short,) = batches.validation("logs", num_tokens=1000)
    assert (short.labels_BS != IGNORE).sum() == 3
    assert list(batches.validation("prose", num_tokens=100)) == []


def test_training_rows_never_hold_a_validation_token() -> None:
    batches = batches_of(shards=shards_of(SIZES, dict.fromkeys(SIZES, 300)), batch_size=50)
    read = np.concatenate([batches.batch(step).labels_BS.ravel() for step in range(100)])
    assert (read % 10_000 < 5_000).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"seed": -1}, "seed=-1"),
        ({"weights": {"cod": 1.0}}, "'cod', which the data has not; it has code, prose, logs"),
        ({"weights": {"code": -1.0}}, "weight -1.0 of domain 'code'"),
        ({"weights": {"code": float("nan")}}, "weight nan"),
        ({"weights": {"code": 0.0}}, "all domain weights are 0"),
        ({"split": "validation"}, "no validation tokens"),
    ],
)
def test_what_makes_no_batches_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(MoevizError, match=message):
        batches_of(**fields)
