"""Text that arrives in pieces: stop texts across pieces, tokens that are parts of characters.

Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["StopFilter", "TokenText"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class StopFilter:
    """Passes text on up to the first stop text, which it never passes on, not even in part.

    Args:
        stop_texts: What ends the answer.

    Attributes:
        stopped: Whether a stop text has occurred; later text is dropped.

    Examples:
        >>> stops = StopFilter(["END"])
        >>> stops.feed("on and E"), stops.feed("N"), stops.feed("D more"), stops.stopped
        ('on and ', '', '', True)
    """

    def __init__(self, stop_texts: Sequence[str]) -> None:
        self.stopped = False
        self._stop_texts = tuple(stop_texts)
        self._held = ""

    def feed(self, text: str) -> str:
        """Take new text, return what may be passed on."""
        if not self._stop_texts:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stop_texts if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        passed = len(text) - self._possible_start(text)
        self._held = text[passed:]
        return text[:passed]

    def flush(self) -> str:
        """Return what was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of ``text`` that may turn out to be a stop text's start."""
        longest = 0
        for stop in self._stop_texts:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class TokenText:
    """Turns token ids into text one by one; a character split over tokens comes out whole.

    Args:
        decode: Text of several token ids.

    Attributes:
        token_ids: The ids taken so far.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.token_ids: list[int] = []
        self._decode = decode
        # Text of ids[start:done] is known. Decoding goes back to start, not to done, because
        # tokenizers strip or keep a leading space depending on what comes before.
        self._start = 0
        self._done = 0

    def feed(self, token_id: int) -> str:
        """Take one more token, return the text that has become certain."""
        self.token_ids.append(token_id)
        new = self._new_text()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._advance()
        return new

    def flush(self) -> str:
        """Return what is left at the end; an incomplete character as the replacement character."""
        new = self._new_text()
        self._advance()
        return new

    def _new_text(self) -> str:
        known = self._decode(self.token_ids[self._start : self._done])
        return self._decode(self.token_ids[self._start :])[len(known) :]

    def _advance(self) -> None:
        self._start, self._done = self._done, len(self.token_ids)
