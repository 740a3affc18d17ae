"""Multiple-choice tasks: which text each question is, and where questions come from.

Prompts are those of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness),
so a score here is a score there. Rows are read in the form in which a task is published and in the shorter one
of llm-foundry's files (query, choices, gold); nothing is downloaded unless `datasets` is installed and asked.

    TASKS["hellaswag"].read(row) -> Question
    load_questions("hellaswag", folder_or_file, limit=100) -> list[Question]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from moeviz.errors import MoevizError, require
from trainer.data_lines import open_lines

Row = Mapping[str, Any]
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".ndjson")


class Question(NamedTuple):
    """Some texts of which one is right: context i followed by continuation i."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    """Index of the right one."""
    lengths: tuple[int, ...]
    """Characters of each choice, without the space before it: what `acc_norm` divides by."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark."""

    name: str
    about: str
    read: Callable[[Row], Question]
    """A row of its file -> a question. Raises KeyError, ValueError or TypeError for a row of another form."""
    normed: bool = True
    """Whether `acc_norm` means something: not where all choices are of one text."""
    hub: tuple[str, str | None, str]
    """Data set, configuration and split on the Hugging Face hub."""


def _choices(query: str, choices: tuple[str, ...], gold: int) -> Question:
    if not 0 <= gold < len(choices):
        raise ValueError(f"the right answer {gold} is none of {len(choices)} choices")
    continuations = tuple(f" {choice}" for choice in choices)
    return Question((query,) * len(choices), continuations, gold, tuple(map(len, choices)))


def _hellaswag(row: Row) -> Question:
    """Zellers et al. 2019, arXiv:1905.07830."""
    context = row["ctx_a"] + " " + row["ctx_b"].capitalize() if "ctx_a" in row else row["ctx"]
    query = _without_marks(row["activity_label"] + ": " + context)
    return _choices(query, tuple(_without_marks(ending) for ending in row["endings"]), int(row["label"]))


