"""`moeviz train`: a preset, any of its values changed by a flag, and the run begins (or goes on).

The flags are the fields of `trainer.config.TrainConfig`, under their own names. What a flag means is written
there; here is only what a command line adds: presets as defaults, other spellings, a summary at the end.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moeviz.errors import MoevizError, require

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.train import TrainResult

ALIASES = {
    "--n-layers": "--num-layers",
    "--n-heads": "--num-heads",
    "--n-kv-heads": "--num-kv-heads",
    "--n-experts": "--num-experts",
    "--experts": "--num-experts",
    "--steps": "--max-steps",
    "--lr": "--learning-rate",
    "--grad-accum": "--gradient-accumulation-steps",
    "--block-size": "--seq-len",
    "--data": "--train-data",
    "--out": "--run",
    "--deepspeed": "--deepspeed-config",
}
"""Spellings of other trainers, by what they are called here."""

LISTS = (
    "--train-data",
    "--mixture",
    "--on-alert",
    "--freeze",
    "--train-only",
    "--alert-thresholds",
    "--prune-experts",
)
"""Flags that take several values, and may be given several times."""

_DESCRIPTION = """Train a Mixture-of-Experts language model.

    moeviz train --preset demo --log-routing       the tour: two minutes on a laptop, then `moeviz tui`
    moeviz train --preset olmoe-tiny --train-data my-texts/ --max-steps 5000
    moeviz train --train-data shards/web code=repos/ --mixture web=0.7 code=0.3
    moeviz train --resume runs/mine                 go on after a stop, bit for bit
    moeviz train --num-ranks 2 --run runs/mine      two processes, or GPUs; torchrun and deepspeed do as well
    moeviz train --init-from CHECKPOINT --train-data mine/ --train-only router      ours, or a folder of transformers
"""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0; 1 when an alert stopped it, 130 when a person did, both after a checkpoint."""
    # Before torch loads: threads that wait for each other by spinning lose 5 to 8 times their speed as soon as
    # anything else (a dashboard, say) wants one of their cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    require("torch", "train", "training")
    config = parse(argv)
    from trainer.launch import end_with_launcher, is_launched

    if (config.engine.num_ranks or 1) > 1 and not is_launched():
        return _launch(argv, config)
    end_with_launcher()
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    from rich.console import Console

    from trainer.launch_status import LOST_STATUS
    from trainer.process_group import LostRankError, leave_ranks
    from trainer.progress import Silent, open_progress
    from trainer.train import train

    is_first = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not is_first)
    try:
        result = train(config, progress=open_progress(console, config.log_every) if is_first else Silent())
    except LostRankError as error:
        _warn(str(error))
        return LOST_STATUS
    leave_ranks()
    if not is_first:
        return 0
    print(summary(result, config.log_routing), flush=True)
    return 130 if result.interrupted else 1 if result.stopped_by else 0


def _launch(argv: list[str], config: TrainConfig) -> int:
    """The same command in as many processes as it asks for."""
    from trainer.launch import launch
    from trainer.resume import default_folder

    if config.resume is not None:
        run, words = Path(config.resume).resolve().parent.parent, argv
    else:
        run = config.run or default_folder(config.preset)
        words = argv if config.run is not None else [*argv, "--run", str(run)]
    return launch(words, ranks=config.engine.num_ranks or 1, run=run, tell=_warn)


