"""Ends the docstring of a function with what the METRICS table says about the quantity that it computes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from moeviz.metrics.glossary import by_id

F = TypeVar("F", bound=Callable[..., Any])


def defines(*metric_ids: str) -> Callable[[F], F]:
    """Mark a function as the definition of metrics: their rows follow its own docstring.

    Raises:
        KeyError: an id that METRICS does not have.
    """
    rows = [by_id(metric_id) for metric_id in metric_ids]

    def explain(function: F) -> F:
        own = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = "\n\n".join([own, *(row.text for row in rows)]) + "\n"
        function.__dict__["metric_ids"] = metric_ids
        return function

    return explain