def _without_marks(text: str) -> str:
    """WikiHow's [header], [step] and [title]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(row: Row) -> Question:
    """Clark et al. 2018, arXiv:1803.05457."""
    if "gold" in row:
        query = row["query"].removeprefix("Question: ").rstrip()
        choices, gold = tuple(row["choices"]), row["gold"]
    else:
        query = row["question"]
        choices, gold = tuple(row["choices"]["text"]), row["choices"]["label"].index(row["answerKey"])
    return _choices(f"Question: {query}\nAnswer:", choices, gold)


def _piqa(row: Row) -> Question:
    """Bisk et al. 2020, arXiv:1911.11641."""
    if "sol1" in row:
        return _choices(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))
    return _arc(row)


def _openbookqa(row: Row) -> Question:
    """Mihaylov et al. 2018, arXiv:1809.02789."""
    if "gold" in row:
        return _choices(row["query"], tuple(row["choices"]), row["gold"])
    choices = row["choices"]
    return _choices(
        row["question_stem"], tuple(choices["text"]), choices["label"].index(row["answerKey"].lstrip())
    )


def _winogrande(row: Row) -> Question:
    """Sakaguchi et al. 2020, arXiv:1907.10641. The choice is in the context; what follows is the same text."""
    if "gold" in row:
        contexts, rest, gold = tuple(row["context_options"]), row["continuation"], row["gold"]
    else:
        before, _, rest = row["sentence"].partition("_")
        contexts, gold = (before + row["option1"], before + row["option2"]), int(row["answer"]) - 1
    if not 0 <= gold < len(contexts):
        raise ValueError(f"the right answer {gold} is none of {len(contexts)} choices")
    return Question(contexts, (f" {rest.strip()}",) * len(contexts), gold, tuple(map(len, contexts)))


def _copa(row: Row) -> Question:
    """Roemmele et al. 2011, part of SuperGLUE. Two spaces before a choice, as the harness has it."""
    if "gold" in row:
        event, _, connector = row["query"].strip().rpartition(" ")
        query, choices, gold = f"{event.rstrip(',')} {connector}", tuple(row["choices"]), row["gold"]
    else:
        connector = {"cause": "because", "effect": "therefore"}[row["question"]]
        query, gold = f"{row['premise'].strip()[:-1]} {connector}", int(row["label"])
        choices = (row["choice1"], row["choice2"])
    return _choices(query, tuple(f" {choice[0].lower()}{choice[1:]}" for choice in choices), gold)


_TASKS = (
    Task(
        name="hellaswag",
        about="which of four endings follows a scene",
        read=_hellaswag,
        hub=("Rowan/hellaswag", None, "validation"),
    ),
    Task(
        name="arc_easy",
        about="school science questions",
        read=_arc,
        hub=("allenai/ai2_arc", "ARC-Easy", "test"),
    ),
    Task(
        name="arc_challenge",
        about="those that word statistics do not answer",
        read=_arc,
        hub=("allenai/ai2_arc", "ARC-Challenge", "test"),
    ),
    Task(
        name="piqa",
        about="which of two ways to do something works",
        read=_piqa,
        hub=("baber/piqa", None, "validation"),
    ),
    Task(
        name="winogrande",
        about="who or what a word refers to",
        read=_winogrande,
        normed=False,
        hub=("allenai/winogrande", "winogrande_xl", "validation"),
    ),
    Task(
        name="openbookqa",
        about="elementary science with common sense",
        read=_openbookqa,
        hub=("allenai/openbookqa", "main", "test"),
    ),
    Task(
        name="copa",
        about="cause or effect of an event",
        read=_copa,
        normed=False,
        hub=("aps/super_glue", "copa", "validation"),
    ),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})


def load_questions(name: str, where: Path | None, *, limit: int | None = None) -> list[Question]:
    """The first questions of a task.

    Args:
        name: one of TASKS.
        where: a JSON Lines file (plain, .gz, .zst), or a folder in which, or below which, a file begins with the
            task's name; of several the largest is taken. None: the Hugging Face hub.
        limit: how many; None: all.

    Raises:
        MoevizError: no such file, or a row that is no question of this task.
    """
    task = TASKS[name]
    rows = _hub_rows(task) if where is None else _file_rows(task_file(name, where))
    questions = []
    for place, row in islice(rows, limit):
        try:
            questions.append(task.read(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            fields = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise MoevizError(
                f"{place} is no question of {name}: {reason} (it has {fields}); name its file with --task-data"
            ) from error
    if not questions:
        raise MoevizError(f"no question of {name} in {where}; name its file with --task-data")
    return questions


def task_file(name: str, where: Path) -> Path:
    """The file of a task at a path, see `load_questions`.

    Raises:
        MoevizError: there is none.
    """
    if where.is_file():
        return where
    if not where.is_dir():
        raise MoevizError(f"no file or folder at {where}; --task-data names where the questions are")
    wanted = name.replace("_", "")
    found = [
        path
        for path in sorted(where.rglob("*"))
        if path.name.endswith(_SUFFIXES) and path.name.lower().replace("_", "").startswith(wanted)
    ]
    if not found:
        raise MoevizError(
            f"no file below {where} begins with {name} and ends with {', '.join(_SUFFIXES)}; name it with --task-data"
        )
    return max(found, key=lambda path: path.stat().st_size * (4 if path.suffix in (".gz", ".zst") else 1))


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(open_lines(path), start=1):
        if line.strip():
            try:
                yield f"{path} line {number}", orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise MoevizError(f"{path} line {number} is not JSON: {error}") from error


def _hub_rows(task: Task) -> Iterator[tuple[str, Row]]:
    datasets = require("datasets", "hub", f"--task {task.name} without --task-data")
    name, config, split = task.hub
    try:
        for number, row in enumerate(datasets.load_dataset(name, config, split=split)):
            yield f"{name} row {number}", row
    except (OSError, ValueError, ConnectionError) as error:
        raise MoevizError(
            f"{name} cannot be fetched from the Hugging Face hub ({error}); name a file with --task-data"
        ) from error
