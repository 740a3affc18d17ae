"""Exercises with their workings: every line that states an equation is true, and a test evaluates them all.

Each function below writes one exercise; a document is a sheet of three to six of them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from trainer.corpus.dice import Dice, capital, words

Exercise = Callable[[Dice], str]

_NAMES = words("Mara Tom Priya Jonas Lin Ada Omar Ines Felix Ruth Kofi Elsa Noor Ivan")
_GOODS = words(
    "pencils notebooks apples tickets lamps loaves tiles candles postcards bulbs marbles maps buckets"
)
_BARGAINS = words("coat bicycle desk radio tent kettle clock carpet guitar ladder telescope")
_PLACES = words("the harbour|the mill|Northfield|the old bridge|the library|Easton|the lake|Harrow Hill")


def column_addition(dice: Dice) -> str:
    a, b = dice.number(124, 9875), dice.number(118, 9784)
    lines, carry, x, y = [f"Add {a} and {b}."], 0, a, b
    for place in ("ones", "tens", "hundreds", "thousands"):
        if not x and not y:
            break
        terms = f"{x % 10} + {y % 10}" + (f" + {carry}" if carry else "")
        total = x % 10 + y % 10 + carry
        carry = total // 10
        lines.append(
            f"  {place}: {terms} = {total}" + (f", write {total % 10}, carry {carry}" if carry else "")
        )
        x, y = x // 10, y // 10
    return "\n".join([*lines, f"{a} + {b} = {a + b}"])


def subtraction(dice: Dice) -> str:
    b = dice.number(106, 4980)
    a = b + dice.number(35, 4985)
    up = -(-b // 100) * 100
    task, answer = f"{dice.pick(('Work out', 'Find', 'Compute'))} {a} - {b}", f"{a} - {b} = {a - b}"
    if up == b or up > a:
        return f"{task}.\n{answer}\nCheck: {b} + {a - b} = {a}"
    return (
        f"{task} by counting up.\n"
        f"  from {b} to {up}: {up} - {b} = {up - b}\n  from {up} to {a}: {a} - {up} = {a - up}\n"
        f"  together: {up - b} + {a - up} = {a - b}\n{answer}"
    )


def multiplication(dice: Dice) -> str:
    a, b = dice.number(12, 398), dice.number(12, 98)
    tens, ones = b // 10 * 10, b % 10
    if not ones:
        return f"Multiply {a} by {b}.\n  {a} * {b // 10} = {a * b // 10}, then a zero.\n{a} * {b} = {a * b}"
    return (
        f"Multiply {a} by {b}.\n  {a} * {tens} = {a * tens}\n  {a} * {ones} = {a * ones}\n"
        f"  {a * tens} + {a * ones} = {a * b}\n{a} * {b} = {a * b}"
    )


def division(dice: Dice) -> str:
    divisor, dividend = dice.number(3, 24), dice.number(210, 9800)
    lines, rest, quotient = [f"Divide {dividend} by {divisor}."], 0, ""
    for digit in str(dividend):
        part = rest * 10 + int(digit)
        q, rest = part // divisor, part % divisor
        if quotient or q:
            quotient += str(q)
            lines.append(f"  {part} holds {divisor} {_times(q)}: {part} - {q * divisor} = {rest}")
    end = f"remainder {rest}" if rest else "no remainder"
    lines.append(f"{dividend} = {divisor} * {quotient} + {rest}, so the answer is {quotient}, {end}.")
    return "\n".join(lines)


def _times(n: int) -> str:
    return {0: "no times", 1: "once", 2: "twice"}.get(n, f"{n} times")


def fractions(dice: Dice) -> str:
    b, d = dice.several((2, 3, 4, 5, 6, 7, 8, 9, 10, 12), 2)
    a, c = dice.number(1, b - 1), dice.number(1, d - 1)
    common = b * d // gcd(b, d)
    p, q = a * common // b, c * common // d
    divisor = gcd(p + q, common)
    lines = [
        f"Add {a}/{b} and {c}/{d}.",
        f"  The smallest common denominator of {b} and {d} is {common}.",
        f"  {a}/{b} = {p}/{common} and {c}/{d} = {q}/{common}",
        f"  {p}/{common} + {q}/{common} = {p + q}/{common}",
    ]
    if divisor > 1:
        lines.append(
            f"  Divide both by {divisor}: {p + q}/{common} = {(p + q) // divisor}/{common // divisor}"
        )
    return "\n".join(lines)


def percentage(dice: Dice) -> str:
    percent, price = dice.pick((5, 10, 15, 20, 25, 30, 40, 60)), dice.number(3, 48) * 20
    name, off = dice.pick(_NAMES), price * percent // 100
    return (
        f"A {dice.pick(_BARGAINS)} costs {price} euros. {name} gets {percent}% off. What does {name} pay?\n"
        f"  1% of {price} is {price // 100}.{price % 100:02d}, so {percent}% is {off}.\n"
        f"  {price} - {off} = {price - off}\n{name} pays {price - off} euros."
    )


def equation(dice: Dice) -> str:
    a, x, b = dice.number(2, 12), dice.number(-9, 15), dice.number(1, 30)
    right = a * x + b
    letter = dice.pick("xyznt")
    return (
        f"Solve {a}{letter} + {b} = {right}.\n  Subtract {b} on both sides: {a}{letter} = {right - b}\n"
        f"  Divide by {a}: {letter} = {x}\nCheck: {a} * {_signed(x)} + {b} = {right}"
    )


def _signed(n: int) -> str:
    return f"({n})" if n < 0 else str(n)


def common_divisor(dice: Dice) -> str:
    g = dice.number(2, 18)
    a, b = g * dice.number(4, 40), g * dice.number(3, 29)
    a, b = max(a, b) + (g if a == b else 0), min(a, b)
    lines, x, y = [f"Find the greatest common divisor of {a} and {b}."], a, b
    while y:
        lines.append(f"  {x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return "\n".join([*lines, f"So gcd({a}, {b}) is {x}."])


def factors(dice: Dice) -> str:
    n = dice.number(30, 990)
    lines, rest, primes, p = [f"Write {n} as a product of primes."], n, [], 2
    while p * p <= rest:
        while rest % p == 0:
            lines.append(f"  {rest} / {p} = {rest // p}")
            primes.append(p)
            rest //= p
        p += 1
    if not primes:
        return f"{lines[0]}\n  No prime up to its square root divides it: {n} is prime."
    primes += [rest] if rest > 1 else []
    return "\n".join([*lines, f"{n} = {' * '.join(map(str, primes))}"])


def sequence(dice: Dice) -> str:
    if dice.chance(0.5):
        start, step = dice.number(-5, 40), dice.number(2, 13)
        terms = [start + step * i for i in range(7)]
        rule, last = f"{step} more than", f"{terms[4]} + {step} = {terms[5]}"
    else:
        start, step = dice.number(1, 7), dice.number(2, 4)
        terms = [start * step**i for i in range(7)]
        rule, last = f"{step} times", f"{terms[4]} * {step} = {terms[5]}"
    shown = ", ".join(map(str, terms[:5]))
    return (
        f"What comes next: {shown}, ...?\n  Each term is {rule} the one before.\n  {last}\n"
        f"The next two terms are {terms[5]} and {terms[6]}."
    )


def shopping(dice: Dice) -> str:
    name, (first, second) = dice.pick(_NAMES), dice.several(_GOODS, 2)
    n, p, m, q = dice.number(2, 9), dice.number(2, 14), dice.number(2, 9), dice.number(2, 14)
    total = n * p + m * q
    note = next(n for n in (20, 50, 100, 200, 300) if n > total)
    return (
        f"{name} buys {n} {first} at {p} euros each and {m} {second} at {q} euros each, "
        f"and pays with {note} euros.\n"
        f"  {first}: {n} * {p} = {n * p}\n  {second}: {m} * {q} = {m * q}\n  {n * p} + {m * q} = {total}\n"
        f"  change: {note} - {total} = {note - total}\n{name} gets {note - total} euros back."
    )


def journey(dice: Dice) -> str:
    a, b = dice.several(_PLACES, 2)
    speed, hours, minutes = dice.number(3, 24) * 4, dice.number(1, 5), dice.pick((0, 15, 30, 45))
    extra = speed * minutes // 60
    duration = f"{hours} h" + (f" {minutes} min" if minutes else "")
    vehicle = dice.pick(("bus", "boat", "train", "van", "tram"))
    lines = [
        f"A {vehicle} needs {duration} from {a} to {b} at {speed} km an hour. How far is it?",
        f"  {hours} h: {hours} * {speed} = {hours * speed}",
    ]
    if minutes:
        lines.append(f"  {minutes} min: {speed} * {minutes} / 60 = {extra}")
        lines.append(f"  {hours * speed} + {extra} = {hours * speed + extra}")
    return "\n".join([*lines, f"{capital(b)} is {hours * speed + extra} km away."])


def mean(dice: Dice) -> str:
    count, middle = dice.number(4, 7), dice.number(12, 60)
    values = [middle + dice.number(-9, 9) for _ in range(count - 1)]
    values.append(middle * count - sum(values))
    shown, total = ", ".join(map(str, values)), sum(values)
    return (
        f"Find the mean of {shown}.\n  {' + '.join(map(_signed, values))} = {total}\n"
        f"  {total} / {count} = {middle}\nThe mean is {middle}."
    )


def square(dice: Dice) -> str:
    a, b = dice.number(11, 60), dice.number(1, 9)
    return (
        f"Compute {a + b} squared from {a} squared.\n  ({a} + {b})^2 = {a}^2 + 2 * {a} * {b} + {b}^2\n"
        f"  {a}^2 = {a * a}, 2 * {a} * {b} = {2 * a * b}, {b}^2 = {b * b}\n"
        f"  {a * a} + {2 * a * b} + {b * b} = {(a + b) ** 2}\n{a + b}^2 = {(a + b) ** 2}"
    )


def quadratic(dice: Dice) -> str:
    p, q = dice.number(1, 12), dice.number(1, 12)
    return (
        f"Solve x^2 - {p + q}x + {p * q} = 0.\n"
        f"  Two numbers with sum {p + q} and product {p * q}: {p} + {q} = {p + q}, {p} * {q} = {p * q}\n"
        f"  (x - {p})(x - {q}) = 0\n"
        + (f"x = {p}, a double root." if p == q else f"x = {min(p, q)} or x = {max(p, q)}")
    )


def rectangle(dice: Dice) -> str:
    what = dice.pick(("garden", "field", "room", "courtyard", "sheet of paper", "pond", "wall"))
    w, h, unit = dice.number(3, 40), dice.number(3, 40), dice.pick(("m", "cm"))
    return (
        f"A {what} is {w} {unit} long and {h} {unit} wide. Find its area and its perimeter.\n"
        f"  area: {w} * {h} = {w * h}\n  perimeter: 2 * ({w} + {h}) = {2 * (w + h)}\n"
        f"The area is {w * h} square {unit}, the perimeter {2 * (w + h)} {unit}."
    )


def clock(dice: Dice) -> str:
    start, length = dice.number(6 * 12, 19 * 12) * 5, dice.number(7, 47) * 5
    end = start + length
    event = dice.pick(("A film", "The lesson", "A concert", "The ferry crossing", "The match", "A hike"))
    return (
        f"{event} starts at {start // 60}:{start % 60:02d} and lasts {length} minutes. When does it end?\n"
        f"  {length} = {length // 60} * 60 + {length % 60}, so it lasts {length // 60} h {length % 60} min.\n"
        f"It ends at {end // 60}:{end % 60:02d}."
    )


EXERCISES: tuple[Exercise, ...] = (
    column_addition, subtraction, multiplication, division, fractions, percentage, equation, common_divisor,
    factors, sequence, shopping, journey, mean, square, quadratic, rectangle, clock,
)  # fmt: skip


def write(dice: Dice) -> str:
    """One sheet of exercises."""
    chosen = dice.several(EXERCISES, dice.number(3, 6))
    return "\n\n".join(exercise(dice) for exercise in chosen) + "\n"
