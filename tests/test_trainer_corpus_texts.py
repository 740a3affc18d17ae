"""What the generated domains say is true, grammatical as far as a machine can tell, and varied."""

from __future__ import annotations

import itertools
import json
import re
from fractions import Fraction

import numpy as np
import pytest

from trainer.corpus import arithmetic, dialogue, logs, parallel, stories
from trainer.corpus.dice import Dice, dashed, with_article, words
from trainer.corpus.overlap import WINDOW_BYTES, fingerprints, near_copies
from trainer.data_sources import sections

NUMERIC = r"[\d(-][\d ()*+/^-]*"
EQUATION = re.compile(rf"(?:^|: |, |and )\s*({NUMERIC}) = ({NUMERIC})(?=$|[\s,.])", re.MULTILINE)


def value(expression: str) -> Fraction:
    """Exact value of a string of digits and + - * / ^ ( )."""
    assert re.fullmatch(r"[\d\s()*+/^-]+", expression), expression
    exact = re.sub(r"\d+", r"Fraction(\g<0>)", expression.strip()).replace("^Fraction(2)", "**2")
    return eval(exact, {"Fraction": Fraction})


def test_every_equation_in_the_arithmetic_domain_holds() -> None:
    checked = 0
    for index in range(300):
        for line in arithmetic.write(Dice(0, "arithmetic", index)).splitlines():
            for left, right in EQUATION.findall(line):
                assert value(left) == value(right), line
                checked += 1
    assert checked > 3000


def test_each_kind_of_exercise_is_written() -> None:
    sheets = "\n\n".join(arithmetic.write(Dice(0, "arithmetic", i)) for i in range(200))
    starts = {exercise.__name__: exercise(Dice(0, "x", 0)).split()[0] for exercise in arithmetic.EXERCISES}
    assert all(start in sheets for start in starts.values())


def test_solutions_of_equations_solve_them() -> None:
    for index in range(200):
        text = arithmetic.equation(Dice(1, "equation", index))
        a, letter, b, right = re.match(r"Solve (\d+)(\w) \+ (\d+) = (-?\d+)\.", text).groups()  # type: ignore[union-attr]
        x = re.search(rf"Divide by {a}: {letter} = (-?\d+)", text)[1]  # type: ignore[index]
        assert int(a) * int(x) + int(b) == int(right)


def test_log_lines_parse_and_their_clock_never_runs_back() -> None:
    for index in range(100):
        rows = [json.loads(line) for line in logs.write(Dice(0, "json", index)).splitlines()]
        assert [row["ts"] for row in rows] == sorted(row["ts"] for row in rows)
        assert len({(row["service"], row["region"], row["version"]) for row in rows}) == 1
        assert all(row["level"] in ("debug", "info", "warn", "error") and row["event"] for row in rows)


def test_every_request_in_the_logs_gets_its_response() -> None:
    for index in range(100):
        rows = [json.loads(line) for line in logs.write(Dice(0, "json", index)).splitlines()]
        asked = [row["trace"] for row in rows if row["event"] == "request"]
        assert asked == [row["trace"] for row in rows if row["event"] == "response"]


