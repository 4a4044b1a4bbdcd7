"""From tokens to chunks: text, stop texts and log-probabilities of one answer.

Lives in the decode thread and hands chunks to an asyncio queue. Knows no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from experts.streaming_text import StopFilter, TokenText
from experts.types import Chunk

if TYPE_CHECKING:
    from experts.sampling import Drawn

__all__ = ["AnswerWriter", "Piece"]

Piece = Chunk | Exception


class AnswerWriter:
    """Writes the answer of one row; a ``experts.decoding.Sink``.

    Args:
        index: Which of the request's answers this is.
        pieces: Where its chunks go, on the running event loop.
        decode: Text of several token ids, without special tokens.
        end_ids: Tokens that end an answer and are not part of it.
        stop_texts: Texts that end it and are not part of it.
        chat_logprobs: Shape of log-probabilities: those of chat or of text completions.
    """

    def __init__(
        self,
        index: int,
        pieces: asyncio.Queue[Piece],
        decode: Callable[[list[int]], str],
        *,
        end_ids: frozenset[int],
        stop_texts: Sequence[str],
        chat_logprobs: bool,
    ) -> None:
        self._index = index
        self._pieces = pieces
        self._loop = asyncio.get_running_loop()
        self._decode = decode
        self._text = TokenText(decode)
        self._stops = StopFilter(stop_texts)
        self._end_ids = end_ids
        self._chat_logprobs = chat_logprobs
        self._drawn: list[Drawn] = []
        self._offset = 0
        self._peers: dict[str, float] | None = None

    def token(self, drawn: Drawn, finish_reason: str | None) -> bool:
        """Take a token; return whether a stop text ended the answer."""
        text = ""
        if drawn.token_id not in self._end_ids:
            text = self._stops.feed(self._text.feed(drawn.token_id))
            if drawn.logprob is not None:
                self._drawn.append(drawn)
        if finish_reason and not self._stops.stopped:
            text += self._stops.feed(self._text.flush())
            text += self._stops.flush()
        if self._stops.stopped:
            finish_reason = "stop"
        if text or finish_reason:
            peers, self._peers = self._peers, None
            chunk = Chunk(
                self._index, text, None, finish_reason, logprobs=self._logprobs(), peers=peers
            )
            self._send(chunk)
        return self._stops.stopped

    def listens_to(self, peers: Mapping[str, float]) -> None:
        """Say with the next chunk whom the answer's writer listens to."""
        self._peers = dict(peers)

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        with suppress(RuntimeError):
            self._send(error)

    def _send(self, piece: Piece) -> None:
        # Raises RuntimeError if the loop is closed: nobody reads this answer, so the row may go.
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def _logprobs(self) -> dict[str, Any] | None:
        if not self._drawn:
            return None
        drawn, self._drawn = self._drawn, []
        return self._chat(drawn) if self._chat_logprobs else self._plain(drawn)

    def _chat(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._entry(one.token_id, one.logprob),
                    "top_logprobs": [self._entry(*other) for other in one.top],
                }
                for one in drawn
            ]
        }

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        token = self._decode([token_id])
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    def _plain(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        tokens = [self._decode([one.token_id]) for one in drawn]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in drawn],
            "top_logprobs": [
                {self._decode([other.token_id]): other.logprob for other in one.top}
                for one in drawn
            ],
            "text_offset": offsets,
        }
