"""Laws of the names: every row once, whatever was merged, resumed, raced or lost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from moeviz.store.cover import SegmentName, cover, holes


def name(
    first: int,
    last: int,
    level: int = 0,
    active: float = 0.0,
    attempt: int = 0,
    from_step: int = 0,
    rank: int = 0,
) -> SegmentName:
    """A segment whose flush n holds exactly step n."""
    return SegmentName(rank, attempt, from_step, first, last, first, last, level, int(active * 1000))


def flushes(names: list[SegmentName], now: float) -> list[tuple[int, int, int]]:
    """Every (rank, attempt, flush) that a reader sees at `now`, with repetitions."""
    chosen = cover([str(one) for one in names], now)
    return [
        (one.name.rank, one.name.attempt, n)
        for one in chosen
        for n in range(one.name.first_flush, one.name.last_flush + 1)
        if one.below_step is None or n < one.below_step
    ]


@pytest.mark.parametrize("step", [-1, 0, 123456789])
def test_a_name_reads_back_as_what_it_was_made_of(step: int) -> None:
    one = SegmentName(3, 1, 500, 7, 9, step, step + 4, 2, 1_763_786_621_123)
    assert SegmentName.parse(str(one)) == one


@pytest.mark.parametrize(
    "text", ["", ".r0-a0.0-n1.1-s1.1-l0-5.parquet.tmp", "notes.txt", "r0-a0.0-n1.1-s1.1-l0-5.parquet.bak"]
)
def test_other_files_are_no_segments(text: str) -> None:
    assert SegmentName.parse(text) is None
    assert cover([text], 0) == []


def merge_history(seed: int) -> list[tuple[float, list[SegmentName], int]]:
    """A folder over time: random flushes, merges with a delay, deletions a grace period after activation."""
    rng = np.random.default_rng(seed)
    delay, grace = 5.0, 60.0
    folder = {name(0, 0), name(1, 1)}
    history, flush = [], 1
    for tick in range(300):
        now = float(tick)
        if rng.random() < 0.7:
            flush += 1
            folder.add(name(flush, flush, active=now))
        level = int(rng.integers(0, 2))
        latest = sorted(one.name for one in cover(map(str, folder), float("inf")))
        group = [one for one in latest if one.level == level][: int(rng.integers(2, 5))]
        adjoin = all(a.last_flush + 1 == b.first_flush for a, b in pairwise(group))
        if len(group) > 1 and adjoin and rng.random() < 0.5:
            folder.add(name(group[0].first_flush, group[-1].last_flush, level + 1, now + delay))
        for big in [one for one in folder if one.level and one.active_ms / 1000 <= now - grace]:
            folder -= {
                s
                for s in folder
                if s != big and big.first_flush <= s.first_flush and s.last_flush <= big.last_flush
            }
        history.append((now, sorted(folder), flush))
    return history


@pytest.mark.parametrize("seed", range(5))
def test_every_flush_is_seen_exactly_once_at_every_moment(seed: int) -> None:
    for now, folder, newest in merge_history(seed):
        assert [n for _, _, n in flushes(folder, now)] == list(range(newest + 1))
        assert holes(map(str, folder)) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_listing_a_minute_old_names_files_that_still_exist(seed: int) -> None:
    history = merge_history(seed)
    for (now, folder, _), (_, later, _) in zip(history, history[59:], strict=False):
        assert {one.name for one in cover(map(str, folder), now)} <= set(later)


def test_of_two_equal_merges_one_counts() -> None:
    folder = [name(1, 4, 1, 10.0), name(1, 4, 1, 10.5), *(name(n, n) for n in range(1, 5))]
    assert flushes(folder, 20.0) == [(0, 0, n) for n in range(1, 5)]


def test_of_two_merges_that_overlap_one_counts_and_the_rest_comes_from_small_files() -> None:
    folder = [name(1, 4, 1, 10.0), name(3, 6, 1, 10.0), *(name(n, n) for n in range(1, 7))]
    assert flushes(folder, 20.0) == [(0, 0, n) for n in range(1, 7)]


def test_a_resumed_run_has_no_step_twice_and_none_of_a_dropped_future() -> None:
    first = [name(n, n) for n in range(10)]
    again = [name(n, n, attempt=1, from_step=6) for n in range(6, 9)]
    third = [name(n, n, attempt=2, from_step=4) for n in range(4, 6)]
    assert flushes(first + again, 1.0) == [(0, 0, n) for n in range(6)] + [(0, 1, n) for n in range(6, 9)]
    assert flushes(first + again + third, 1.0) == [(0, 0, n) for n in range(4)] + [(0, 2, n) for n in (4, 5)]


def test_a_file_across_the_cut_says_where_to_cut() -> None:
    chosen = cover([str(name(0, 9)), str(name(6, 6, attempt=1, from_step=6))], 1.0)
    assert [(one.name.attempt, one.below_step) for one in chosen] == [(0, 6), (1, None)]


def test_an_attempt_of_one_rank_cuts_the_others_too() -> None:
    folder = [name(n, n, rank=rank) for n in range(4) for rank in (0, 1)] + [
        name(2, 2, attempt=1, from_step=2)
    ]
    assert flushes(folder, 1.0) == [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 0, 0), (1, 0, 1)]


def test_lost_files_are_found_by_their_flush_numbers() -> None:
    kept = [name(n, n) for n in (0, 1, 2, 5, 6, 8)] + [name(3, 3, rank=1)]
    assert holes(map(str, kept)) == [(0, 0, 3, 4), (0, 0, 7, 7), (1, 0, 1, 2)]


def test_a_reader_whose_clock_is_behind_takes_the_merged_file_when_its_parts_are_gone() -> None:
    merged = name(1, 4, 1, active=1000.0)
    assert flushes([name(0, 0), merged, name(5, 5)], now=10.0) == [(0, 0, n) for n in range(6)]
    parts = [name(n, n) for n in range(6)]
    assert [one.name.level for one in cover(map(str, [*parts, merged]), 10.0)] == [0] * 6
    assert [one.name.level for one in cover(map(str, [*parts, merged]), 1001.0)] == [0, 1, 0]
