"""`moeviz eval`: how good a checkpoint is, on held-out text and on the multiple-choice tasks of the field."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from moeviz.errors import MoevizError, require

if TYPE_CHECKING:
    from trainer.evaluate import DomainLoss
    from trainer.scoring import TaskScore
    from trainer.text_model import TextModel

TEXT = "text"
_DESCRIPTION = """How good is a checkpoint?

    moeviz eval runs/mine                                        loss, perplexity, bits per byte and accuracy by domain
    moeviz eval runs/mine --task hellaswag --task-data tasks/    one task (acc, acc_norm, each with its standard error)
    moeviz eval runs/mine --task all --task-data tasks/          text and every task
    moeviz eval models/OLMoE-1B-7B --task piqa --limit 200       a Hugging Face folder

CHECKPOINT is a run (its newest checkpoint), one checkpoint folder, or a local Hugging Face folder. Results of a run's
checkpoint are kept in the run, as scalars eval/TASK/METRIC at its step and as an event. A model that sees later tokens
(router chooser=expert, or drops by probability) is named as such: its numbers are not those of predicting text.

Tasks: hellaswag, arc_easy, arc_challenge, piqa, winogrande, openbookqa, copa. Their files are JSON Lines as they are
published, or with query, choices and gold; without --task-data they come from the Hugging Face hub (needs `pip
install datasets`). Prompts and scores are those of lm-evaluation-harness.
"""


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """How good is a checkpoint?"""

    checkpoint: Positional[Path]
    """A run, a checkpoint folder, or a Hugging Face folder."""
    task: tuple[str, ...] = (TEXT,)
    """text (loss on held-out text), names of tasks, or all."""
    task_data: Path | None = None
    """A file of questions, or a folder that holds files which begin with the task's name. Default: MOEVIZ_TASKS."""
    data: str | None = None
    """Text to judge by, a file or folder, all of it. Default: what the run held out."""
    limit: int | None = None
    """Questions of each task at most, and windows of each domain (default: all, and 64)."""
    batch_size: int = 16
    """Texts at a time."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: bool = False
    """Print one JSON object instead of tables."""
    keep: bool = True
    """Keep the results in the run that the checkpoint belongs to (--no-keep: do not)."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0."""
    import tyro

    arguments = tyro.cli(EvalArguments, args=argv, prog="moeviz eval", description=_DESCRIPTION)
    tasks = _tasks(arguments.task)
    if arguments.limit is not None and arguments.limit < 1:
        raise MoevizError(f"--limit {arguments.limit} is below 1; leave it out for everything")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    require("torch", "train", "evaluating a checkpoint")
    from trainer.allocator import keep_freed_memory
    from trainer.engine import choose_device, set_threads
    from trainer.text_model import open_text_model

    set_threads(None)
    if choose_device(arguments.device).type == "cpu":
        keep_freed_memory()
    opened = open_text_model(arguments.checkpoint, device=arguments.device, note=_warn)
    if ahead := opened.module.config.looks_ahead():
        _warn(ahead)
    losses = _losses(opened, arguments) if TEXT in tasks else {}
    scores = _scores(opened, [task for task in tasks if task != TEXT], arguments)
    if arguments.keep:
        _keep(opened, losses, scores, arguments)
    if arguments.json:
        print(json.dumps(_as_json(opened, losses, scores), indent=1))
    else:
        print("\n".join([*_text_table(losses), *([""] if losses and scores else []), *_task_table(scores)]))
    return 0


def _tasks(named: tuple[str, ...]) -> list[str]:
    from trainer.questions import TASKS

    known = [TEXT, *TASKS]
    for name in named:
        if name not in (*known, "all"):
            raise MoevizError(f"no task {name!r}; there are {', '.join(known)}, and all")
    return known if "all" in named else list(dict.fromkeys(named))


def _warn(text: str) -> None:
    print(f"moeviz eval: {text}", file=sys.stderr)


def _losses(opened: TextModel, arguments: EvalArguments) -> Mapping[str, DomainLoss]:
    from trainer.held_out import text_losses

    return text_losses(
        opened, arguments.data, sequences=arguments.limit or 64, batch_size=arguments.batch_size
    )


