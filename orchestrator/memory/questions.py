"""Whether two questions ask the same, judged by their words. Knows of no model and no vectors.

Vectors of near misses lie as close together as those of paraphrases: another number or another name
moves a vector less than other words for the same do. So a close vector makes a candidate, no more,
and these rules must find nothing that differs. They err on the side of a difference: a miss costs
an answer that is asked for again, a false hit gives a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["MAX_CHARACTERS", "RULES", "difference"]

# Longer questions are documents, of which a word more or less says little about the whole.
MAX_CHARACTERS = 2000

_QUOTED = re.compile(
    r'"([^"]*)"|“([^”]*)”|«([^»]*)»|„([^“”]*)[“”]|`([^`]*)`|(?<!\w)\'([^\']+)\'(?!\w)'
    r"|:\s+(?![\"“«„`'\s])(.+)",
    re.DOTALL,
)
# Words with what joins them to names, addresses, times and calls; else single signs. A letter of a
# script that puts no spaces between words is a word.
_TOKEN = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
    r"|(?:(?<!\S)--?)?\w+(?:[.,:/@'\u2019_-]+\w+)*(?:\(\))?|[=<>!]+|\S"
)
# Signs of formulas and code: brackets, factorials, ".5", slices, "f'(x)".
_MARK = re.compile(r"\[[^\]]*\]|[()\[\]{}]|(?<=\d)!|(?<![\w.])\.(?=\d)|['\u2019](?=\()")
# Ways to say "how to", and politeness around a question.
_HOW_TO = re.compile(
    r"\b(?:the |a )?(?:best |right |good )?(?:ways?|steps?) (?:to|of)\b", re.IGNORECASE
)
_POLITE = re.compile(
    r"\b(?:can|could|would|will) you\b(?: please)?|\b(?:for|to) me\b", re.IGNORECASE
)
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_IDENTIFIER = re.compile(r"--?[A-Za-z]|\w*_\w|.*\w\(\)|.*[a-z][A-Z]|.*\w[@.]\w|.*[a-z]\d|\d+[a-z]")
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))")
_SENTENCE_END = frozenset(".!?\u00a1\u00bf")
# Signs that say nothing; others do, such as those of currencies and of comparisons. The last ones
# are those of scripts with wide characters.
_QUIET = frozenset(
    ".,;:!?()[]{}'\"\u2019\u2026\u2013\u2014\u00a1\u00bf\uff1f\uff01\uff0c\u3002\u3001"
)
_SIGNS = {
    "+": "plus",
    "-": "minus",
    "%": "percent",
    "*": "times",
    "\u00d7": "times",
    "/": "divided",
}

# In a question in English, at least so large a part of the words is among the function words.
_ENGLISH_SHARE = 0.25


def _stem(word: str) -> str:
    """The word without the endings of plurals, participles and gerunds."""
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        if len(word) > len(ending) + 3 and word.endswith(ending):
            word = word.removesuffix(ending)
            if word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
    if len(word) > 4 and word.endswith("ie"):
        return word[:-2] + "y"
    return word.removesuffix("e") if len(word) > 3 else word


def _rows(text: str) -> list[list[str]]:
    """Words of each line, by their stems."""
    return [[_stem(word) for word in row.split()] for row in text.strip().splitlines()]


def _set(text: str) -> frozenset[str]:
    return frozenset(word for row in _rows(text) for word in row)


def _to_first(text: str) -> dict[str, str]:
    """Each word to the first of its row."""
    return {word: row[0] for row in _rows(text) for word in row}


# Words that say little of what is asked for.
_FUNCTION_WORDS = _set(
    """
    a an the this that these those there it its is are was were be been am do does did done have
    has had having can could may might shall should will would must i me my mine we us our you
    your he him his she her they them their to into in on at if whether which what who whom how
    when where why of and please tell give show list say let so then kindly
    """
)
# Ways to ask for an explanation, a method or a fact, which leave open what is asked about.
_ASKING = _set(
    """
    explain describe know mean meaning following okay possible allowed able calculate compute need
    """
)

_NUMBERS = {
    word: str(number)
    for number, row in enumerate(
        _rows(
            """
            two twice second
            three third
            four fourth
            five fifth
            six sixth
            seven seventh
            eight eighth
            nine ninth
            ten tenth
            eleven eleventh
            twelve twelfth
            """
        ),
        start=2,
    )
    for word in row
}

_NEGATIONS = _set(
    """
    no not never none nobody nothing nowhere neither nor without except excluding exclude excluded
    unless cannot but instead lack lacks lacking non
    """
)

# What turns an answer round. A word of a row on one side, another of that row on the other.
_OPPOSITES = _rows(
    """
    in on under
    more less fewer
    most least
    large largest larger small smallest smaller
    big biggest bigger small smallest smaller
    high highest higher low lowest lower
    long longest longer short shortest shorter
    fast fastest faster slow slowest slower
    old oldest older young youngest younger new newest newer
    best worst
    better worse
    good bad
    first last
    before after during within
    above below
    over under
    maximum minimum max min
    increase decrease reduce
    raise raised rise rises lower fall falls reduce reduced reduces
    cheap cheapest expensive
    near nearest closest far farthest furthest
    hot hottest cold coldest
    enable disable
    install uninstall
    open close opens closes opening closing
    start stop end starts stops ends
    built fall destroyed
    on off
    import export
    ascending descending
    horizontally vertically horizontal vertical
    left right
    north south east west
    up down
    top bottom
    local remote
    read write
    encode decode
    encrypt decrypt
    push pull
    add remove delete create
    lock unlock
    mute unmute
    tie untie
    advantage disadvantage advantages disadvantages
    pros cons
    synonym antonym
    formal informal
    common rare
    healthy unhealthy
    include exclude included excluded
    born die died
    won lost win lose winner loser
    buy sell bought sold
    upload download
    past present future
    spring summer autumn winter
    morning evening night
    derivative integral
    plus minus times divided
    cancel renew
    freeze defrost
    even odd
    positive negative
    accept reject
    allow deny
    difference common
    differ common
    """
)

# Words with a side: what comes after one of them must be the same in both.
_SIDES = _set("from to into than before after per until since over under within by")

# What a question asks for: by one word, or by a measure ("how long", "what is the length").
_ASKED = {
    **dict.fromkeys(("who", "whom", "whose"), "who"),
    **dict.fromkeys(map(_stem, ("person", "athlete", "artist", "author", "player")), "who"),
    **dict.fromkeys(map(_stem, ("when", "year", "time", "date")), "when"),
    "where": "where",
    **dict.fromkeys(map(_stem, ("why", "reason")), "why"),
}
_HOW = {
    how: _stem(measure)
    for how, measure in (
        ("many", "number"), ("much", "amount"), ("long", "length"), ("tall", "height"),
        ("high", "height"), ("far", "distance"), ("old", "age"), ("big", "size"),
        ("wide", "width"), ("deep", "depth"), ("heavy", "weight"), ("often", "frequency"),
        (_stem("frequently"), "frequency"), ("late", "late"), ("early", "early"),
    )
}  # fmt: skip
_MEASURES = frozenset(_HOW.values())
# Whether something is so, may be or must be: what begins such a question, and what it is about.
_AUXILIARIES = _set(
    "is are am was were do does did can could may might must should will would has have"
)
_MODES = {
    **dict.fromkeys(map(_stem, ("can", "could", "may", "might", "possible", "allowed")), "can"),
    **dict.fromkeys(("must", "need"), "must"),
    "should": "should",
}
_TENSES = {
    **dict.fromkeys(map(_stem, ("is", "are", "am", "do", "does")), "present"),
    **dict.fromkeys(map(_stem, ("was", "were", "did", "had")), "past"),
    **dict.fromkeys(("will", "shall"), "future"),
}
_PERSONS = {
    word: row[0]
    for row in _rows(
        """
        i my mine
        you your
        he him his
        she her
        we us our
        they them their
        """
    )
    for word in row
}

_SYNONYMS = _to_first(
    """
    remove delete erase
    buy purchase
    fix repair correct
    start begin commence
    turn-on enable activate
    quick fast quickly rapid rapidly
    big large
    biggest largest greatest
    smallest least
    autumn fall
    extract find get
    picture photo
    movie film
    advantage benefit pro
    replace change
    dictionary dict
    regex regexp
    summarise summarize
    wrote written
    built build
    won win winner
    spoke spoken speak
    differ different difference
    suit suitable
    near nearest close closest
    into to
    convert turn
    list name
    medal
    """
)


_TURNS = [{_SYNONYMS.get(word, word) for word in row} for row in _OPPOSITES]


@dataclass(frozen=True, slots=True)
class _Question:
    """A question taken apart.

    Attributes:
        quotes: Quoted texts and code, and what stands behind a colon, in order.
        marks: Signs of formulas and code, in order.
        raw: What is outside of quotes, as it was written.
        words: The same in lower case, without signs, possessives and plurals.
        starts: Of each word, whether it begins a sentence.
        ends: Of each word, whether it ends a part that may stand elsewhere.
    """

    quotes: tuple[str, ...]
    marks: tuple[str, ...]
    raw: tuple[str, ...]
    words: tuple[str, ...]
    starts: tuple[bool, ...]
    ends: tuple[bool, ...]

    @property
    def english(self) -> bool:
        """Whether enough of it is known to the lists of words."""
        spoken = [word for word in self.words if not word[0].isdecimal()]
        known = sum(word in _FUNCTION_WORDS or word in _ASKING for word in spoken)
        return known >= _ENGLISH_SHARE * len(spoken)

    @property
    def asked(self) -> tuple[str, int]:
        """What is asked for, and the place of the word that says so; empty for anything else."""
        words = self.words
        for place, word in enumerate(words):
            if word == "how" and (how := words[place + 1 : place + 2]) and how[0] in _HOW:
                # "How much is 7 times 8?"
                plain = how[0] == "much" and any(map(_is_number, words[place + 3 : place + 4]))
                return "" if plain else _HOW[how[0]], place + 1
            if word in ("what", "which") and words[place + 1 : place + 2]:
                if kind := _ASKED.get(words[place + 1]):
                    return kind, place + 1
                continue
            if word in _FUNCTION_WORDS and (kind := _ASKED.get(word)):
                return kind, place
            if word in _MEASURES or word == "reason":
                return _ASKED.get(word, word), place
        return "how" if "how" in words else self._whether, -1

    @property
    def _whether(self) -> str:
        """Of a question that yes or no answers: may it be, must it, and is it about the reader."""
        first = (*self.words, "")[0]
        if first not in _AUXILIARIES and "whether" not in self.words:
            return ""
        mode = next((_MODES[word] for word in self.words if word in _MODES), "")
        return f"whether {mode} {'you' if 'you' in self.words else ''}"

    @property
    def content(self) -> list[str]:
        """Words that say what it is about, by one name for what means the same."""
        words = (self.words[place] for place in self._places)
        return [_SYNONYMS.get(word, word) for word in words]

    @property
    def turned(self) -> list[list[str]]:
        """The content, and as it reads with its first part behind the rest.

        A part ends at a comma, a possessive or a number: "In git, how ...", "Peru's capital".
        """
        content, places = self.content, self._places
        # Who bites whom, and what is greater, must stay.
        movable = all(map(str.isalnum, content))
        cuts = [
            cut
            for cut in range(1, len(places) if movable else 1)
            if any(self.ends[places[cut - 1] : places[cut]]) or _is_number(content[cut])
        ]
        return [content, *(content[cut:] + content[:cut] for cut in cuts)]

    @property
    def _places(self) -> list[int]:
        _, said = self.asked
        return [
            place
            for place, word in enumerate(self.words)
            if place != said and word not in _FUNCTION_WORDS and word not in _ASKING
        ]

    def followers(self, word: str) -> set[str]:
        """The words that come first after this one, function words left out."""
        return {
            next((w for w in self.words[place + 1 :] if w not in _FUNCTION_WORDS), "")
            for place, found in enumerate(self.words)
            if found == word
        }


@lru_cache(maxsize=1024)
def _question(text: str) -> _Question:
    quotes: list[str] = []

    def keep(found: re.Match[str]) -> str:
        quotes.append(next(part for part in found.groups() if part is not None).strip())
        return " "

    raw: list[str] = []
    words: list[str] = []
    starts: list[bool] = []
    ends: list[bool] = []
    begins = True
    said = _HOW_TO.sub("how to", _POLITE.sub(" ", _QUOTED.sub(keep, text)))
    for token in _TOKEN.findall(said):
        word = _plain(token)
        if word:
            raw.append(token)
            words.append(word)
            starts.append(begins)
            ends.append(bool(_POSSESSIVE.search(token)))
        elif token == "," and ends:
            ends[-1] = True
        begins = token in _SENTENCE_END
    marks = _MARK.findall(text)
    return _Question(
        tuple(quotes), tuple(marks), tuple(raw), tuple(words), tuple(starts), tuple(ends)
    )


def _plain(token: str) -> str:
    """A token as a word that can be compared; empty for a sign that says nothing."""
    word = _POSSESSIVE.sub("", token.lower())
    if _is_number(word):
        return _THOUSANDS.sub("", word)
    if word in _SIGNS:
        return _SIGNS[word]
    word = _stem(word)
    return "" if _QUIET.issuperset(word) else _NUMBERS.get(word, word)


def _quotes(a: _Question, b: _Question) -> bool:
    return a.quotes != b.quotes


def _marks(a: _Question, b: _Question) -> bool:
    return a.marks != b.marks


def _identifiers(a: _Question, b: _Question) -> bool:
    one, other = (
        {token for token in question.raw if _IDENTIFIER.match(token)} for question in (a, b)
    )
    return one != other


def _numbers(a: _Question, b: _Question) -> bool:
    one, other = list(_counted(a)), list(_counted(b))
    # In another order only where each is told by what it counts.
    told = all(follower for _, follower in one + other)
    return sorted(one) != sorted(other) if told else one != other


def _counted(question: _Question) -> Iterator[tuple[str, str]]:
    """Each number, and the word behind it unless that is a function word."""
    for word, follower in zip(question.words, (*question.words, "")[1:], strict=True):
        if _is_number(word):
            little = follower in _FUNCTION_WORDS or follower in _ASKING or _is_number(follower)
            yield word, "" if little else _SYNONYMS.get(follower, follower)


def _is_number(word: str) -> bool:
    return word[:1].isdecimal()


def _names(a: _Question, b: _Question) -> bool:
    one, other = list(_named(a)), list(_named(b))
    if not (set(one) <= set(b.words) and set(other) <= set(a.words)):
        return True
    # "WHO", "IT" and "US" are no function words.
    if set(one) & _FUNCTION_WORDS != set(other) & _FUNCTION_WORDS:
        return True
    both = set(one) & set(other)
    # "CO" is no "Co", and "MB" no "Mb".
    loud, louder = (
        {word for token, word in zip(q.raw, q.words, strict=True) if token[1:2].isupper()}
        for q in (a, b)
    )
    if both & (loud ^ louder):
        return True
    return [n for n in one if n in both] != [n for n in other if n in both]


def _named(question: _Question) -> Iterator[str]:
    """Words with a capital letter that no sentence begins with, or with several."""
    for token, word, first in zip(question.raw, question.words, question.starts, strict=True):
        capitals = sum(map(str.isupper, token))
        if capitals > first and token != "I":
            yield word


def _negation(a: _Question, b: _Question) -> bool:
    one, other = (
        sum(word in _NEGATIONS or word.endswith(("n't", "n\u2019t")) for word in question.words)
        for question in (a, b)
    )
    return one != other


def _direction(a: _Question, b: _Question) -> bool:
    one, other = ({_SYNONYMS.get(word, word) for word in q.words} for q in (a, b))
    for row in _TURNS:
        if (one & row) != (other & row) and one & row and other & row:
            return True
    sides = ((a.followers(word), b.followers(word)) for word in _SIDES)
    return any(mine - theirs and theirs - mine for mine, theirs in sides)


def _asked(a: _Question, b: _Question) -> bool:
    if a.asked[0] != b.asked[0]:
        return True
    # "Who is" and "who was", "you" and "I": only where both say so.
    for table in (_TENSES, _PERSONS):
        one, other = ({table[word] for word in q.words if word in table} for q in (a, b))
        if one and other and one != other:
            return True
    one, other = ({_MODES[word] for word in q.words if word in _MODES} for q in (a, b))
    return "should" in one ^ other or {"can", "must"} <= one ^ other


def _words(a: _Question, b: _Question) -> bool:
    if not (a.english and b.english):
        return a.words != b.words
    if not a.content:
        return a.words != b.words
    return b.content not in a.turned and a.content not in b.turned


RULES: dict[str, Callable[[_Question, _Question], bool]] = {
    "quotes": _quotes,
    "marks": _marks,
    "identifiers": _identifiers,
    "numbers": _numbers,
    "names": _names,
    "negation": _negation,
    "direction": _direction,
    "asked": _asked,
    "words": _words,
}
"""What must not differ, by name. Each takes two questions and tells whether it does."""


def difference(asked: str, stored: str, rules: Sequence[str] = tuple(RULES)) -> str | None:
    """The first rule by which two questions may have different answers; none if there is none.

    Args:
        asked: A question.
        stored: Another one.
        rules: Which of ``RULES`` count.
    """
    if asked == stored:
        return None
    if max(len(asked), len(stored)) > MAX_CHARACTERS:
        return "length"
    one, other = _question(asked), _question(stored)
    return next((name for name in rules if RULES[name](one, other)), None)
