"""Short messages (orders, appointments, invoices) to a flat JSON object, generated."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache

from evals.tasks.base import GENERATION_ORDER, Sample, Split, Wordings, make_samples

_SIZES: dict[Split, int] = {"adapter": 2000, "train": 120, "validation": 40, "test": 80}

_ASKS = Wordings(
    shared=(
        "Extract {f} as JSON: {m}",
        "{m}\n\nReturn JSON with {f}.",
        "Turn this into JSON ({f}):\n{m}",
        "Message: {m}\nFields: {f}\nJSON:",
        "Give me {f} from this message as a JSON object.\n{m}",
        "parse this, keys {f}\n{m}",
        "Fill a JSON object with {f}. Text: {m}",
        'Pull {f} out of "{m}" and answer in JSON only.',
    ),
    validation=("I need a JSON record ({f}) for this note: {m}",),
    test=(
        "{m}\nConvert to json, fields are {f}",
        "Our system takes JSON with {f}. What goes in for: {m}",
    ),
)
_ORDERS = Wordings(
    shared=(
        "Hi, I'd like {quantity} {item} sent to {city} please. Thanks, {name}",
        "{name} from {city} orders {quantity} {item}.",
        "Please ship {quantity} {item} to {name} in {city}.",
        "Order: {quantity} x {item}, {name}, {city}",
    ),
    validation=("{name} here, put me down for {quantity} {item}, delivery to {city}.",),
    test=("Can {name} get {quantity} {item} delivered in {city}?",),
)
_APPOINTMENTS = Wordings(
    shared=(
        "{name} would like to see {doctor} on {day} at {time}.",
        "Can you book me with {doctor} for {day}, {time}? - {name}",
        "Appointment for {name}: {day} {time} with {doctor}",
        "Hello, {name} speaking, is {day} at {time} free with {doctor}?",
    ),
    validation=("{doctor} expects {name} this {day} at {time}.",),
    test=("Reminder: {day}, {time}, {name} meets {doctor}.",),
)
_INVOICES = Wordings(
    shared=(
        "Invoice {number} from {company} over {amount} euros is due on {due}.",
        "{company} sent invoice {number}: {amount} euros, pay by {due}.",
        "Please pay {amount} euros to {company} before {due}, invoice {number}.",
        "Bill no. {number}, {company}, total {amount} euros, due {due}",
    ),
    validation=("We owe {company} {amount} euros until {due} (invoice {number}).",),
    test=("By {due} we must settle invoice {number} of {company}, {amount} euros.",),
)
_NAMES = (
    "Maria", "Tom", "Aisha", "Peter", "Lena", "Omar", "Julia", "Chen", "Nina", "Paul", "Rosa",
    "Viktor", "Emma", "Karim", "Sofia", "Liam", "Priya", "Noah", "Hanna", "Marco",
)  # fmt: skip
_CITIES = (
    "Berlin", "Lyon", "Oslo", "Madrid", "Leeds", "Porto", "Vienna", "Turin", "Ghent", "Basel",
    "Krakow", "Boston", "Denver", "Dublin", "Malmo",
)  # fmt: skip
_ITEMS = (
    "notebooks", "coffee mugs", "desk lamps", "phone cases", "office chairs", "water bottles",
    "backpacks", "keyboards", "picture frames", "umbrellas", "garden gnomes", "tea towels",
)  # fmt: skip
_DOCTORS = ("Dr. Patel", "Dr. Novak", "Dr. Kim", "Dr. Weber", "Dr. Silva", "Dr. Brown", "Dr. Rossi")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_COMPANIES = ("Acme", "Nordwind", "Bluebird", "Kepler", "Sunrise", "Hilltop", "Greenline", "Orion")
_MONTHS = ("January", "March", "April", "June", "July", "August", "October", "December")


class ExtractTask:
    """Name the fields of a message as JSON; the share of fields that are right."""

    name = "extract"
    max_tokens = 48

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of one split."""
        return list(_generate()[split])

    def grade(self, answer_text: str, sample: Sample) -> float:
        """Return the share of expected fields with the expected value, 0 if not a JSON object.

        Text around the object, such as a code fence, does not count against an answer.
        """
        start, end = answer_text.find("{"), answer_text.rfind("}")
        try:
            fields = json.loads(answer_text[start : end + 1]) if start >= 0 else None
        except (ValueError, RecursionError):
            return 0.0
        if not isinstance(fields, dict):
            return 0.0
        expected = json.loads(sample.answer)
        right = sum(_plain(fields.get(key)) == _plain(value) for key, value in expected.items())
        return right / len(expected)


def _plain(value: object) -> str:
    # Numbers may come as text: whether 3 is quoted is not what is asked.
    return str(value).strip().lower()


@cache
def _generate() -> dict[Split, list[Sample]]:
    seen: set[str] = set()
    splits: dict[Split, list[Sample]] = {}
    for split in GENERATION_ORDER:
        rng = random.Random(f"extract/{split}")
        pairs: list[tuple[str, str]] = []
        while len(pairs) < _SIZES[split]:
            messages, make_fields = rng.choice(_KINDS)
            fields = make_fields(rng)
            answer = json.dumps(fields)
            if answer not in seen:
                seen.add(answer)
                message = messages.pick(rng, split).format(**fields)
                pairs.append((_ASKS.pick(rng, split).format(f=_listed(fields), m=message), answer))
        splits[split] = make_samples("extract", split, pairs)
    return splits


def _listed(fields: dict[str, str | int]) -> str:
    return ", ".join(fields)


def _order(rng: random.Random) -> dict[str, str | int]:
    return {
        "name": rng.choice(_NAMES),
        "item": rng.choice(_ITEMS),
        "quantity": rng.randint(2, 60),
        "city": rng.choice(_CITIES),
    }


def _appointment(rng: random.Random) -> dict[str, str | int]:
    return {
        "name": rng.choice(_NAMES),
        "doctor": rng.choice(_DOCTORS),
        "day": rng.choice(_DAYS),
        "time": f"{rng.randint(8, 17)}:{rng.choice(('00', '15', '30', '45'))}",
    }


def _invoice(rng: random.Random) -> dict[str, str | int]:
    return {
        "number": rng.randint(100, 999),
        "company": rng.choice(_COMPANIES),
        "amount": rng.randint(20, 980),
        "due": f"{rng.randint(1, 28)} {rng.choice(_MONTHS)}",
    }


_KINDS: tuple[tuple[Wordings, Callable[[random.Random], dict[str, str | int]]], ...] = (
    (_ORDERS, _order),
    (_APPOINTMENTS, _appointment),
    (_INVOICES, _invoice),
)
