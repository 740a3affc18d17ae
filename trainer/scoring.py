"""How probable a model finds given texts, and the scores of multiple-choice tasks that follow from it.

Everything is done as lm-evaluation-harness does it, down to which tokens belong to a continuation, so that the
numbers can be compared: spaces at the end of a context move to the continuation, the two are tokenised together,
and what is too long loses its beginning.

T tokens of continuations, B texts, S tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.head import IGNORE
from model.lm import MoELanguageModel
from trainer.questions import Question
from trainer.text_model import TextModel
from trainer.tokenizer import Tokenizer

Advance = Callable[[int], None]


class Pair(NamedTuple):
    """Token ids of a context and of what follows it."""

    context: list[int]
    """At least one."""
    continuation: list[int]


class Likelihood(NamedTuple):
    """What a model thinks of a continuation."""

    nats: float
    """Logarithm of its probability, 0 or below."""
    greedy: bool
    """Whether each of its tokens is the most probable one."""


class TaskScore(NamedTuple):
    """The outcome of one task."""

    num_questions: int
    acc: float
    """Share of questions whose right choice is the most probable."""
    acc_stderr: float
    """Standard error of that share; NaN for one question."""
    acc_norm: float
    """The same with probabilities per character of the choice."""
    acc_norm_stderr: float
    chance: float
    """What guessing gives."""
    picks: tuple[int, ...]
    """The choice that was most probable, by question."""
    norm_picks: tuple[int, ...]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """A context and what follows it as ids; an empty context is the token that ends a document."""
    if not context:
        return Pair([tokenizer.eos_id], tokenizer.encode(continuation))
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    ids = tokenizer.encode(stripped) if stripped else [tokenizer.eos_id]
    return Pair(ids, whole[len(ids) :] if stripped else whole)


@torch.no_grad()
def likelihoods(
    model: MoELanguageModel,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
    advance: Advance = lambda amount: None,
) -> list[Likelihood]:
    """Of each pair, in their order. Long texts come first, so a batch that does not fit fails at once."""
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].context) - len(pairs[i].continuation))
    found: dict[int, Likelihood] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found |= zip(chosen, _batch(model, [pairs[i] for i in chosen]), strict=True)
        advance(len(chosen))
    return [found[i] for i in range(len(pairs))]


def _batch(model: MoELanguageModel, pairs: Sequence[Pair]) -> list[Likelihood]:
    input_ids_BS, labels_BS, valid_BS = _padded(pairs, model.config.max_seq_len)
    device = model.device
    hidden_BSD = model.model(
        input_ids_BS.to(device), None if bool(valid_BS.all()) else valid_BS.to(device)
    ).hidden_BSD
    counted_BS = (labels_BS != IGNORE).to(device)
    # The head is asked about continuations alone: contexts are most of the tokens.
    head = model.lm_head(hidden_BSD[counted_BS][None], labels_BS.to(device)[counted_BS][None])
    lengths = counted_BS.sum(dim=1).tolist()
    losses = head.token_loss_BS[0].double().cpu().split(lengths)
    correct = head.correct_BS[0].cpu().split(lengths)
    return [Likelihood(-float(a.sum()), bool(b.all())) for a, b in zip(losses, correct, strict=True)]


def _padded(pairs: Sequence[Pair], max_seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and validity [B, S], padded on the right; labels are IGNORE outside continuations."""
    rows = []
    for context, continuation in pairs:
        tokens = (context + continuation)[-(max_seq_len + 1) :]
        scored = min(len(continuation), len(tokens) - 1)
        rows.append((tokens, scored))
    width = max(len(tokens) for tokens, _ in rows) - 1
    inputs, labels = np.zeros((len(rows), width), dtype=np.int64), np.full((len(rows), width), IGNORE)
    valid = np.zeros((len(rows), width), dtype=bool)
    for i, (tokens, scored) in enumerate(rows):
        end = len(tokens) - 1
        inputs[i, :end], valid[i, :end] = tokens[:-1], True
        labels[i, end - scored : end] = tokens[len(tokens) - scored :]
    return torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy(valid)


def choice_nats(
    opened: TextModel,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    advance: Advance = lambda amount: None,
) -> list[list[float]]:
    """Log-probability of each choice of each question, nats.

    Args:
        opened: the model.
        questions: what it is asked.
        batch_size: texts at a time.
        advance: told how many choices were judged.

    Raises:
        MoevizError: the model has no tokenizer.
    """
    tokenizer = opened.words()
    pairs = [
        encode_pair(tokenizer, context, continuation)
        for question in questions
        for context, continuation in zip(question.contexts, question.continuations, strict=True)
    ]
    judged = likelihoods(opened.module, pairs, batch_size=batch_size, advance=advance)
    nats = iter(each.nats for each in judged)
    return [[next(nats) for _ in question.continuations] for question in questions]


def score(questions: Sequence[Question], nats: Sequence[Sequence[float]]) -> TaskScore:
    """Accuracies of questions whose choices have these log-probabilities."""
    gold = np.array([question.gold for question in questions])
    picks = np.array([int(np.argmax(row)) for row in nats])
    normed = [
        np.array(row) / np.maximum(question.lengths, 1) for question, row in zip(questions, nats, strict=True)
    ]
    norm_picks = np.array([int(np.argmax(row)) for row in normed])
    right, norm_right = picks == gold, norm_picks == gold
    return TaskScore(
        len(questions),
        float(right.mean()),
        _stderr(right),
        float(norm_right.mean()),
        _stderr(norm_right),
        float(np.mean([1 / len(question.continuations) for question in questions])),
        tuple(picks.tolist()),
        tuple(norm_picks.tolist()),
    )


def _stderr(right: np.ndarray) -> float:
    """Sample standard deviation over the root of the number."""
    return float(right.std(ddof=1) / math.sqrt(len(right))) if len(right) > 1 else math.nan
