"""Finding what to continue, and refusing to continue something else.

A run continues bit for bit only if the model, the data and the engine are those of the checkpoint; its
length, rates, balancing and what is recorded may change, because they act from the next step on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from moeviz.errors import MoevizError, RunNotFoundError
from trainer.checkpoint import Checkpoint, read_checkpoint
from trainer.checkpoint_folder import MANIFEST_FILE, list_checkpoints
from trainer.config import TrainConfig

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_FIXED = (
    "model",
    "data",
    "engine.engine",
    "engine.zero_stage",
    "engine.expert_parallel",
    "engine.expert_gate",
    "engine.dtype",
    "optim.optimizer",
    "freeze",
    "train_only",
    "seed",
)
_PER_RANK = ("batch_size", "gradient_accumulation_steps")
"""How the sequences of a step are divided."""


def find_checkpoint(
    resume: str, run: Path | None, runs: Path = Path("runs"), note: Callable[[str], None] = lambda text: None
) -> Checkpoint:
    """The checkpoint that `--resume` means, checked to be whole.

    Args:
        resume: a run folder, a checkpoint folder (`RUN/checkpoints/best` where it is kept), or `latest`.
        run: what `latest` refers to; None: the run in `runs` whose checkpoint is newest.
        runs: folder of runs.
        note: told when a damaged checkpoint is passed over.

    Raises:
        RunNotFoundError: nothing there. MoevizError: no checkpoint in it, or none that is whole; a checkpoint
            that was named is never replaced.
    """
    path = (run or _newest_run(runs)) if resume == LATEST else Path(resume)
    if not path.is_dir():
        raise RunNotFoundError(f"no run at {path}; `moeviz runs FOLDER` lists runs")
    if (path / MANIFEST_FILE).exists() or path.parent.name == CHECKPOINTS:
        return read_checkpoint(path.resolve() if path.is_symlink() else path)
    return _newest_whole(path.parent if path.name == CHECKPOINTS else path, note)


def default_folder(preset: str) -> Path:
    """Where a run goes that was given no folder."""
    return Path("runs") / f"{preset}-{datetime.now():%Y%m%d-%H%M%S}"


def run_of(found: Checkpoint) -> Path:
    """The run folder that a checkpoint belongs to."""
    return found.path.resolve().parent.parent


def on_ranks(found: Checkpoint, config: TrainConfig, ranks: int) -> TrainConfig:
    """The config whose steps hold as many sequences on `ranks` ranks as they did on those that wrote the checkpoint.

    Micro-batches stay as large as they were where that divides a rank's share; what a step reads is the same.

    Raises:
        MoevizError: the sequences of a step cannot be shared evenly, or the config's sizes make other steps.
    """
    then, now = found.config.data, config.data
    parts = ranks // config.engine.pipeline_stages
    if parts == found.num_replicas:
        return config
    if found.config.engine.has_deepspeed_experts:
        raise MoevizError(
            f"{found.path} is of {found.num_ranks} ranks with DeepSpeed's experts, whose state it divides for no "
            f"others; go on with --num-ranks {found.num_ranks}, or begin anew from its weights with --init-from"
        )
    whole = then.sequences_per_step * found.num_replicas
    if whole % parts:
        raise MoevizError(
            f"a step of {found.path} has {whole} sequences, which {parts} ranks cannot share evenly; "
            "use as many ranks as divide it"
        )
    share = whole // parts
    if any(getattr(now, name) != getattr(then, name) for name in _PER_RANK):
        if now.sequences_per_step != share:
            raise MoevizError(
                f"batch_size={now.batch_size} x gradient_accumulation_steps={now.gradient_accumulation_steps} on "
                f"{ranks} ranks makes other steps than the {whole} sequences of {found.path}; leave both out"
            )
        return config
    size = max(size for size in range(1, min(then.batch_size, share) + 1) if share % size == 0)
    return replace(config, data=replace(now, batch_size=size, gradient_accumulation_steps=share // size))


def check_resumable(found: Checkpoint, config: TrainConfig, ranks: int | None = None) -> None:
    """Refuse a config that changes what a checkpoint is made of.

    Args:
        ranks: processes that go on, None for as many as before; another number divides the same steps otherwise.

    Raises:
        MoevizError: names the first field that differs.
    """
    then, now = _flat(asdict(found.config)), _flat(asdict(config))
    alike = ranks is None or ranks // config.engine.pipeline_stages == found.num_replicas
    for name, value in now.items():
        fixed = name.split(".")[0] in _FIXED or name in _FIXED
        if not alike and name.removeprefix("data.") in _PER_RANK:
            continue
        if fixed and value != then[name]:
            raise MoevizError(
                f"{name}={value} differs from {then[name]} in {found.path}; "
                "leave it out to resume, or start a new run with it"
            )
    if found.step >= config.max_steps:
        raise MoevizError(
            f"max_steps={config.max_steps}, and {found.path} has {found.step} steps done; "
            "raise --max-steps to go on"
        )


def _newest_run(runs: Path) -> Path:
    folders = [path for path in runs.glob(f"*/{CHECKPOINTS}") if list_checkpoints(path)]
    if not folders:
        raise RunNotFoundError(f"no run with a checkpoint in {runs}; name one: --resume RUN")
    return max(folders, key=lambda path: list_checkpoints(path)[-1].stat().st_mtime).parent


def _newest_whole(run: Path, note: Callable[[str], None]) -> Checkpoint:
    problem: MoevizError | None = None
    for path in reversed(list_checkpoints(run / CHECKPOINTS)):
        try:
            found = read_checkpoint(path)
        except MoevizError as error:
            problem = problem or error
            continue
        if problem is not None:
            note(f"{problem}. Continuing from {path}")
        return found
    raise problem or MoevizError(f"run {run} has no checkpoint; train it anew under another name")


def _flat(data: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