def parse(argv: list[str]) -> TrainConfig:
    """Flags -> config. Wrong usage ends the process with status 2, as every flag parser does.

    Raises:
        MoevizError: an unknown preset, or nothing to resume.
    """
    import tyro

    from trainer.config import TrainConfig

    argv = _gathered(_with_resume_value(_spelled_out(argv)))
    if _value(argv, "--deepspeed-config") is not None and _value(argv, "--engine") is None:
        argv = [*argv, "--engine", "deepspeed"]
    defaults = _defaults(argv)
    config = tyro.cli(
        TrainConfig,
        default=defaults,
        args=argv,
        prog="moeviz train",
        description=_DESCRIPTION,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return replace(config, resume=defaults.resume)


def _defaults(argv: list[str]) -> TrainConfig:
    """What the flags change: the config of the checkpoint that is resumed, or a preset."""
    from trainer.presets import train_preset

    resume, preset = _value(argv, "--resume"), _value(argv, "--preset")
    origin = _value(argv, "--init-from")
    if resume in (None, "None") and origin not in (None, "None"):
        return _fine_tuning(origin, preset)
    if resume in (None, "None") or "-h" in argv or "--help" in argv:
        return train_preset(preset or "demo")
    if origin not in (None, "None"):
        raise MoevizError(
            f"--init-from {origin} with --resume: a resumed run has its weights; leave one of them out"
        )
    if preset is not None:
        raise MoevizError(
            f"--preset {preset} with --resume: a resumed run keeps its values; leave --preset out"
        )
    from trainer.launch import is_launched
    from trainer.resume import find_checkpoint

    run = _value(argv, "--run")
    found = find_checkpoint(resume, Path(run) if run else None, note=_warn)
    ranks = found.num_ranks if found.num_ranks > 1 and not is_launched() else None
    engine = replace(found.config.engine, num_ranks=ranks)
    return replace(found.config, resume=str(found.path), run=None, engine=engine)


def _fine_tuning(init_from: str, preset: str | None) -> TrainConfig:
    from trainer.origin import find_origin, fine_tuning
    from trainer.presets import of_model, train_preset

    origin = find_origin(init_from)
    if preset is None and origin.train_config is None:
        return fine_tuning(origin, of_model("fine-tune", origin.model_config))
    return fine_tuning(origin, train_preset(preset) if preset else None)


def _warn(text: str) -> None:
    print(f"moeviz train: {text}", file=sys.stderr)


def _spelled_out(argv: list[str]) -> list[str]:
    """`--lr=1e-3` -> `--learning-rate=1e-3`, and underscores in names -> dashes."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
            word = ALIASES.get(name, name) + equals + value
        words.append(word)
    return words


def _with_resume_value(argv: list[str]) -> list[str]:
    """A bare `--resume` means the latest checkpoint."""
    from trainer.resume import LATEST

    words = []
    for index, word in enumerate(argv):
        words.append(word)
        if word == "--resume" and (index + 1 == len(argv) or argv[index + 1].startswith("--")):
            words.append(LATEST)
    return words


def _gathered(argv: list[str]) -> list[str]:
    """A flag for a list, given several times, means all of its values."""
    words: list[str] = []
    values: dict[str, list[str]] = {}
    into: list[str] | None = None
    for word in argv:
        name, equals, value = word.partition("=")
        if name in LISTS:
            into = values.setdefault(name, [])
            into += [value] if equals else []
        elif into is None or word.startswith("--"):
            into = None
            words.append(word)
        else:
            into.append(word)
    return words + [word for name, given in values.items() for word in (name, *given)]


def _value(argv: list[str], flag: str) -> str | None:
    """The value a flag is given; the last one counts."""
    value = None
    for index, word in enumerate(argv):
        if word == flag and index + 1 < len(argv):
            value = argv[index + 1]
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def summary(result: TrainResult, log_routing: bool) -> str:
    """What happened and what to do next, for people."""
    lines = []
    if len(result.evaluations) > 1:
        lines += _table(result)
    state = "interrupted" if result.interrupted else "stopped" if result.stopped_by else "done"
    lines.append(f"{state}: {result.steps_done} steps in {result.run} ({result.seconds:.0f} s)")
    if result.checkpoint is not None:
        lines.append(f'  moeviz inspect {result.checkpoint} --text "..."')
    if log_routing:
        lines.append(f"  moeviz tui {result.run}        moeviz dash {result.run}")
    if result.interrupted or result.stopped_by:
        lines.append(f"  moeviz train --resume {result.run}")
    return "\n".join(lines)


def _table(result: TrainResult) -> list[str]:
    """Held-out loss by domain, first and last evaluation."""
    first, last = result.evaluations[min(result.evaluations)], result.evaluations[max(result.evaluations)]
    width = max(len(domain) for domain in last)
    lines = [f"{'validation':<{width}}  {'first':>7}  {'last':>7}  bits/byte"]
    for domain, loss in last.items():
        lines.append(
            f"{domain:<{width}}  {first[domain].loss_nats:7.3f}  {loss.loss_nats:7.3f}"
            f"  {loss.bits_per_byte:9.3f}"
        )
    return lines
