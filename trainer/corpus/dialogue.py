"""Conversations: two people, one errand, a snag, and a goodbye.

A dialogue is one scene; a scene is a row of exchanges; an exchange is a line and its answer, chosen together,
so that every answer answers. Who speaks is written before each line, as in a play.
"""

from __future__ import annotations

from itertools import cycle

from trainer.corpus.dice import Dice, capital, dashed, words
from trainer.corpus.scenes import SCENES

_NAMES = words(
    "Anna Bela Carlos Dora Elif Frank Greta Hassan Ida Jakob Kira Leo Marta Nils Olga Paul Rita Sven "
    "Tara Viktor Wanda"
)
_DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_HOURS = words("half past eight|nine|ten|a quarter past eleven|noon|two|half past three|four|five|six")
_CITIES = words("Bergen|Lyon|Porto|Graz|Turin|Malmo|Ghent|Krakow|Leipzig|Galway|Basel|Riga")
_DISHES = words(
    "the mushroom risotto|the grilled trout|the pumpkin soup|the lamb stew|the spinach pie|the noodles "
    "with sesame|the potato dumplings|the bean salad|the vegetable curry|the onion tart"
)
_DRINKS = words("a glass of white wine|still water|a pot of tea|an apple juice|a small beer|a lemonade")
_DESSERTS = words("the chocolate cake|the pear sorbet|the rice pudding|the plum tart|the cheese plate")
_BOOKS = words(
    "a history of bridges|a book about bees|a novel set in Lisbon|a guide to knots|the letters of a sea "
    "captain|a cookbook for small kitchens|an atlas of islands|a mystery with a short last chapter"
)
_CLOTHES = words("jacket|coat|pair of boots|jumper|raincoat|pair of trousers|shirt|winter hat")
_COLORS = words("dark green|grey|navy blue|red|brown|black|mustard yellow")
_PAINS = words("my left knee|my back|a sore throat|my right shoulder|a headache|my wrist|an earache")
_DEVICES = words("laptop|printer|router|phone|washing machine|radio|heating|doorbell|coffee machine")
_SPOTS = words(
    "the station|the museum|the post office|the botanical garden|the theatre|the market hall|the old town hall"
)
_MARKS = words(
    "the fountain|the bakery|the traffic lights|the bridge|the church|the cinema|the pharmacy|the school"
)
_ITEMS = words("tomatoes|pears|eggs|potatoes|onions|apricots|mushrooms|carrots|walnuts|olives")
_HOBBIES = words(
    "the choir|swimming|the chess club|pottery|dancing|Italian lessons|yoga|the running club|drawing class"
)
_ROLES = words(
    "cook|bookkeeper|driver|translator|gardener|data engineer|nurse|carpenter|teacher|receptionist"
)

Exchange = tuple[tuple[str, ...], ...]
"""Variants: lines of the first and the second speaker in turn, or none."""


def _exchanges(script: str) -> tuple[tuple[str, ...], tuple[Exchange, ...]]:
    """A script of `scenes` -> its two speakers and its exchanges."""
    speakers, *blocks = script.strip().split("\n\n")
    exchanges = tuple(tuple(dashed(variant) for variant in block.split("\nor\n")) for block in blocks)
    return tuple(speakers.split(" and ")), exchanges


_SCENES = tuple(_exchanges(script) for script in SCENES)


def write(dice: Dice) -> str:
    """One scene of five to seven exchanges."""
    speakers, exchanges = dice.pick(_SCENES)
    slots = _slots(dice)
    lines = []
    for exchange in exchanges:
        for speaker, line in zip(cycle(speakers), dice.pick(exchange), strict=False):
            lines.append(dice.write(f"{speaker}: {line}", slots))
    return "\n".join(lines) + "\n"


def _slots(dice: Dice) -> dict[str, str]:
    """Names, days, things and numbers of one conversation; a name ending in 2 differs from the one without."""
    a, b, c, d = dice.several(_NAMES, 4)
    slots = {"a": a, "b": b, "c": c, "d": d, "side": dice.pick(("left", "right"))}
    pairs = {
        "dish": _DISHES, "mark": _MARKS, "city": _CITIES, "item": _ITEMS, "book": _BOOKS, "color": _COLORS,
        "role": _ROLES, "day": _DAYS, "hour": _HOURS,
    }  # fmt: skip
    for name, options in pairs.items():
        slots[name], slots[name + "2"] = dice.several(options, 2)
    singles = {
        "drink": _DRINKS, "dessert": _DESSERTS, "cloth": _CLOTHES, "pain": _PAINS, "device": _DEVICES,
        "spot": _SPOTS, "hobby": _HOBBIES,
    }  # fmt: skip
    slots |= {name: dice.pick(options) for name, options in singles.items()}
    price = dice.number(15, 59)
    numbers = {
        "k": dice.number(3, 9), "minutes": 5 * dice.number(2, 9), "pages": dice.number(140, 620),
        "price": price, "price2": price + dice.number(8, 40), "code": f"{dice.number(100, 999)}-{dice.number(10, 99)}",
    }  # fmt: skip
    slots |= {name: str(number) for name, number in numbers.items()}
    capitals = ("drink", "dish", "dish2", "mark", "city", "day", "day2")
    return slots | {capital(name): capital(slots[name]) for name in capitals}
