"""Short stories: a hero, a small trouble, a way out, and a last line.

A story is one plot; a plot is a row of beats; a beat is a template whose alternatives nest, so that two stories
with the same plot share little more than its shape. The cast and the places are drawn once and stay the same to
the end.
"""

from __future__ import annotations

from trainer.corpus.dice import Dice, capital, dashed, with_article, words
from trainer.corpus.plots import PLOTS

_GIRLS = words(
    "Ada Mina Clara Ines Freya Nora Tilda Rosa Amira Leni Saskia Yuki Maren Olive Petra Zoe Hana Willa Edith"
)
_BOYS = words(
    "Tom Emil Jonah Kofi Ruben Milo Anton Idris Felix Oskar Pavel Noah Hugo Samir Theo Lars Ivo Casper Omar"
)
_TRAITS = words(
    "curious stubborn quiet cheerful careful dreamy brave impatient shy clever forgetful gentle restless"
)
_TRADES = words(
    "baker|ferryman|clockmaker|gardener|shepherd|teacher|carpenter|beekeeper|lighthouse keeper|postwoman|tailor|"
    "blacksmith|librarian|fisherman|potter|miller|piano tuner|bookbinder"
)
_ANIMALS = words(
    "fox|heron|hedgehog|goat|otter|crow|donkey|cat|dog|goose|hare|badger|owl|mouse|pony|tortoise|squirrel|magpie"
)
_PLACES = words(
    "the harbour|the old mill|the edge of the forest|the river|the market square|the hill behind the church|"
    "the lighthouse|the orchard|the railway bridge|the salt marsh|the quarry|the lake|the ruined tower|the valley"
)
_HOMES = words(
    "in a village by the sea|in a narrow house beside the canal|on a farm at the end of a long road|"
    "in a town of red roofs|in a cottage under three tall pines|in a flat above the bakery|"
    "on an island with one street|in a mountain village|on a houseboat on a slow river|"
    "in a lane of crooked houses|in a valley with two bridges"
)
_THINGS = words(
    "kite|silver whistle|wooden boat|lantern|blue umbrella|music box|brass key|red scarf|pocket watch|compass|"
    "drum|map|jar of buttons|violin|teapot|clay bird|spyglass|box of paints|pair of skates|notebook"
)
_FOODS = words(
    "plum cake|warm bread with honey|onion soup|a bag of cherries|apple dumplings|cheese and pears|lentil stew|"
    "cinnamon rolls|pancakes|roasted chestnuts|potato pie|fig jam on toast"
)
_INSTRUMENTS = words("music box|barrel organ|accordion|old clock|carillon|gramophone|cello|harp")
_WEATHERS = {
    "spring": "a warm wind blew from the south|rain drummed on every window|the first swallows had come back|"
    "the meadows stood under water|every hedge was full of birds",
    "summer": "the sky was as clear as glass|thunder grumbled behind the hills|the sun came up as red as a poppy|"
    "the heat shimmered over the road|the grass was white with daisies",
    "autumn": "the leaves were turning yellow|the fog lay so thick that the houses had no roofs|"
    "the wind rattled the shutters|rain drummed on every window|the geese flew south",
    "winter": "the first snow had fallen|the frost had drawn ferns on the panes|the river was frozen from bank to bank|"
    "icicles hung from every roof|it was so cold that the bells sounded thin",
}
_LESSONS = words(
    "what is shared does not get smaller|asking the way is quicker than being lost|a small light is enough to walk by|"
    "nobody is too old to learn a tune|the longest road begins at your own door|listening is a kind of help|"
    "a thing mended is a thing known|patience is not the same as waiting|courage often looks like a small step|"
    "a secret weighs less when two carry it"
)

_OPENINGS = (
    "There [once lived|lived once] {at_home} {a_trait} {child} [called|named] {hero}.",
    "{hero} lived {at_home}, [where everybody knew everybody|and thought it the best place in the world].",
    "[This is what happened|It happened] when {hero} was [eight|nine|ten|eleven] and lived {at_home}.",
    "Everyone {at_the_home} [knew|had heard of] {hero}, [a very {trait} {child}|who was {trait} and proud of it].",
    "[Do you know|Have you heard] the story of {hero}? [It begins {at_home}|{He} lived {at_home}, and was {trait}].",
)

