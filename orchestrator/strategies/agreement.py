"""When two answers say the same: keys that are equal where answers agree, and the medoid of texts.

Normalisation is small on purpose, since what it takes for equal is counted as agreement: Unicode
compatibility forms, letter case, runs of white space, punctuation at the ends, brackets around a
single letter, and numbers by value (``1,000.0``, ``$1000`` and ``1000`` are one).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from functools import partial
from typing import Any, Literal

from experts.types import Choice

__all__ = ["AnswerForm", "answer_key", "final_part", "is_free_text", "medoid", "normalised"]

# Shorter answers are names, numbers and labels, of which two are equal or not.
FREE_TEXT_WORDS = 8

AnswerForm = Literal["auto", "exact", "final_line", "number", "json", "text"]

# What keys of tool calls and of JSON begin with; no normalised text has a control character.
_VALUES = ("\x00tools ", "\x00json ")
_NUMBER = re.compile(r"[-+\u2212]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_MINUS = "\u2212"
_CURRENCY = "$\u20ac\u00a3"
# What may stand before or after a text without being part of what it says.
_BEFORE = " \"'`*_\u201c\u201d\u2018\u2019"
_AFTER = _BEFORE + ".,;:!?"
_OPTION = re.compile(r"[(\[]?([a-z])[)\]]?")
_BOXED = re.compile(r"\\boxed\s*\{")
_MARKER = re.compile(
    # Possessive, or an answer that ends in a thousand spaces would take seconds.
    r"\banswer\b[ \t*]*+(?:(?:is\b)?+[ \t*]*+[:=][ \t*]*+\n?+|is\b)[ \t*]*+(?P<answer>[^\n]*\S)",
    re.I,
)
_FENCED = re.compile(r"\A\s*```\w*\n(.*?)\n?```\s*\Z", re.DOTALL)


def answer_key(choice: Choice, form: AnswerForm) -> str | None:
    """A text that is the same for answers that say the same; none if it says nothing of the form.

    Tool calls are compared by name and arguments in any form, as JSON values and in any order.

    Args:
        choice: The answer.
        form: What of it counts. ``exact``: all of it. ``final_line``: its last boxed part, what
            follows its last "Answer:", or its last line. ``number``: the last number of that.
            ``json``: its value. ``auto``: its JSON value, the part that is marked as the answer, or
            all of it. ``text``: as ``exact``.
    """
    if choice.tool_calls:
        return _VALUES[0] + json.dumps(sorted(_call_key(call) for call in choice.tool_calls))
    text = choice.text
    if form == "number":
        return _last_number(final_part(text) or "") or _last_number(text)
    if form == "final_line":
        lines = [line for line in text.splitlines() if line.strip(_AFTER)]
        return normalised(final_part(text) or (lines[-1] if lines else "")) or None
    if form in ("auto", "json"):
        if (value := _json_key(text, containers_only=form == "auto")) or form == "json":
            return value
        text = final_part(text) or text
    return normalised(text) or None


def is_free_text(key: str) -> bool:
    """Whether a key is so long a text that others may say the same in other words."""
    return not key.startswith(_VALUES) and len(key.split()) > FREE_TEXT_WORDS


def final_part(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds, else what follows the last "Answer:" or "answer is"."""
    if boxes := list(_BOXED.finditer(text)):
        return _braced(text, boxes[-1].end())
    found = [match["answer"] for match in _MARKER.finditer(text)]
    return found[-1] if found else None


def normalised(text: str) -> str:
    """The text without what makes no difference; see the module.

    Examples:
        >>> normalised("  **The  Cat!** "), normalised("$1,000.00")
        ('the cat', '1000')
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(text.split()).rstrip(_AFTER).lstrip(_BEFORE)
    number = text.lstrip(_CURRENCY)
    if _NUMBER.fullmatch(number):
        return _by_value(number)
    option = _OPTION.fullmatch(text)
    return option[1] if option else text


def medoid(texts: Sequence[str], weights: Sequence[float]) -> int:
    """The text most like all others, by the weighted mean cosine of sentence vectors.

    Takes milliseconds per text, the first use seconds: not for an event loop.

    Args:
        texts: What to compare, not empty; ties go to the first.
        weights: What it counts to be like each of them.

    Returns:
        Its position.
    """
    import numpy as np

    from routers.encoders import get_encoder

    vectors = get_encoder().encode(texts)
    others = np.tile(np.asarray(weights, np.float64), (len(texts), 1))
    np.fill_diagonal(others, 0.0)
    alike = (vectors.astype(np.float64) @ vectors.T * others).sum(axis=1)
    totals = others.sum(axis=1)
    # Rounded: which of two is summed first must not decide a tie.
    means = np.round(np.divide(alike, totals, out=np.zeros_like(alike), where=totals > 0), 9)
    return int(means.argmax())


def _braced(text: str, start: int) -> str:
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return text[start:]


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    return _by_value(found[-1]) if found else None


def _by_value(number: str) -> str:
    return f"{_canonical(Decimal(number.replace(',', '').replace(_MINUS, '-'))):f}"


def _canonical(value: Decimal) -> Decimal:
    """The same for equal numbers, with as many digits as it has; zero without a sign."""
    digits = len(value.as_tuple().digits)
    context = Context(prec=max(1, digits), Emax=MAX_EMAX, Emin=MIN_EMIN)
    return value.normalize(context) if value else Decimal(0)


def _json_key(text: str, *, containers_only: bool) -> str | None:
    if fenced := _FENCED.match(text):
        text = fenced[1]
    try:
        value = _loads(text)
        if containers_only and not isinstance(value, dict | list):
            return None
        return _VALUES[1] + json.dumps(_plain(value), sort_keys=True)
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _call_key(call: dict[str, Any]) -> str:
    function = call.get("function", {})
    try:
        arguments = _plain(_loads(function.get("arguments") or "{}"))
    except (ValueError, ArithmeticError, RecursionError):
        arguments = str(function["arguments"]).strip()
    return json.dumps([function.get("name"), arguments], sort_keys=True)


# Numbers as decimals, so that 1, 1.0 and 1e0 become one; no NaN, which equals nothing.
_loads = partial(json.loads, parse_float=Decimal, parse_int=Decimal, parse_constant=Decimal)


def _plain(value: Any) -> Any:
    """JSON values as their own kind of text: numbers by value, strings without outer space."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, Decimal):
        return {"number": str(_canonical(value))}
    return value.strip() if isinstance(value, str) else value
