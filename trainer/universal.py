"""ZeRO's divided state for another number of ranks: through DeepSpeed's universal checkpoints, made for the moment.

The conversion gathers every parameter's shares into one tensor each, beside the checkpoint, and is removed once all
ranks have read it. DeepSpeed would unpickle its files without care; here nothing in them is run.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from moeviz.errors import MoevizError

_SHARES = "*_optim_states.pt"


def ranks_of(folder: Path) -> int:
    """How many ranks wrote the divided state of a folder; 0 where it is not divided."""
    return len(list(folder.glob(_SHARES)))


def load_universal(engine: Any, folder: Path, tag: str, read: Callable[..., Any]) -> None:
    """Load what other ranks wrote into a DeepSpeed engine. Every rank must call it.

    Args:
        folder: where the state's folder `tag` is.
        read: loads a file without running code, as `torch.load(path, map_location=...)` would.

    Raises:
        MoevizError: the conversion failed; says why and what to do.
    """
    universal = f".{tag}-universal"
    with _reading_with(read):
        _on_the_first(lambda: _convert(folder / tag, folder / universal), folder)
        engine._config.load_universal_checkpoint = True
        try:
            engine.load_checkpoint(str(folder), tag=universal)
        finally:
            engine._config.load_universal_checkpoint = False
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(folder / universal, ignore_errors=True)


def _convert(divided: Path, universal: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(universal, ignore_errors=True)
    options = Namespace(
        input_folder=str(divided),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        ds_to_universal.main(options)


def _on_the_first(work: Callable[[], None], folder: Path) -> None:
    """Do it on the first rank while the others wait; what fails there is told by all."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            problem = [
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            ]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise MoevizError(
            f"{folder} could not be turned into a checkpoint for another number of ranks ({problem[0]}); "
            f"resume with as many as wrote it, --num-ranks {ranks_of(folder / 'deepspeed')}"
        )


@contextlib.contextmanager
def _reading_with(read: Callable[..., Any]) -> Iterator[None]:
    """Inside, whoever calls torch.load reads with `read`: DeepSpeed asks for unpickling by name."""
    original = torch.load

    def careful(path: Any, map_location: Any = None, **options: Any) -> Any:
        torch.load = original
        try:
            return read(path, map_location)
        finally:
            torch.load = careful  # type: ignore[assignment]

    torch.load = careful  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = original
