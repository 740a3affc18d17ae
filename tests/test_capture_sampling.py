"""Which sequences a step records, how score functions are told apart, and what calls of a model say about its batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from moeviz.capture.micro_batch import read_call
from moeviz.capture.reading import Reading
from moeviz.capture.reduce import stack
from moeviz.capture.sampling import choose_rows
from moeviz.capture.scoring import is_ranked, score_of
from moeviz.records import ScoreFunction

T, E, K = 40, 6, 2


def step_of(micro_batches: int, size: int, expected: int, wanted: int, step: int) -> list[int]:
    """Sequences that a whole step records."""
    seqs: list[int] = []
    for index in range(micro_batches):
        rows = choose_rows(index * size, size, expected, wanted, step, len(seqs))
        assert rows == sorted(set(rows))
        assert all(0 <= row < size for row in rows)
        seqs += [index * size + row for row in rows]
    return seqs


@pytest.mark.parametrize("step", [0, 1, 10, 777])
@pytest.mark.parametrize(
    ("micro_batches", "size", "wanted"), [(1, 8, 3), (4, 2, 3), (3, 5, 15), (2, 3, 99), (8, 1, 4)]
)
def test_a_step_records_as_many_as_wanted_spread_over_its_micro_batches(
    micro_batches: int, size: int, wanted: int, step: int
) -> None:
    total = micro_batches * size
    seqs = step_of(micro_batches, size, total, wanted, step)
    assert len(seqs) == min(wanted, total)
    per_micro_batch = Counter(seq // size for seq in seqs)
    assert max(per_micro_batch.values()) - min(per_micro_batch[m] for m in range(micro_batches)) <= 1


@pytest.mark.parametrize("wanted", [1, 4, 7])
def test_first_step_records_no_more_than_wanted_although_its_size_is_unknown(wanted: int) -> None:
    assert len(step_of(4, 3, 0, wanted, 0)) == wanted


def test_rows_move_from_step_to_step() -> None:
    chosen = {seq for step in range(0, 200, 10) for seq in step_of(1, 16, 16, 2, step)}
    assert len(chosen) == 16


def test_all_means_all() -> None:
    assert choose_rows(6, 3, 9, "all", 5) == [0, 1, 2]


def reading(score: ScoreFunction, norm: bool, top_k: int, dtype: torch.dtype = torch.float32) -> Reading:
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(3)).to(dtype)
    scores_TE = logits_TE.float().sigmoid() if score == "sigmoid" else logits_TE.float().softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
    if norm:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return Reading(logits_TE, (2.5 * weights_TK).to(dtype), ids_TK)


@pytest.mark.parametrize("truth", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("claimed", ["softmax", "sigmoid", "unknown"])
def test_gate_weights_tell_the_score_function(
    truth: ScoreFunction, norm: bool, claimed: ScoreFunction
) -> None:
    found = score_of(stack([reading(truth, norm, K)]), claimed)
    assert (found == "sigmoid") == (truth == "sigmoid")


@pytest.mark.parametrize("claimed", ["softmax", "sigmoid", "softmax_topk"])
def test_claim_stands_where_weights_tell_nothing(claimed: ScoreFunction) -> None:
    one = reading("softmax", norm=True, top_k=1)
    assert score_of(stack([one]), claimed) == claimed
    noise = one._replace(weights_TK=torch.rand(T, 1))
    assert score_of(stack([noise]), claimed) == claimed


def test_rounding_to_bfloat16_overrules_no_right_claim() -> None:
    for truth in ("softmax", "sigmoid"):
        assert score_of(stack([reading(truth, True, K, torch.bfloat16)]), truth) == truth  # type: ignore[arg-type]


def test_choices_are_ranked_unless_something_else_decides() -> None:
    plain = stack([reading("softmax", True, K)])
    assert is_ranked(plain, "softmax", None)
    assert not is_ranked(plain, "softmax", 5 * torch.eye(E)[:1])
    swapped = plain._replace(expert_ids_LTK=(plain.expert_ids_LTK + 1) % E)
    assert not is_ranked(swapped, "softmax", None)


IDS = torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("names", "args", "kwargs"),
    [
        (("input_ids", "attention_mask"), (IDS, IDS), {}),
        (("input_ids",), (), {"input_ids": IDS, "attention_mask": IDS}),
        (("input_ids_BS", "labels_BS"), (IDS, IDS), {"attention_mask_BS": IDS.bool()}),
        (("idx", "targets"), (IDS, IDS), {"attention_mask": torch.ones(2, 8)}),
        (("attention_mask", "input_ids"), (IDS, IDS), {}),
    ],
)
def test_ids_and_mask_are_found_by_name(
    names: tuple[str, ...], args: tuple[Tensor, ...], kwargs: dict
) -> None:
    found = read_call(3, names, args, kwargs)
    assert found is not None
    assert (found.index, found.batch_size, found.length) == (3, 2, 5)
    assert found.ids_BS is IDS
    assert found.valid_BS is not None
    assert found.valid_BS.shape == (2, 5)
    assert found.valid_BS.dtype == torch.bool


def test_embeddings_tell_the_shape_and_four_dimensional_masks_are_no_padding() -> None:
    found = read_call(
        0,
        ("input_ids",),
        (),
        {"inputs_embeds": torch.ones(2, 5, 4), "attention_mask": torch.ones(2, 1, 5, 5)},
    )
    assert found is not None
    assert (found.num_tokens, found.ids_BS, found.valid_BS) == (10, None, None)
    assert read_call(0, ("pixels",), (torch.ones(2, 3),), {}) is None