_MORNINGS = (
    "One [morning|day] in {season}, when {weather}, ",
    "[Early one morning|One Saturday|The day after the fair], while {weather}, ",
    "[It was {season}, and|That morning] {weather}. After breakfast ",
)

_PLOTS = tuple(dashed(plot) for plot in PLOTS)

_ASIDES = (
    "[A bell rang somewhere|Far away a dog barked|A cart rattled past|Somebody was singing in the next street].",
    "The air smelled of [rain|smoke and apples|salt|cut grass|bread].",
    "[Nobody said anything for a while|For a moment it was very quiet|Neither of them spoke].",
    "[A leaf came down and settled|A door closed somewhere|A cat looked on and yawned].",
    "[It is strange how long a minute can be|That was the hardest part|It took longer than it takes to tell].",
)

_ENDINGS = (
    "[Since that day|From that {season} on], {hero} [has known|knew] that {lesson}.",
    '"[Well|You see]," said the {trade} [later|that evening], "{lesson}."',
    "[And if you go there today, you may still hear about it|And that was the end of it, or almost].",
    "{hero} [never forgot it|told the story for years], and always ended with the same words: {lesson}.",
    "[That night|Before sleeping], {he} wrote in {his} notebook: {Lesson}.",
)


def write(dice: Dice) -> str:
    """One story of nine to twelve sentences and more."""
    slots = _cast(dice)
    beats = [dice.write(beat, slots) for beat in dice.pick(_PLOTS)]
    for at, aside in zip((2, 4), dice.several(_ASIDES, dice.number(0, 2)), strict=False):
        beats[at] += " " + dice.write(aside, slots)
    opening = [dice.write(dice.pick(_OPENINGS), slots), dice.write(dice.pick(_MORNINGS), slots) + beats[0]]
    ending = [dice.write(dice.pick(_ENDINGS), slots)]
    paragraphs = (opening, beats[1:4], beats[4:], ending)
    return "\n\n".join(" ".join(map(capital, paragraph)) for paragraph in paragraphs) + "\n"


def _cast(dice: Dice) -> dict[str, str]:
    """Everything that stays the same in one story."""
    girl, girl_friend = dice.chance(0.5), dice.chance(0.5)
    hero = dice.pick(_GIRLS if girl else _BOYS)
    friend = dice.pick([name for name in (_GIRLS if girl_friend else _BOYS) if name != hero])
    he, his, him = ("she", "her", "her") if girl else ("he", "his", "him")
    home, season, lesson = dice.pick(_HOMES), dice.pick(tuple(_WEATHERS)), dice.pick(_LESSONS)
    trait, thing, animal = dice.pick(_TRAITS), dice.pick(_THINGS), dice.pick(_ANIMALS)
    instrument = dice.pick(_INSTRUMENTS)
    return {
        "hero": hero, "child": "girl" if girl else "boy", "he": he, "his": his, "him": him,
        "He": capital(he), "His": capital(his),
        "friend": friend, "friends": "her" if girl_friend else "his", "friend_he": "she" if girl_friend else "he",
        "at_home": home, "at_the_home": _definite(home), "trait": trait, "a_trait": with_article(trait),
        "thing": thing, "a_thing": with_article(thing), "animal": animal, "a_animal": with_article(animal),
        "instrument": instrument, "a_instrument": with_article(instrument), "trade": dice.pick(_TRADES),
        "place": dice.pick(_PLACES), "food": dice.pick(_FOODS), "season": season,
        "weather": dice.pick(words(_WEATHERS[season])), "lesson": lesson, "Lesson": capital(lesson),
    }  # fmt: skip


def _definite(place: str) -> str:
    """`in a town` -> `in the town`."""
    preposition, _, noun = place.split(" ", 2)
    return f"{preposition} the {noun}"
