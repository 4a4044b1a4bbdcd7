from __future__ import annotations

import pytest

from experts.streaming_text import StopFilter, TokenText


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("no stop here", ["END"], "no stop here"),
        ("before END after", ["END"], "before "),
        ("aab", ["ab"], "a"),
        ("EN EEND", ["END", "zz"], "EN E"),
        ("ends with EN", ["END"], "ends with EN"),
        ("first b then a", ["a", "b"], "first "),
        ("END", ["END"], ""),
        ("text", [], "text"),
    ],
)
def test_stop_filter_passes_what_comes_before_the_first_stop(text, stops, expected, size):
    stop_filter = StopFilter(stops)
    passed = "".join(
        stop_filter.feed(text[at : at + size]) for at in range(0, len(text), size)
    ) + stop_filter.flush()  # fmt: skip
    assert passed == expected
    assert stop_filter.stopped is (expected != text)


def test_token_text_waits_for_whole_characters():
    encoded = "a🎉é".encode()
    text = TokenText(lambda ids: bytes(ids).decode(errors="replace"))
    pieces = [text.feed(byte) for byte in encoded]
    assert pieces == ["a", "", "", "", "🎉", "", "é"]
    assert text.flush() == ""


def test_token_text_flushes_an_incomplete_character():
    text = TokenText(lambda ids: bytes(ids).decode(errors="replace"))
    assert [text.feed(byte) for byte in "🎉".encode()[:2]] == ["", ""]
    assert text.flush() == "\N{REPLACEMENT CHARACTER}"
