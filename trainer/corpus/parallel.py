"""The same little tale in Spanish, French, German and Russian: equal meaning, four grammars.

A meaning is drawn once: who, what, where, and a row of sentence frames. Each language then says it with its own
articles, cases, genders, agreement, word order and elision, so that experts can be asked whether they follow the
language or what is being said. Document i of one language is the translation of document i of the others.

In a frame `{S:acc}` is a form of a word, `{S:^nom}` the form with a capital, `{S:?m/f/n}` what agrees with its gender.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from trainer.corpus import lexicon
from trainer.corpus.dice import Dice, capital
from trainer.corpus.frames import BEGINNINGS, FEW, FOLLOWUPS, MANY, MIDDLES, OLDER, Frame

Language = Literal["spanish", "french", "german", "russian"]
LANGUAGES: tuple[Language, ...] = ("spanish", "french", "german", "russian")

_AGREEMENT = re.compile(r"\?(.*)")
_GENDERS = {
    "el": 0, "la": 1, "le": 0, "der": 0, "die": 1, "das": 2, "m": 0, "f": 1, "n": 2,
}  # fmt: skip
_GERMAN_CASES = {"der": ("den", "dem", "ein"), "die": ("die", "der", "eine"), "das": ("das", "dem", "ein")}


@dataclass(frozen=True)
class Word:
    """A word with its forms; formatting it picks one."""

    forms: dict[str, str]
    gender: int = 0
    """0 masculine, 1 feminine, 2 neuter."""

    def __format__(self, spec: str) -> str:
        if spec.startswith("?"):
            options = spec[1:].split("/")
            return options[min(self.gender, len(options) - 1)]
        if spec.startswith("^"):
            return capital(self.forms[spec[1:]])
        return self.forms[spec]


def _spanish_noun(text: str) -> Word:
    article, noun, *plural = text.split()
    whole = f"{article} {noun}"
    of, to = (f"del {noun}", f"al {noun}") if article == "el" else (f"de {whole}", f"a {whole}")
    one = ("un " if article == "el" else "una ") + noun
    forms = {"nom": whole, "acc": whole, "gen": of, "dat": to, "one": one, "many": " ".join(plural)}
    return Word(forms, _GENDERS[article])


def _french_noun(text: str) -> Word:
    parts = text.split()
    gender = _GENDERS[parts.pop()] if parts[-1] in ("m", "f") else _GENDERS[parts[0]]
    if parts[0].startswith("l'"):
        whole, plural = parts[0], parts[1:]
        noun = whole[2:]
    else:
        noun, plural = parts[1], parts[2:]
        whole = f"{parts[0]} {noun}"
    of, to = (f"du {noun}", f"au {noun}") if parts[0] == "le" else (f"de {whole}", f"à {whole}")
    one = ("une " if gender else "un ") + noun
    return Word(
        {"nom": whole, "acc": whole, "gen": of, "dat": to, "one": one, "many": " ".join(plural)}, gender
    )


def _german_noun(text: str, *, plural: bool) -> Word:
    article, noun, *rest = text.split()
    acc, dat, one = _GERMAN_CASES[article]
    oblique = rest[0] if rest and not plural else noun
    forms = {
        "nom": f"{article} {noun}",
        "acc": f"{acc} {oblique}",
        "dat": f"{dat} {oblique}",
        "one": f"{one} {noun}",
    }
    return Word(forms | {"many": rest[0] if plural else ""}, _GENDERS[article])


def _russian_person(text: str) -> Word:
    nom, gen, dat, acc, ins, gender = text.split()
    soften = ins[0] in "сзшж" and ins[1] not in "аеёиоуыэюя"
    company = ("со " if soften else "с ") + ins
    return Word({"nom": nom, "gen": gen, "dat": dat, "acc": acc, "with": company}, _GENDERS[gender])


def _russian_thing(text: str) -> Word:
    nom, acc, gen, ins, many, gender = text.split()
    return Word({"nom": nom, "acc": acc, "gen": gen, "ins": ins, "few": gen, "many": many}, _GENDERS[gender])


def _place(text: str) -> Word:
    where, _, to = text.partition(", ")
    return Word({"in": where, "to": to or where})


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


def _people(table: str) -> list[tuple[Word, ...]]:
    return [
        (_spanish_noun(es), _french_noun(fr), _german_noun(de, plural=False), _russian_person(ru))
        for es, fr, de, ru in _rows(table)
    ]


def _things(table: str) -> list[tuple[Word, ...]]:
    return [
        (_spanish_noun(es), _french_noun(fr), _german_noun(de, plural=True), _russian_thing(ru))
        for es, fr, de, ru in _rows(table)
    ]


_PEOPLE, _THINGS, _FOODS = _people(lexicon.PEOPLE), _things(lexicon.THINGS), _things(lexicon.FOODS)
_PLACES = [tuple(map(_place, row)) for row in _rows(lexicon.PLACES)]
_TIMES, _LINKS = _rows(lexicon.TIMES), _rows(lexicon.LINKS)
_SCENERY, _ENDINGS, _NUMBERS = _rows(lexicon.SCENERY), _rows(lexicon.ENDINGS), _rows(lexicon.NUMBERS)
_OF_SUBJECT = {"V": _rows(lexicon.ACTS), "C": _rows(lexicon.COMPANY), "M": _rows(lexicon.MOODS)}
_OF_OBJECT = {"Q": _rows(lexicon.QUALITIES), "W": _rows(lexicon.WISHES), "R": _rows(lexicon.REASONS)}
_FEW_NUMBERS = 3
"""The first rows of the numbers: two, three, four."""


def write(dice: Dice, language: Language) -> str:
    """One tale of ten to seventeen sentences; equal dice give equal meanings in all languages."""
    paragraphs = _Tale(dice, LANGUAGES.index(language)).paragraphs()
    return "\n\n".join(" ".join(sentences) for sentences in paragraphs) + "\n"


class _Tale:
    """A cast, a few things and places, and what is said of them, in the language of one column of the tables."""

    def __init__(self, dice: Dice, column: int) -> None:
        self.dice, self.column = dice, column
        self.people = dice.several(_PEOPLE, dice.number(2, 3))
        self.things = dice.several(_THINGS, dice.number(2, 3))
        self.places = dice.several(_PLACES, 2)
        self.food = dice.pick(_FOODS)

    def paragraphs(self) -> tuple[list[str], ...]:
        dice, column = self.dice, self.column
        middles = dice.several(MIDDLES, dice.number(5, 9))
        half = len(middles) // 2
        scenery = [dice.pick(_SCENERY)[column]] if dice.chance(0.6) else []
        opening = self._said(dice.pick(BEGINNINGS), dice.pick(_TIMES), follow=0.5)
        cast = self._introduction()
        first = [sentence for frame in middles[:half] for sentence in self._said(frame)]
        turn = self._said(dice.pick(BEGINNINGS), dice.pick(_LINKS), follow=0.5)
        second = [sentence for frame in middles[half:] for sentence in self._said(frame)]
        return scenery + opening + cast, first, [*turn, *second, dice.pick(_ENDINGS)[column]]

    def _introduction(self) -> list[str]:
        if self.dice.chance(0.4):
            return self._said(OLDER)
        row = self.dice.below(len(_NUMBERS))
        return self._said(FEW if row < _FEW_NUMBERS else MANY, number=_NUMBERS[row])

    def _said(
        self,
        frame: Frame,
        when: list[str] | None = None,
        *,
        number: list[str] | None = None,
        follow: float = 0.0,
    ) -> list[str]:
        """A frame with its slots filled, sometimes with a second sentence about its subject."""
        dice, at = self.dice, self.column
        frames = (frame, dice.pick(FOLLOWUPS)) if dice.chance(follow) else (frame,)
        (s, s2), (o, o2) = dice.several(self.people, 2), dice.several(self.things, 2)
        words = {"S": s[at], "S2": s2[at], "O": o[at], "O2": o2[at], "F": self.food[at]}
        words["P"] = dice.pick(self.places)[at]
        texts = {name: _agreed(dice.pick(rows)[at], s[at]) for name, rows in _OF_SUBJECT.items()}
        texts |= {name: _agreed(dice.pick(rows)[at], o[at]) for name, rows in _OF_OBJECT.items()}
        texts |= {"T": when[at] if when else "", "N": _agreed(number[at], o[at]) if number else ""}
        return [template[at].format(**words, **texts) for template in frames]


def _agreed(phrase: str, word: Word) -> str:
    """`estaba ?contento/contenta` -> the form for the word's gender."""
    return _AGREEMENT.sub(lambda match: format(word, match[0]), phrase)
