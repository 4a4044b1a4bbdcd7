"""What a prompt looks like, whatever it is about: length, script, code, maths, options.

Readable features, each in [0, 1]. Knows nothing of models or scores.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable

__all__ = ["SURFACE_FEATURES", "surface_features"]

# More tells nothing new, and a pasted book would take long.
MAX_CHARACTERS = 8192

_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "CJK", "HIRAGANA",
            "KATAKANA", "HANGUL", "THAI")  # fmt: skip
# The commonest words that are rare in the other languages.
_STOPWORDS = {
    "en": "the of and is what which for with that are",
    "de": "der die das und ist nicht ein mit auf welche",
    "fr": "le les des est une dans quel pour que pas",
    "es": "el los las una es por qué para como del",
    "it": "il gli della che è per una quale sono non",
    "pt": "o os uma não para qual em são como do",
    "nl": "het een van niet dat zijn voor welke wordt op",
}
_COMMON_WORDS = [frozenset(words.split()) for words in _STOPWORDS.values()]
_QUESTION_WORDS = ("what", "which", "who", "when", "where", "why", "how")
_REQUEST_WORDS = ("write", "explain", "translate", "summarize", "list", "solve", "find", "give",
                  "calculate", "complete")  # fmt: skip
_QUESTION_MARKS = ("?", "\N{FULLWIDTH QUESTION MARK}", "\N{ARABIC QUESTION MARK}")
_OPTION = re.compile(r"(?:^|\s)\(?([A-J])[.):]\s", re.MULTILINE)
_CODE = re.compile(
    r"```|\b(?:def \w+\(|return\b|import \w+|class \w+[:({]|function \w*\(|SELECT\b)"
    r"|[{};]\s*$|=>|->|==|!=|\w\(\)|#include|>>> ",
    re.MULTILINE,
)
_MATHS = re.compile(r"\$[^$]+\$|\\(?:frac|sqrt|sum|int|begin|left|cdot|times)\b|[=^≤≥√∑∫π]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W\d_]+")


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _log_scale(count: float, full: float) -> float:
    """0 for nothing, 1 for ``full`` or more."""
    return min(1.0, math.log1p(count) / math.log1p(full))


def _script(character: str) -> str:
    return unicodedata.name(character, "").partition(" ")[0]


def _scripts(text: str) -> dict[str, float]:
    if text.isascii():
        return {"LATIN": 1.0 if any(map(str.isalpha, text)) else 0.0}
    letters = [c for c in text if c.isalpha()]
    # A sample: names of characters are slow to look up.
    sample = letters[:: max(1, len(letters) // 256)]
    found = [_script(c) for c in sample]
    return {script: _share(found.count(script), len(found)) for script in _SCRIPTS}


def _count(pattern: re.Pattern[str]) -> Callable[[str], int]:
    return lambda text: sum(1 for _ in pattern.finditer(text))


def _count_characters(holds: Callable[[str], bool]) -> Callable[[str], int]:
    others = bytes(code for code in range(128) if not holds(chr(code)))

    def count(text: str) -> int:
        if text.isascii():  # many times as fast
            return len(text.encode().translate(None, others))
        return sum(map(holds, text))

    return count


_codes, _maths = _count(_CODE), _count(_MATHS)
_digits, _capitals = _count_characters(str.isdigit), _count_characters(str.isupper)
_punctuation = _count_characters(lambda c: not c.isalnum() and not c.isspace())

SURFACE_FEATURES: tuple[str, ...] = (
    "characters", "lines", "words", "word_length", "digits", "capitals", "punctuation", "numbers",
    "code", "maths", "options", "question_mark", "ends_with_question", "quotes",
    *(f"script_{name.lower()}" for name in _SCRIPTS),
    *(f"language_{name}" for name in _STOPWORDS),
    *(f"asks_{name}" for name in _QUESTION_WORDS),
    *(f"asks_to_{name}" for name in _REQUEST_WORDS),
)  # fmt: skip


def surface_features(text: str) -> list[float]:
    """Features of one text, in the order of ``SURFACE_FEATURES``, each in [0, 1]."""
    text = text[:MAX_CHARACTERS]
    words = [word.lower() for word in _WORD.findall(text)]
    vocabulary, size = set(words), len(text)
    scripts = _scripts(text)
    options = {match[1] for match in _OPTION.finditer(text)}
    # Options are lettered without a gap; a lone "I." is a word.
    run = next((i for i, letter in enumerate("ABCDEFGHIJ") if letter not in options), 10)
    features = [
        _log_scale(size, MAX_CHARACTERS),
        _log_scale(text.count("\n"), 200),
        _log_scale(len(words), 1500),
        min(1.0, _share(sum(map(len, words)), len(words)) / 12),
        _share(_digits(text), size),
        _share(_capitals(text), size),
        _share(_punctuation(text), size),
        _log_scale(len(_NUMBER.findall(text)), 50),
        _log_scale(_codes(text), 30),
        _log_scale(_maths(text), 30),
        (run if run >= 2 else 0) / 10,
        _log_scale(sum(text.count(mark) for mark in _QUESTION_MARKS), 5),
        float(text.rstrip().endswith(_QUESTION_MARKS)),
        _log_scale(sum(text.count(mark) for mark in "\"“”'"), 30),
    ]
    features += [scripts.get(name, 0.0) for name in _SCRIPTS]
    features += [_share(len(vocabulary & common), 10) for common in _COMMON_WORDS]
    features += [float(word in vocabulary) for word in (*_QUESTION_WORDS, *_REQUEST_WORDS)]
    return features
