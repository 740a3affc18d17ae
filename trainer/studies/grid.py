"""Which values a sweep tries: all combinations of `--vary NAME=VALUE,VALUE`, or some drawn at random."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product
from math import exp, log

from moeviz.errors import MoevizError
from trainer.studies.trials import Trial, slug

_RANGE = ".."
_TRIES = 200
"""Draws for each combination that is asked for."""


def parse_axes(vary: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`learning-rate=1e-3,3e-4` -> {"learning-rate": ("1e-3", "3e-4")}; a range `1e-4..1e-2` stays one value.

    Raises:
        MoevizError: no value, a name given twice, a range whose ends are not positive numbers in order.
    """
    axes: dict[str, tuple[str, ...]] = {}
    for given in vary:
        name, _, values = given.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        tried = tuple(value for value in values.split(",") if value)
        if not name or not tried:
            raise MoevizError(f"--vary {given} names no values; write --vary learning-rate=1e-3,3e-4")
        if name in axes or len(set(tried)) < len(tried):
            raise MoevizError(f"--vary {given} repeats a name or a value; give each once")
        for value in tried:
            if _RANGE in value:
                _ends(value, given)
        axes[name] = tried
    return axes


def grid(axes: Mapping[str, tuple[str, ...]]) -> list[dict[str, str]]:
    """Every combination, the last name varying fastest.

    Raises:
        MoevizError: a range, of which there is no "every".
    """
    for name, values in axes.items():
        if any(_RANGE in value for value in values):
            raise MoevizError(f"--vary {name} has a range, which only --random N draws from; list values")
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def draw(axes: Mapping[str, tuple[str, ...]], count: int, seed: int) -> list[dict[str, str]]:
    """`count` different combinations, or fewer where there are not as many.

    Listed values are drawn all alike, ranges evenly in the logarithm; a range of integers gives integers.

    The first of them are the same whatever `count` is, so a sweep can be made longer (Bergstra and Bengio 2012,
    https://jmlr.org/papers/v13/bergstra12a.html: few of the axes matter, and a grid repeats their values).
    """
    chance = random.Random(seed)
    found: list[dict[str, str]] = []
    for _ in range(
        _TRIES * count
    ):  # lists and ranges of integers may hold fewer combinations than were asked for
        values = {name: _drawn(chance.choice(tried), chance) for name, tried in axes.items()}
        if values not in found:
            found.append(values)
        if len(found) == count:
            break
    return found


def trials_of(combinations: Sequence[Mapping[str, str]], fixed: Sequence[str]) -> list[Trial]:
    """A trial for each combination, on top of flags that all have."""
    return [
        Trial(
            name=slug(values),
            words=(*fixed, *(word for name, value in values.items() for word in _words(name, value))),
            values=dict(values),
        )
        for values in combinations
    ]


def _words(name: str, value: str) -> tuple[str, ...]:
    """`--name value`; a switch is given or taken back."""
    switches = {"true": (f"--{name}",), "false": (f"--no-{name}",)}
    return switches.get(value.lower(), (f"--{name}", value))


def _drawn(value: str, chance: random.Random) -> str:
    if _RANGE not in value:
        return value
    low, high = _ends(value, value)
    drawn = exp(chance.uniform(log(low), log(high)))
    is_whole = all(end.isdecimal() for end in value.split(_RANGE))
    return str(round(drawn)) if is_whole else f"{drawn:.3g}"


def _ends(value: str, given: str) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in value.split(_RANGE))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 < low < high:
        raise MoevizError(f"--vary {given} is no range of positive numbers; write 1e-4..1e-2")
    return low, high
