"""The table of domains: what each is, which layer it belongs to, and how to get its texts.

A domain's texts are an endless or a finite iterator; the builder stops at a quota of bytes, so walking a
large installation costs no more than the quota needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

from trainer.corpus import arithmetic, dialogue, installed, logs, parallel, standard_library, stories
from trainer.corpus.dice import Dice

Layer = Literal["generated", "standard library", "installed"]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One labelled kind of text."""

    name: str
    layer: Layer
    description: str
    texts: Callable[[int], Iterator[str]]
    """seed -> texts; a found domain ignores the seed."""


def _generated(name: str, description: str, write: Callable[[Dice], str]) -> Domain:
    def texts(seed: int) -> Iterator[str]:
        return (write(Dice(seed, name, index)) for index in count())

    return Domain(name=name, layer="generated", description=description, texts=texts)


def _parallel(language: parallel.Language) -> Domain:
    """One language of the parallel tales: all four draw document i with the same dice."""

    def texts(seed: int) -> Iterator[str]:
        return (parallel.write(Dice(seed, "parallel", index), language) for index in count())

    return Domain(name=language, layer="generated", description=f"short tales in {language}", texts=texts)


def _found(name: str, layer: Layer, description: str, find: Callable[[], Iterator[str]]) -> Domain:
    return Domain(name=name, layer=layer, description=description, texts=lambda seed: find())


DOMAINS: tuple[Domain, ...] = (
    _generated("arithmetic", "exercises with their workings", arithmetic.write),
    _generated("stories", "short stories in English", stories.write),
    _generated("dialogue", "conversations in English", dialogue.write),
    _generated("json", "structured logs of services", logs.write),
    *(_parallel(language) for language in parallel.LANGUAGES),
    _found("python", "standard library", "definitions of the standard library", standard_library.python_code),
    _found("manual", "standard library", "the language reference and docstrings", standard_library.manual),
    _found("unicode", "standard library", "characters and their names", standard_library.unicode_names),
    _found("cpp", "installed", "C++ headers that ship with torch", installed.cpp_headers),
    _found(
        "doctest", "installed", "sessions in docstrings of sympy, mpmath and networkx", installed.doctests
    ),
)