def test_speakers_take_turns_and_say_whole_sentences() -> None:
    for index in range(400):
        lines = dialogue.write(Dice(0, "dialogue", index)).splitlines()
        speakers = [line.partition(": ")[0] for line in lines]
        assert speakers == [speakers[0], speakers[1]] * (len(lines) // 2), lines
        assert speakers[0] != speakers[1]
        for line in lines:
            said = line.partition(": ")[2]
            assert re.fullmatch(r"[A-Z0-9].*[.!?]", said), line
            assert "  " not in said


def test_stories_are_whole_and_name_their_hero() -> None:
    for index in range(400):
        story = stories.write(Dice(0, "stories", index))
        paragraphs = story.rstrip("\n").split("\n\n")
        assert len(paragraphs) == 4
        for paragraph in paragraphs:
            assert re.fullmatch(r"[A-Z\"].*[.!?]\"?", paragraph, re.DOTALL), paragraph
            assert paragraph.count('"') % 2 == 0
            assert "  " not in paragraph


@pytest.mark.parametrize("write", [stories.write, dialogue.write, lambda d: parallel.write(d, "french")])
def test_no_template_mark_is_left_over(write) -> None:
    text = "".join(write(Dice(0, "text", index)) for index in range(400))
    assert not set("[]{}|_") & set(text)


ALPHABETS = {
    "spanish": "a-zñáéíóúü",
    "french": "a-zàâçéèêëîïôöùûüœ",
    "german": "a-zäöüß",
    "russian": "а-яё",
}


@pytest.mark.parametrize("language", parallel.LANGUAGES)
def test_a_language_uses_its_own_alphabet(language: parallel.Language) -> None:
    for index in range(200):
        text = parallel.write(Dice(0, "parallel", index), language)
        letters = set("".join(ch for ch in text.lower() if ch.isalpha()))
        assert re.fullmatch(f"[{ALPHABETS[language]}]+", "".join(sorted(letters))), letters


def test_the_four_languages_say_the_same_number_of_sentences() -> None:
    for index in range(200):
        texts = [parallel.write(Dice(0, "parallel", index), language) for language in parallel.LANGUAGES]
        shapes = {tuple(paragraph.count(".") for paragraph in text.split("\n\n")) for text in texts}
        assert len(shapes) == 1, texts


GERMAN_GENDER = {"die": "f", "der": "m", "den": "m", "das": "n", "dem": "mn", "ein": "mn", "eine": "f"}
GERMAN_DATIVE = {"der": "f", "dem": "mn"}


def test_german_articles_agree_with_an_independent_list_of_genders() -> None:
    genders = {
        "Schlüssel": "m",
        "Lampe": "f",
        "Buch": "n",
        "Brief": "m",
        "Messer": "n",
        "Tür": "f",
        "Tasse": "f",
    }
    text = " ".join(parallel.write(Dice(0, "parallel", index), "german") for index in range(400))
    for noun, gender in genders.items():
        for article, preposition in re.findall(
            rf"(?:(mit) )?\b(der|die|das|den|dem|ein|eine) {noun}\b", text
        ):
            article, preposition = preposition, article
            allowed = GERMAN_DATIVE if preposition else GERMAN_GENDER
            assert gender in allowed[article], (preposition, article, noun)


def test_spanish_and_french_contract_articles() -> None:
    spanish = " ".join(parallel.write(Dice(0, "parallel", index), "spanish") for index in range(300))
    french = " ".join(parallel.write(Dice(0, "parallel", index), "french") for index in range(300))
    assert not re.search(r"\b(a el|de el) ", spanish)
    assert not re.search(r"\b(à le|de le) ", french)
    assert not re.search(r"\b(le|la|que|ne) [aeiouéêœ]", french)


def test_russian_past_tense_agrees_with_the_person() -> None:
    text = " ".join(parallel.write(Dice(0, "parallel", index), "russian") for index in range(400))
    women = re.findall(
        r"\b(?:бабушка|соседка|тётя|подруга|повариха) (пош\w+|наш\w+|купил\w*|увидел\w*)", text.lower()
    )
    men = re.findall(
        r"\b(?:рыбак|дядя|дедушка|врач|студент) (пош\w+|наш\w+|купил\w*|увидел\w*)", text.lower()
    )
    assert len(women) > 5
    assert len(men) > 5
    assert all(verb.endswith("а") for verb in women)
    assert not any(verb.endswith("а") for verb in men)


@pytest.mark.parametrize(("write", "name"), [(stories.write, "stories"), (dialogue.write, "dialogue")])
def test_documents_are_varied(write, name: str) -> None:
    texts = [write(Dice(0, name, index)) for index in range(300)]
    assert len(set(texts)) == 300
    lines = [line for text in texts for line in re.split(r"(?<=[.!?]) ", text)]
    assert len(set(lines)) > 0.35 * len(lines)


def test_dice_are_fair() -> None:
    counts = np.bincount([Dice(0, "fair", index).below(8) for index in range(8000)], minlength=8)
    assert ((counts - 1000) ** 2 / 1000).sum() < 26.1  # chi-square, 7 degrees of freedom, p = 0.0005


def test_templates_resolve_inside_out() -> None:
    written = {Dice(0, "t", index).write("[a[b|c]|{x}]!", {"x": "d"}) for index in range(60)}
    assert written == {"ab!", "ac!", "d!"}
    with pytest.raises(KeyError):
        Dice(0, "t", 0).write("{missing}", {})


def test_several_draws_differ() -> None:
    drawn = [tuple(Dice(0, "s", index).several("abcd", 2)) for index in range(300)]
    assert set(drawn) == set(itertools.permutations("abcd", 2))


def test_word_lists_and_articles() -> None:
    assert words("a b") == ("a", "b")
    assert words("a b|c") == ("a b", "c")
    assert dashed("\n- one\n  more\n- two - three\n") == ("one more", "two - three")
    assert (with_article("apple"), with_article("pear")) == ("an apple", "a pear")


def brute_force_share(document: str, training: str) -> float:
    data, seen = document.encode(), training.encode()
    windows = [data[i : i + WINDOW_BYTES] for i in range(1, len(data) - WINDOW_BYTES + 1)]
    return sum(window in seen for window in windows) / len(windows)


def test_the_share_of_repeated_text_matches_a_search_by_hand() -> None:
    rng = np.random.default_rng(0)
    old, new = ("".join(map(chr, rng.integers(97, 123, size=n))) for n in (6000, 6000))
    for kept in (1000, 2000, 4000, 5000):
        document = old[500 : 500 + kept] + new[: 6000 - kept]
        share = brute_force_share(document, old)
        copied = near_copies({"d": fingerprints(document)}, [fingerprints("x" + old)])
        assert (copied == {"d"}) == (share > 0.5), (kept, share)


def test_a_passage_has_the_same_fingerprints_wherever_it_stands() -> None:
    passage = "".join(map(chr, np.random.default_rng(1).integers(97, 123, size=3000)))
    inside = fingerprints("a prefix of another length " + passage + " and an end")
    assert np.isin(fingerprints(passage), inside).all()


def test_fingerprints_of_a_long_text_do_not_depend_on_the_chunks() -> None:
    text = "".join(map(chr, np.random.default_rng(2).integers(97, 123, size=1 << 20)))
    whole = fingerprints(text + text[::-1])
    assert np.isin(fingerprints(text[-5000:] + text[::-1][:5000]), whole).all()


def test_short_documents_have_a_fingerprint_of_their_own() -> None:
    prints = [fingerprints(text) for text in ("Anna", "Annb", "x" * 96, "x" * 97, "x" * 130)]
    assert all(len(p) >= 1 for p in prints)
    assert near_copies({"a": prints[0]}, [prints[1]]) == set()
    assert near_copies({"a": prints[0]}, [prints[0]]) == {"a"}


def test_sections_lose_nothing_and_end_at_blank_lines() -> None:
    text = "".join(f"paragraph {i} " + "word " * 60 + "\n\n" for i in range(40))
    parts = list(sections(text.splitlines(keepends=True), limit=1000))
    assert len(parts) > 5
    assert "".join(part.replace("\n", "") for part in parts) == text.replace("\n", "")
    assert all(part.startswith("paragraph") for part in parts)


def test_sections_of_a_text_without_any_line_end_are_bounded() -> None:
    parts = list(sections(["x" * 10_000], limit=100))
    assert max(map(len, parts)) <= 401
    assert "".join(part.rstrip("\n") for part in parts) == "x" * 10_000


def test_marks_separate_documents() -> None:
    parts = list(sections(["one\n", "<|endoftext|>\n", "two<|eos|>three<|endoftext|>\n", "<|not a mark|>"]))
    assert parts == ["one\n", "two\n", "three\n", "<|not a mark|>\n"]
