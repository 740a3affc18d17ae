"""Multiple-choice scores: those of lm-evaluation-harness on the same model and questions, and what they are made of."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness import compare, published, tiny_folder
from moeviz.errors import MoevizError
from trainer.questions import TASKS, Question, load_questions
from trainer.scoring import Pair, choice_nats, encode_pair, likelihoods, score
from trainer.text_model import TextModel, open_text_model

SHARED = Path(os.environ.get("MOEVIZ_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
KEPT: dict[str, Any] = json.loads(Path(__file__).with_name("harness_questions.json").read_text())
"""Questions of our own, and the log-probabilities that lm-evaluation-harness 0.4.13 gave their choices:
`python benchmarks/harness.py --keep tests/harness_questions.json` with transformers' Mixtral.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def opened(folder: Path) -> TextModel:
    return open_text_model(folder, device="cpu")


@pytest.mark.parametrize("task", KEPT)
def test_every_choice_is_as_probable_as_in_the_harness(task: str, opened: TextModel) -> None:
    questions = [TASKS[task].read(row) for row in KEPT[task]["rows"]]
    nats = choice_nats(opened, questions, batch_size=3)
    for ours, theirs in zip(nats, KEPT[task]["nats"], strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)
    ours, oracle = score(questions, nats), score(questions, KEPT[task]["nats"])
    assert (ours.picks, ours.norm_picks) == (oracle.picks, oracle.norm_picks)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data: set MOEVIZ_SHARED_DATA")
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_hellaswag_equals_the_harness_to_the_last_question(folder: Path) -> None:
    lines = (SHARED / "hellaswag" / "hellaswag_val_1000.jsonl").read_text().splitlines()[:40]
    (found,) = compare(folder, {"hellaswag": [json.loads(line) for line in lines]}, 512)
    assert (found["differing"], found["norm_differing"]) == (0, 0)
    assert (found["acc"], found["acc_norm"]) == (found["harness_acc"], found["harness_acc_norm"])


@pytest.mark.parametrize("task", KEPT)
def test_both_forms_of_a_row_are_one_question(task: str) -> None:
    for row in KEPT[task]["rows"]:
        assert TASKS[task].read(row) == TASKS[task].read(published(task, row))


def test_prompts_by_the_book() -> None:
    """Written out by hand from the harness's definitions."""
    arc = TASKS["arc_easy"].read({"query": "Question: Why?", "choices": ["a", "bc"], "gold": 1})
    assert arc == Question(("Question: Why?\nAnswer:",) * 2, (" a", " bc"), 1, (1, 2))
    row = {"sentence": "The cup and the _ broke.", "option1": "jug", "option2": "pot", "answer": "1"}
    assert TASKS["winogrande"].read(row) == Question(
        ("The cup and the jug", "The cup and the pot"), (" broke.",) * 2, 0, (19, 19)
    )
    row = {
        "activity_label": "Cooking",
        "ctx_a": "How to boil [title] Heat water.",
        "ctx_b": "the Water",
        "endings": ["[step] boils.", "sings."],
        "label": "0",
    }
    assert TASKS["hellaswag"].read(row) == Question(
        ("Cooking: How to boil. Heat water. The water",) * 2, ("  boils.", " sings."), 0, (7, 6)
    )
    row = {
        "premise": "It rained.",
        "choice1": "He got wet.",
        "choice2": "He sang.",
        "question": "effect",
        "label": 0,
    }
    assert TASKS["copa"].read(row) == Question(
        ("It rained therefore",) * 2, ("  he got wet.", "  he sang."), 0, (12, 9)
    )
    short = {"query": "It rained, therefore", "choices": ["he got wet.", "he sang."], "gold": 0}
    assert TASKS["copa"].read(short) == TASKS["copa"].read(row)


def test_likelihoods_are_sums_of_log_softmax_alone_or_in_a_batch(opened: TextModel) -> None:
    """Oracle: each text by itself, whole logits, torch's own log_softmax."""
    rng = np.random.default_rng(0)
    sizes = [(1, 4), (30, 1), (7, 0), (12, 9), (500, 30), (3, 600)]
    pairs = [Pair(rng.integers(256, size=a).tolist(), rng.integers(256, size=b).tolist()) for a, b in sizes]
    found = likelihoods(opened.module, pairs, batch_size=4)
    for pair, each in zip(pairs, found, strict=True):
        tokens = torch.tensor((pair.context + pair.continuation)[-513:])
        scored = min(len(pair.continuation), len(tokens) - 1)
        with torch.no_grad():
            log_probs_SV = opened.module(tokens[None, :-1]).logits_BSV[0].double().log_softmax(-1)
        rows = log_probs_SV[len(tokens) - 1 - scored :]
        right = tokens[len(tokens) - scored :]
        assert each.nats == pytest.approx(float(rows[torch.arange(scored), right].sum()), abs=1e-3)
        assert each.greedy == bool((rows.argmax(-1) == right).all())


def test_greedy_is_what_the_model_would_say(opened: TextModel) -> None:
    context = opened.words().encode("The river")
    said: list[int] = []
    for _ in range(4):
        with torch.no_grad():
            said.append(int(opened.module(torch.tensor([context + said])).logits_BSV[0, -1].argmax()))
    other = [*said[:3], (said[3] + 1) % 256]
    judged = likelihoods(opened.module, [Pair(context, said), Pair(context, other)])
    assert [each.greedy for each in judged] == [True, False]


def test_spaces_before_a_continuation_belong_to_it(opened: TextModel) -> None:
    words = opened.words()
    assert encode_pair(words, "a  ", "b") == Pair(words.encode("a"), words.encode("  b"))
    assert encode_pair(words, "", "b") == Pair([words.eos_id], words.encode("b"))


def test_accuracy_and_its_error_by_hand() -> None:
    questions = [Question(("q",) * 2, (" long", " s"), gold, (4, 1)) for gold in (0, 1, 0, 0)]
    found = score(questions, [[-4.0, -3.0], [-4.0, -3.0], [-2.0, -3.0], [-8.0, -1.5]])
    assert found.picks == (1, 1, 0, 1)
    assert found.norm_picks == (0, 0, 0, 1)
    assert (found.acc, found.acc_norm, found.chance) == (0.5, 0.5, 0.5)
    assert found.acc_stderr == pytest.approx(math.sqrt(0.25 * 4 / 3 / 4))
    assert math.isnan(score(questions[:1], [[0.0, -1.0]]).acc_stderr)


def test_files_are_found_by_their_name_and_the_largest_is_read(tmp_path: Path) -> None:
    row = {"query": "q", "choices": ["a", "b"], "gold": 0}
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "openbook_qa.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    (tmp_path / "openbookqa_few.jsonl").write_text(json.dumps(row))
    assert len(load_questions("openbookqa", tmp_path)) == 3
    assert len(load_questions("openbookqa", tmp_path, limit=2)) == 2
    with pytest.raises(MoevizError, match="begins with piqa"):
        load_questions("piqa", tmp_path)
    with pytest.raises(MoevizError, match="no file or folder at"):
        load_questions("piqa", tmp_path / "none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "choices": ["a"]}', r"line 2 is no question of openbookqa.*it has query, choices"),
        ('{"query": "q", "choices": ["a"], "gold": 3}', "the right answer 3 is none of 1 choices"),
        ("[1]", "line 2 is no question of openbookqa"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_a_row_of_another_form_is_named(line: str, message: str, tmp_path: Path) -> None:
    good = {"query": "q", "choices": ["a", "b"], "gold": 0}
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(MoevizError, match=message):
        load_questions("openbookqa", tmp_path / "mine.jsonl")
