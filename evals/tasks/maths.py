"""Arithmetic, unit conversion and one-step word problems, generated."""

from __future__ import annotations

import random
import re
from functools import cache

from evals.tasks.base import GENERATION_ORDER, Sample, Split, Wordings, make_samples

_SIZES: dict[Split, int] = {"adapter": 2400, "train": 120, "validation": 40, "test": 80}

_SUMS = Wordings(
    shared=(
        "What is {e}?", "{e} =", "Calculate {e}.", "what's {e}", "How much is {e}?",
        "Work out {e} and give me just the number.", "Can you compute {e} for me?",
        "quick: {e}", "I need the result of {e}", "Please solve {e}", "{e} = ?",
        "Tell me what {e} equals.", "what do you get for {e}?", "Answer with a number only: {e}",
    ),
    validation=("find the value of {e}", "My homework asks for {e}. What should I write?"),
    test=(
        "Could you do this sum: {e}?", "{e}, please", "Evaluate {e}",
        "I keep getting {e} wrong, what is it?",
    ),
)  # fmt: skip
_SYMBOLS = {
    "+": ("{a} + {b}", "{a}+{b}", "{a} plus {b}"),
    "-": ("{a} - {b}", "{a}-{b}", "{a} minus {b}"),
    "*": ("{a} * {b}", "{a} x {b}", "{a} times {b}"),
    "/": ("{a} / {b}", "{a} divided by {b}"),
}
_UNITS = (
    ("metres", "centimetres", 100), ("kilometres", "metres", 1000), ("kilograms", "grams", 1000),
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24),
    ("weeks", "days", 7), ("feet", "inches", 12), ("yards", "feet", 3),
    ("litres", "millilitres", 1000),
    ("centimetres", "millimetres", 10), ("years", "months", 12), ("dollars", "cents", 100),
    ("dozens", "pieces", 12), ("pounds", "ounces", 16),
)  # fmt: skip
_CONVERSIONS = Wordings(
    shared=(
        "How many {to} are in {n} {unit}?", "Convert {n} {unit} to {to}.", "{n} {unit} in {to}?",
        "what is {n} {unit} in {to}", "I have {n} {unit}, how many {to} is that?",
        "{n} {unit} is how many {to}",
    ),
    validation=("Change {n} {unit} into {to}",),
    test=("express {n} {unit} as {to}", "If something takes up {n} {unit}, what is that in {to}?"),
)  # fmt: skip
_NAMES = ("Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas")
_THINGS = (
    "apples",
    "stamps",
    "books",
    "marbles",
    "cards",
    "coins",
    "pencils",
    "stickers",
    "shells",
)
_STORIES: dict[str, Wordings] = {
    "+": Wordings(
        shared=(
            "{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
            "There are {a} {thing} in one box and {b} in another. How many {thing} in total?",
        ),
        validation=("{name} found {a} {thing} today and {b} yesterday. How many altogether?",),
        test=("A shelf holds {a} {thing}. {name} adds {b}. How many {thing} are on it?",),
    ),
    "-": Wordings(
        shared=(
            "{name} had {a} {thing} and gave away {b}. How many {thing} are left?",
            "Out of {a} {thing}, {b} were lost. How many remain?",
        ),
        validation=("{name} needs {a} {thing} and has {b}. How many are missing?",),
        test=("{name} sold {b} of {a} {thing}. How many {thing} did {name} keep?",),
    ),
    "*": Wordings(
        shared=(
            "A pack has {a} {thing}. {name} buys {b} packs. How many {thing} is that?",
            "{name} puts {a} {thing} into each of {b} bags. How many {thing} are there?",
        ),
        validation=("{b} friends bring {a} {thing} each. How many {thing} do they have?",),
        test=("{name} collects {a} {thing} a day for {b} days. How many {thing} in the end?",),
    ),
    "/": Wordings(
        shared=(
            "{name} shares {a} {thing} equally among {b} friends. How many does each get?",
            "{a} {thing} are packed into {b} equal boxes. How many {thing} per box?",
        ),
        validation=("{a} {thing} split evenly over {b} bags, how many in one bag?",),
        test=("{b} children divide {a} {thing} fairly. How many {thing} for each child?",),
    ),
}


class MathsTask:
    """Arithmetic with small whole numbers; the last number of the answer must be right."""

    name = "maths"
    max_tokens = 24

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of one split."""
        return list(_generate()[split])

    def grade(self, answer_text: str, sample: Sample) -> float:
        """Return 1 if the last number of the answer is the expected one, else 0.

        The last one, since an answer may repeat the question before its result.
        """
        numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", answer_text))
        return float(bool(numbers) and float(numbers[-1]) == float(sample.answer))


@cache
def _generate() -> dict[Split, list[Sample]]:
    seen: set[str] = set()
    splits: dict[Split, list[Sample]] = {}
    for split in GENERATION_ORDER:
        rng = random.Random(f"maths/{split}")
        pairs: list[tuple[str, str]] = []
        while len(pairs) < _SIZES[split]:
            problem, text, answer = _problem(rng, split)
            # The same numbers in other words would give the answer away.
            if problem not in seen:
                seen.add(problem)
                pairs.append((text, str(answer)))
        splits[split] = make_samples("maths", split, pairs)
    return splits


def _problem(rng: random.Random, split: Split) -> tuple[str, str, int]:
    kind = rng.choices(("sum", "conversion", "story"), weights=(5, 2, 3))[0]
    if kind == "conversion":
        unit, to, factor = rng.choice(_UNITS)
        count = rng.randint(2, 99)
        text = _CONVERSIONS.pick(rng, split).format(n=count, unit=unit, to=to)
        return f"{count} {unit} {to}", text, count * factor
    operator = rng.choice("++--*/")
    a, b, result = _operands(rng, operator)
    if kind == "story":
        name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
        text = _STORIES[operator].pick(rng, split).format(a=a, b=b, name=name, thing=thing)
        return f"{operator} {a} {b}", text, result
    expression = rng.choice(_SYMBOLS[operator]).format(a=a, b=b)
    return f"{operator} {a} {b}", _SUMS.pick(rng, split).format(e=expression), result


def _operands(rng: random.Random, operator: str) -> tuple[int, int, int]:
    if operator in "+-":
        low, high = rng.choice(((10, 99), (10, 99), (100, 999)))
        a, b = sorted((rng.randint(low, high), rng.randint(10, 99)), reverse=True)
        return (a, b, a + b) if operator == "+" else (a, b, a - b)
    a, b = rng.randint(2, 30), rng.randint(2, 12)
    return (a, b, a * b) if operator == "*" else (a * b, b, a)
