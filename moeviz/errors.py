"""Errors that a person can act on: each message gives the value, the rule and the remedy.

`MoevizError` is what the command line turns into one line and a non-zero exit status; everything else is a bug
and keeps its traceback. It is also a `ValueError`, because nearly all of them are about a value that a user gave.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class MoevizError(ValueError):
    """A user's value, file or environment is at fault; the message says which, why and what to do."""


class RunNotFoundError(MoevizError):
    """No run folder where one was named."""


class CorruptRunError(MoevizError):
    """A run folder exists but what it needs to be opened is missing or unreadable."""


class MissingExtraError(MoevizError, ImportError):
    """An optional package is needed and not installed; the message names the extra to install."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or raise a `MissingExtraError` that says what to install.

    Args:
        module: dotted name of the optional module, for example ``"streamlit"``.
        extra: the extra of the moeviz distribution that brings it, for example ``"dash"``.
        purpose: who needs it, as the subject of the sentence: ``"the dashboard"``.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != top:
            raise
        raise MissingExtraError(f'{purpose} needs {top}; run: pip install "moeviz[{extra}]"') from error
