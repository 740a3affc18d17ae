"""One run of a study: the flags it is trained with, its folder, and how far it is by what the folder says."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from moeviz.errors import MoevizError
from moeviz.store import queries
from moeviz.store.reader import open_run
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import TrainConfig
from trainer.resume import CHECKPOINTS

TRIAL_FILE = "trial.json"
"""In a run folder: the flags and the varied values it was made with."""
PRUNED_FILE = "pruned.json"
"""In a run folder that a rule ended early: the step, and why."""
LOG_FILE = "train.log"
"""In a run folder: what `moeviz train` said."""

State = Literal["new", "begun", "finished", "pruned", "failed", "refused"]
Parser = Callable[[list[str]], TrainConfig]
"""Flags of `moeviz train` -> config, as the command line reads them."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run, before it is trained."""

    name: str
    """Name of its folder."""
    words: tuple[str, ...]
    """Flags of `moeviz train`, without --run."""
    places: tuple[str, ...] = ()
    """Further flags that name where files are: another machine, or a moved folder, is no other training."""
    values: Mapping[str, str] = field(default_factory=dict)
    """What distinguishes it from the others of its study, by name."""
    config: TrainConfig | None = None
    """What the flags mean; None where they contradict each other."""
    problem: str = ""
    """Why they do."""


def checked(trial: Trial, parse: Parser) -> Trial:
    """The trial with its config, and with --log-routing where there is routing to log; or with its problem."""
    told = io.StringIO()
    try:
        with redirect_stderr(told), redirect_stdout(told):
            config = parse(list(trial.words))
            if config.model.num_moe_layers and not config.log_routing:
                words = (*trial.words, "--log-routing")
                return replace(trial, words=words, config=parse(list(words)))
    except (MoevizError, ValueError) as error:
        return replace(trial, problem=str(error))
    except SystemExit:
        return replace(trial, problem=_said(told.getvalue()) or "moeviz train refuses these flags")
    return replace(trial, config=config)


def _said(text: str) -> str:
    """What a flag parser complained about, without its frame."""
    plain = re.sub(r"[╭╮╰╯│─]+|-{5,}|For full helptext.*", " ", text)
    return re.sub(r"^(Value error )?(Error parsing \w+: )?", "", " ".join(plain.split()))


def begin(trial: Trial, run: Path, parse: Parser) -> list[str]:
    """Words after `moeviz train` that begin the trial in `run`, or go on with it.

    What an attempt without a checkpoint left is removed first: it would be trained from its first step anyway.

    Raises:
        MoevizError: the folder holds something else.
    """
    if (run / TRIAL_FILE).exists():
        check_same(trial, run, parse)
        if list_checkpoints(run / CHECKPOINTS):
            return ["--resume", str(run)]
        shutil.rmtree(run)
    elif run.exists() and any(run.iterdir()):
        raise MoevizError(f"{run} holds something that is not a run of this study; name another folder")
    run.mkdir(parents=True)
    about = {"words": list(trial.words), "values": dict(trial.values)}
    (run / TRIAL_FILE).write_text(json.dumps(about, indent=1))
    return [*trial.words, *trial.places, "--run", str(run)]


def check_same(trial: Trial, run: Path, parse: Parser) -> None:
    """Refuse a run that was trained with other flags.

    Raises:
        MoevizError: names them.
    """
    then = json.loads((run / TRIAL_FILE).read_text())["words"]
    if then != list(trial.words) and checked(Trial(name="", words=tuple(then)), parse).config != trial.config:
        changed = [word for word in (*then, *trial.words) if (word in then) != (word in trial.words)]
        raise MoevizError(
            f"{run} was trained with other flags (they differ in {' '.join(changed)}); name another folder, "
            "or delete this run"
        )


def state_of(trial: Trial, run: Path) -> State:
    """How far the trial is. A run that was cut short is `begun`, whether or not it can say so."""
    if trial.config is None:
        return "refused"
    if not (run / TRIAL_FILE).exists():
        return "new"
    if (run / PRUNED_FILE).exists():
        return "pruned"
    try:
        with open_run(run) as store:
            status = queries.end_status(store)
    except MoevizError:
        return "begun"
    return "finished" if status == "finished" else "failed" if status == "failed" else "begun"


def validation_curve(run: Path) -> dict[int, float]:
    """Held-out loss in nats by the step whose weights it is of; empty before the first evaluation."""
    try:
        with open_run(run) as store:
            rows = store.sql(
                "SELECT step, avg(value) AS loss FROM scalars WHERE name = 'val_loss' GROUP BY step"
            )
    except MoevizError:
        return {}
    return {int(row.step): float(row.loss) for row in rows.sort_values("step").itertuples()}


def failure(run: Path) -> str:
    """The last thing a run that failed said."""
    path = run / LOG_FILE
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].removeprefix("moeviz train: ") if lines else "it said nothing"


def slug(values: Mapping[str, str]) -> str:
    """A folder's name that tells the values: `learning-rate=1e-3,top-k=2`."""
    return ",".join(f"{name}={re.sub(r'[^A-Za-z0-9.+-]+', '-', value)}" for name, value in values.items())


def named(trials: Sequence[Trial]) -> dict[str, Trial]:
    """By name. Raises MoevizError where two have the same."""
    found: dict[str, Trial] = {}
    for trial in trials:
        if trial.name in found:
            raise MoevizError(f"two runs are named {trial.name}; leave one of their values out")
        found[trial.name] = trial
    return found