def _scores(opened: TextModel, tasks: list[str], arguments: EvalArguments) -> dict[str, TaskScore]:
    from trainer.data_progress import progress
    from trainer.questions import load_questions
    from trainer.scoring import choice_nats, score

    where = arguments.task_data
    if where is None and os.environ.get("MOEVIZ_TASKS"):
        where = Path(os.environ["MOEVIZ_TASKS"])
    questions = {task: load_questions(task, where, limit=arguments.limit) for task in tasks}
    scores = {}
    for task, asked in questions.items():
        choices = sum(len(question.continuations) for question in asked)
        with progress(task, total=choices, unit="items", quiet=False) as advance:
            nats = choice_nats(opened, asked, batch_size=arguments.batch_size, advance=advance)
        scores[task] = score(asked, nats)
    return scores


def _text_table(losses: Mapping[str, DomainLoss]) -> list[str]:
    if not losses:
        return []
    width = max(10, *(len(domain) for domain in losses))
    lines = [f"{'held-out':<{width}}  {'loss':>7}  {'perplexity':>10}  bits/byte  accuracy    tokens"]
    for domain, each in losses.items():
        lines.append(
            f"{domain:<{width}}  {each.loss_nats:7.3f}  {each.perplexity:10.2f}  {each.bits_per_byte:9.3f}"
            f"  {each.accuracy:8.1%}  {each.num_tokens:8,}"
        )
    return lines


def _task_table(scores: Mapping[str, TaskScore]) -> list[str]:
    from trainer.questions import TASKS

    if not scores:
        return []
    lines = [f"{'task':<14}  {'questions':>9}  {'acc':>15}  {'acc_norm':>15}  {'guessing':>8}"]
    for task, each in scores.items():
        normed = _share(each.acc_norm, each.acc_norm_stderr) if TASKS[task].normed else ""
        acc = _share(each.acc, each.acc_stderr)
        lines.append(f"{task:<14}  {each.num_questions:9,}  {acc:>15}  {normed:>15}  {each.chance:8.1%}")
    return lines


def _share(value: float, stderr: float) -> str:
    return f"{value:.2%} ± {stderr:.2%}"


def _values(losses: Mapping[str, DomainLoss], scores: Mapping[str, TaskScore]) -> dict[str, float]:
    """Every result under the name of its scalar."""
    from trainer.questions import TASKS

    values: dict[str, float] = {}
    for domain, loss in losses.items():
        values[f"eval/{domain}/loss"] = loss.loss_nats
        values[f"eval/{domain}/perplexity"] = loss.perplexity
        values[f"eval/{domain}/bits_per_byte"] = loss.bits_per_byte
        values[f"eval/{domain}/accuracy"] = loss.accuracy
    for task, score in scores.items():
        values[f"eval/{task}/acc"] = score.acc
        values[f"eval/{task}/acc_stderr"] = score.acc_stderr
        if TASKS[task].normed:
            values[f"eval/{task}/acc_norm"] = score.acc_norm
            values[f"eval/{task}/acc_norm_stderr"] = score.acc_norm_stderr
    return {name: value for name, value in values.items() if value == value}


def _keep(
    opened: TextModel,
    losses: Mapping[str, DomainLoss],
    scores: Mapping[str, TaskScore],
    arguments: EvalArguments,
) -> None:
    if opened.checkpoint is None:
        return
    from moeviz.errors import RunNotFoundError
    from trainer.evaluation_record import record_evaluation
    from trainer.resume import run_of

    run = run_of(opened.checkpoint)
    detail = {
        "checkpoint": opened.path.name,
        "domains": list(losses),
        "data": arguments.data,
        "questions": {task: score.num_questions for task, score in scores.items()},
        "causal": opened.module.config.is_causal(),
    }
    try:
        record_evaluation(run, opened.checkpoint.step, _values(losses, scores), detail)
    except RunNotFoundError:
        return  # a checkpoint that was copied out of its run
    except MoevizError as error:
        _warn(str(error))


def _as_json(
    opened: TextModel, losses: Mapping[str, DomainLoss], scores: Mapping[str, TaskScore]
) -> dict[str, Any]:
    values = _values(losses, scores)
    return {
        "checkpoint": str(opened.path),
        "step": opened.checkpoint.step if opened.checkpoint else None,
        "causal": opened.module.config.is_causal(),
        "results": values,
        "questions": {task: score.num_questions for task, score in scores.items()},
        "tokens": {domain: loss.num_tokens for domain, loss in losses.items()},
    }
