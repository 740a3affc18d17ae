"""Randomness that gives the same text on every machine and every Python.

The standard library promises a stable sequence for `random.Random(int).random()` alone; `choice`, `sample`
and `shuffle` may change between versions, so everything here is made from `random()` and integer arithmetic.
Templates are the second half: `[a|b]` picks one alternative, `{name}` inserts a slot.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_DASH = re.compile(r"^- ", re.MULTILINE)
_SLOT = re.compile(r"\{(\w+)\}")


class Dice:
    """A seeded source of choices for one document: `Dice(seed, "stories", 17)`."""

    def __init__(self, seed: int, name: str, index: int) -> None:
        self._random = random.Random((seed << 64) | (zlib.crc32(name.encode()) << 32) | index).random

    def below(self, n: int) -> int:
        """An integer 0 to n-1."""
        return int(self._random() * n)

    def number(self, low: int, high: int) -> int:
        """An integer low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def several(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in random order (all of them when there are fewer)."""
        pool = list(options)
        for i in range(min(count, len(pool))):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def write(self, template: str, slots: Mapping[str, str] | None = None) -> str:
        """Resolve every `[a|b|c]`, innermost first, then every `{slot}`.

        Raises:
            KeyError: the template names a slot that was not given.
        """
        replaced = 1
        while replaced:
            template, replaced = _ALTERNATIVES.subn(self._alternative, template)
        if slots is None:
            return template
        return _SLOT.sub(lambda match: slots[match[1]], template)

    def _alternative(self, match: re.Match[str]) -> str:
        return self.pick(match[1].split("|"))


def words(text: str) -> tuple[str, ...]:
    """A list written as one string: cut at `|` where there is one, else at blanks."""
    return tuple(text.split("|") if "|" in text else text.split())


def dashed(text: str) -> tuple[str, ...]:
    """The items of a list that is written with a dash before each and may run over several lines."""
    items = _DASH.split(text)[1:]
    return tuple(" ".join(item.split()) for item in items)


def capital(text: str) -> str:
    """First letter upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """`apple` -> `an apple`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun
