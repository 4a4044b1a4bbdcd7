"""Small pieces of office and computer work, generated: the domains of the library of adapters.

Each has one right answer that follows from the question, so a small adapter learns the rule and not
the answers. ``yaml`` and ``roman`` have no adapter in the shipped library: what a method does there
is what it does out of domain.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from evals.tasks.base import GENERATION_ORDER, Sample, Split, Wordings, make_samples

__all__ = ["Chore", "dates", "html", "nato", "roman", "shell", "sql", "times", "yaml"]

_SIZES: dict[Split, int] = {"adapter": 600, "train": 120, "validation": 40, "test": 80}

Made = tuple[dict[str, str], str]
"""What the question is filled with, and the answer."""


@dataclass(frozen=True)
class Chore:
    """One kind of work.

    Attributes:
        name: The task's name.
        max_tokens: How many tokens an answer may have.
        asks: Wordings of the question.
        make: Draws what one question is about.
    """

    name: str
    max_tokens: int
    asks: Wordings
    make: Callable[[random.Random], Made]

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of one split."""
        return list(_generate(self.name)[split])

    def grade(self, answer_text: str, sample: Sample) -> float:
        """Return 1 for the right answer, whatever its case, spaces and quoting, else 0."""
        return float(_plain(answer_text) == _plain(sample.answer))


def _plain(text: str) -> str:
    return " ".join(text.strip().strip("`").rstrip(";.").lower().replace('"', "'").split())


@cache
def _generate(name: str) -> dict[Split, list[Sample]]:
    chore = _CHORES[name]
    seen: set[str] = set()
    splits: dict[Split, list[Sample]] = {}
    for split in GENERATION_ORDER:
        rng = random.Random(f"{name}/{split}")
        pairs: list[tuple[str, str]] = []
        while len(pairs) < _SIZES[split]:
            filled, answer = chore.make(rng)
            if answer not in seen:
                seen.add(answer)
                pairs.append((chore.asks.pick(rng, split).format(**filled), answer))
        splits[split] = make_samples(name, split, pairs)
    return splits


_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
           "October", "November", "December")  # fmt: skip


def _ordinal(n: int) -> str:
    ending = "th" if 10 < n % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _date(rng: random.Random) -> Made:
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    name = _MONTHS[month - 1]
    said = rng.choice(
        (f"{day} {name} {year}", f"{name} {_ordinal(day)}, {year}", f"{name} {day}, {year}",
         f"the {_ordinal(day)} of {name} {year}", f"{day}. {name[:3]} {year}")
    )  # fmt: skip
    return {"x": said}, f"{year}-{month:02}-{day:02}"


_HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
          "eleven")  # fmt: skip
_PARTS = {
    "in the morning": range(1, 12),
    "in the afternoon": range(13, 18),
    "in the evening": range(18, 22),
    "at night": range(22, 24),
}
_MINUTES = {0: "{h} o'clock", 5: "five past {h}", 10: "ten past {h}", 15: "a quarter past {h}",
            20: "twenty past {h}", 25: "twenty-five past {h}", 30: "half past {h}",
            35: "twenty-five to {n}", 40: "twenty to {n}", 45: "a quarter to {n}",
            50: "ten to {n}", 55: "five to {n}"}  # fmt: skip
_EVENTS = ("The train leaves", "The meeting is", "The shop closes", "The film starts",
           "My flight is", "The call is", "Lunch is", "The alarm rings", "The class ends",
           "The bus comes")  # fmt: skip


def _time(rng: random.Random) -> Made:
    part = rng.choice([*_PARTS])
    hour, minute = rng.choice(_PARTS[part]), rng.choice([*_MINUTES])
    said = _MINUTES[minute].format(h=_HOURS[hour % 12], n=_HOURS[(hour + 1) % 12])
    event = rng.choice(_EVENTS)
    return {"x": f"{event} at {said} {part}"}, f"{event.split()[-2].lower()} {hour:02}:{minute:02}"


_TABLES = {
    "orders": ("amount", "status", "city"),
    "customers": ("age", "country", "name"),
    "products": ("price", "colour", "brand"),
    "employees": ("salary", "department", "title"),
    "books": ("pages", "author", "language"),
    "flights": ("distance", "airline", "origin"),
    "songs": ("length", "artist", "genre"),
    "houses": ("rooms", "street", "owner"),
}


def _sql(rng: random.Random) -> Made:
    table = rng.choice([*_TABLES])
    number, text, other = _TABLES[table]
    value = rng.choice(("red", "Berlin", "Smith", "open", "French", "North", "Lee", "new"))
    n = rng.randint(2, 99)
    said, query = rng.choice(
        (
            (f"all {table} with {number} above {n}",
             f"SELECT * FROM {table} WHERE {number} > {n}"),
            (f"all {table} with {number} below {n}",
             f"SELECT * FROM {table} WHERE {number} < {n}"),
            (f"how many {table} have the {text} {value}",
             f"SELECT COUNT(*) FROM {table} WHERE {text} = '{value}'"),
            (f"the average {number} of {table} with the {other} {value}",
             f"SELECT AVG({number}) FROM {table} WHERE {other} = '{value}'"),
            (f"the {text} of the {n} {table} with the highest {number}",
             f"SELECT {text} FROM {table} ORDER BY {number} DESC LIMIT {n}"),
            (f"the {other} of the {n} {table} with the lowest {number}",
             f"SELECT {other} FROM {table} ORDER BY {number} LIMIT {n}"),
            (f"the number of {table} of each {text} with {number} above {n}",
             f"SELECT {text}, COUNT(*) FROM {table} WHERE {number} > {n} GROUP BY {text}"),
        )
    )  # fmt: skip
    return {"x": said}, query


_FOLDERS = ("logs", "photos", "src", "backup", "reports", "music", "data", "docs", "tmp", "build")
_ENDINGS = ("txt", "log", "py", "jpg", "csv", "md", "pdf", "json")


def _shell(rng: random.Random) -> Made:
    folder, ending = rng.choice(_FOLDERS), rng.choice(_ENDINGS)
    n = rng.randint(2, 90)
    word = rng.choice(("error", "todo", "import", "total", "warning", "secret", "main", "invoice"))
    return rng.choice(
        (
            ({"x": f"find all {ending} files in {folder}"}, f'find {folder} -name "*.{ending}"'),
            ({"x": f"find files in {folder} that are larger than {n} megabytes"},
             f"find {folder} -size +{n}M"),
            ({"x": f"find files in {folder} that were changed in the last {n} days"},
             f"find {folder} -mtime -{n}"),
            ({"x": f"count the lines of all {ending} files in {folder}"},
             f"wc -l {folder}/*.{ending}"),
            ({"x": f"search {folder} for the word {word}"}, f"grep -r {word} {folder}"),
            ({"x": f"show the last {n} lines of {word}.{ending}"}, f"tail -n {n} {word}.{ending}"),
            ({"x": f"show the first {n} lines of {word}.{ending}"}, f"head -n {n} {word}.{ending}"),
            ({"x": f"pack the folder {folder} into {word}.tar.gz"},
             f"tar -czf {word}.tar.gz {folder}"),
            ({"x": f"copy all {ending} files to {folder}"}, f"cp *.{ending} {folder}"),
        )
    )  # fmt: skip


_NATO = (
    "Alfa Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliett Kilo Lima Mike November Oscar "
    "Papa Quebec Romeo Sierra Tango Uniform Victor Whiskey Xray Yankee Zulu"
).split()


def _nato(rng: random.Random) -> Made:
    letters = [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 5))]
    word = "".join(letters).upper()
    return {"x": word}, " ".join(_NATO[ord(letter) - ord("a")] for letter in letters)


_WORDS = ("Save", "Cancel", "Next", "Open", "Help", "Login", "Search", "Send", "Back", "Print",
          "Share", "Delete", "Home", "News", "Shop", "Cart")  # fmt: skip
_COLOURS = ("red", "blue", "green", "black", "orange", "purple", "grey", "white")


def _html(rng: random.Random) -> Made:
    word, colour, n = rng.choice(_WORDS), rng.choice(_COLOURS), rng.randint(2, 40)
    other = rng.choice(_WORDS).lower()
    return rng.choice(
        (
            ({"x": f"a button that says {word} with the id {other}"},
             f'<button id="{other}">{word}</button>'),
            ({"x": f"a link to /{other} that says {word}"}, f'<a href="/{other}">{word}</a>'),
            ({"x": f"a {colour} heading of level {n % 6 + 1} that says {word}"},
             f'<h{n % 6 + 1} style="color: {colour}">{word}</h{n % 6 + 1}>'),
            ({"x": f"a paragraph in {colour} that says {word} with the class {other}"},
             f'<p class="{other}" style="color: {colour}">{word}</p>'),
            ({"x": f"an image {other}.png that is {n * 10} pixels wide"},
             f'<img src="{other}.png" width="{n * 10}">'),
            ({"x": f"a text field called {other} with at most {n} characters"},
             f'<input type="text" name="{other}" maxlength="{n}">'),
        )
    )  # fmt: skip


def _roman(rng: random.Random) -> Made:
    number = rng.randint(1, 999)
    rest, numeral = number, ""
    for value, letters in ((900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
                           (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"),
                           (1, "I")):  # fmt: skip
        numeral += letters * (rest // value)
        rest %= value
    return {"x": str(number)}, numeral


_NAMES = ("Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas")


def _yaml(rng: random.Random) -> Made:
    fields = {
        "name": rng.choice(_NAMES),
        "age": rng.randint(18, 90),
        "colour": rng.choice(_COLOURS),
        "pages": rng.randint(10, 900),
        "city": rng.choice(("Oslo", "Rome", "Lima", "Cairo", "Delhi", "Quito")),
    }
    keys = rng.sample([*fields], 3)
    said = ", ".join(f"{key} is {fields[key]}" for key in keys)
    return {"x": said}, "\n".join(f"{key}: {fields[key]}" for key in keys)


_CHORES = {
    chore.name: chore
    for chore in (
        Chore("dates", 16, Wordings(
            ("Write {x} as an ISO date.", "{x} in the form YYYY-MM-DD", "ISO date of {x}?",
             "Convert this date to ISO 8601: {x}", "What is {x} as year-month-day?"),
            ("Put {x} into ISO format",), ("ISO 8601, please: {x}", "sortable form of {x}"),
        ), _date),
        Chore("times", 12, Wordings(
            ("{x}. Note it with a 24-hour time.", "Write down: {x}. Use the 24-hour clock.",
             "24-hour note for: {x}", "{x}. As a short note with a digital time?"),
            ("Short note, 24-hour clock: {x}",),
            ("{x} - note with 24-hour time, please", "digital time for this: {x}"),
        ), _time),
        Chore("sql", 32, Wordings(
            ("SQL for {x}?", "Write a query that gives {x}.", "I need an SQL query: {x}",
             "query: {x}", "Give me {x} in SQL."),
            ("How do I ask the database for {x}?",),
            ("A SELECT statement for {x}, please.", "In SQL: {x}"),
        ), _sql),
        Chore("shell", 24, Wordings(
            ("Shell command to {x}?", "How do I {x} on the command line?", "bash: {x}",
             "Which command can {x}?", "Write a Linux command to {x}."),
            ("In a terminal I want to {x}",), ("One command to {x}, please.", "unix: {x}"),
        ), _shell),
        Chore("nato", 28, Wordings(
            ("Spell {x} in the NATO alphabet.", "NATO spelling of {x}?", "{x} over the radio?",
             "How does a pilot spell {x}?", "Phonetic alphabet: {x}"),
            ("Spell out {x} for a radio operator",),
            ("{x} in code words", "Say the letters {x} by radio alphabet"),
        ), _nato),
        Chore("html", 32, Wordings(
            ("HTML for {x}?", "Write {x} in HTML.", "How do I put {x} on a web page?",
             "The tag for {x}", "html: {x}"),
            ("I want {x} on my page, which HTML is that?",),
            ("{x}, as an HTML element", "Markup of {x}, please."),
        ), _html),
        Chore("roman", 16, Wordings(
            ("Write {x} in Roman numerals.", "{x} as a Roman numeral?", "Roman for {x}"),
            ("What was {x} in ancient Rome?",), ("Roman numeral of {x}, please",),
        ), _roman),
        Chore("yaml", 28, Wordings(
            ("Write as YAML: {x}", "YAML with these fields: {x}", "{x}. As YAML?"),
            ("Put this into YAML, {x}",), ("yaml for: {x}",),
        ), _yaml),
    )
}  # fmt: skip

# Tasks are named by what makes them.
dates, times, sql, shell, nato, html, roman, yaml = (
    partial(_CHORES.__getitem__, name)
    for name in ("dates", "times", "sql", "shell", "nato", "html", "roman", "yaml")
)
