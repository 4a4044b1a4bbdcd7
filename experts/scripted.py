"""An expert that follows a script: for tests, demonstrations and load tests.

Words stand for tokens: they are counted, limited and given log-probabilities. Without delays an
answer costs a few microseconds per piece and never waits. As a stand-in for a member of a latent
collaboration an expert says that it listens to the request's ``peers``, as one for a model with
adapters that it mixes the request's ``adapters``, and keeps to its script.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

from experts.base import AnyRequest
from experts.config import (
    Fault,
    ScriptedExpertConfig,
    ScriptedToolCall,
    ScriptRule,
    cards_of,
)
from experts.errors import (
    ContextLengthError,
    ExpertAuthError,
    ExpertError,
    ExpertFailedError,
    ExpertOverloadedError,
    ExpertTimeoutError,
    ExpertUnavailableError,
    InvalidRequestError,
    UnsupportedFeatureError,
)
from experts.features import check_features, required_features
from experts.mixtures import mixture_of
from experts.types import ChatRequest, Chunk, ExpertCard, Usage

__all__ = ["ScriptedExpert"]

_RECORDED_REQUESTS = 1000
_WORD = re.compile(r"\s*\S+")
# One constant for every word: plausible, and recognisable in tests.
_LOGPROB = -0.25


class _Script(NamedTuple):
    """An answer cut into pieces: each its text and its words."""

    pieces: tuple[tuple[str, tuple[str, ...]], ...]
    finish_reason: str
    words: int


class ScriptedExpert:
    """Answers by its config's rules.

    Args:
        config: What to answer.

    Attributes:
        requests: The latest requests it was asked, oldest first.
        active: Answers being written.
    """

    def __init__(self, config: ScriptedExpertConfig) -> None:
        self.requests: deque[AnyRequest] = deque(maxlen=_RECORDED_REQUESTS)
        self.active = 0
        self._config = config
        self._card = cards_of(config)[0]
        self._rules = [(re.compile(rule.match), rule) for rule in config.rules]
        self._faults = _Faults(config)
        self._closed = False

    @property
    def card(self) -> ExpertCard:
        """What is publicly known of this expert."""
        return self._card

    async def stream(self, request: AnyRequest, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        """Answer a request piece by piece; see ``experts.base.Expert``."""
        self.requests.append(request)
        await self.check_health()
        texts = _texts(request)
        prompt_words = self._check(request)
        mixture = mixture_of(request)
        rule = next(rule for pattern, rule in self._rules if pattern.search(texts[0]))
        fault = self._faults.next()
        rule = _faulty(rule, fault, request)
        clock = _Clock(self._card.name, timeout_s)
        self.active += 1
        try:
            await clock.sleep(rule.delay_s)
            if rule.error is not None and rule.error_after_chunks == 0:
                raise self._error(rule.error, timeout_s)
            if rule.tool_call and isinstance(request, ChatRequest) and _wants_tools(request):
                words = 0
                for index in range(request.n):
                    chunk = _tool_call(index, rule.tool_call, fault)
                    chunk.mixture, mixture = mixture, None
                    yield chunk
                if fault == "broken":
                    raise self._error("failed", timeout_s)
            else:
                scripts = [self._script(rule, text, request, fault) for text in texts]
                words = request.n * sum(script.words for script in scripts)
                async for chunk in self._play(scripts, rule, request, clock):
                    chunk.mixture, mixture = mixture, None
                    yield chunk
        finally:
            self.active -= 1
        yield Chunk(usage=Usage.of(prompt_words, words))

    async def check_health(self) -> None:
        """Return unless it is closed."""
        if self._closed:
            raise ExpertUnavailableError(self._card.name, "it is closed")

    async def aclose(self) -> None:
        """Take no more requests."""
        self._closed = True

    async def _play(
        self, scripts: list[_Script], rule: ScriptRule, request: AnyRequest, clock: _Clock
    ) -> AsyncGenerator[Chunk, None]:
        answers = [script for script in scripts for _ in range(request.n)]
        peers = _peers(request)
        report = _logprobs_wanted(request)
        for step, pieces in enumerate(zip_longest(*(answer.pieces for answer in answers))):
            if step:
                await clock.sleep(rule.chunk_delay_s)
            if rule.error is not None and step == rule.error_after_chunks:
                raise self._error(rule.error, clock.timeout_s)
            lost = bool(peers) and step == rule.peer_lost_after_chunks
            if peers and lost:
                peers = dict(list(peers.items())[1:])
            for index, piece in enumerate(pieces):
                if piece is None:
                    continue
                answer = answers[index]
                finish_reason = answer.finish_reason if step == len(answer.pieces) - 1 else None
                logprobs = _logprobs(request, piece[1]) if report else None
                said = peers if step == 0 or lost else None
                yield Chunk(index, piece[0], None, finish_reason, logprobs, peers=said)

    def _check(self, request: AnyRequest) -> int:
        """Refuse what it cannot serve; return the number of words of the prompt."""
        check_features(self._card, request)
        if not isinstance(request, ChatRequest) and request.echo:
            raise UnsupportedFeatureError(self._card.name, "echo")
        if isinstance(request, ChatRequest):
            words = sum(len(message.text.split()) for message in request.messages)
        else:
            words = sum(len(text.split()) for text in _texts(request))
        limit = self._card.context_length
        if limit is not None and words + (request.token_limit or 0) > limit:
            raise ContextLengthError(self._card.name, words + (request.token_limit or 0), limit)
        return words

    def _script(
        self, rule: ScriptRule, text: str, request: AnyRequest, fault: Fault | None
    ) -> _Script:
        answer = rule.answer.replace("{text}", text)
        limit = request.token_limit or self._config.default_max_tokens
        if fault == "truncated":
            limit = min(limit, max(1, len(answer.split()) // 2))
        return _cut(answer, limit, request.stop_texts, rule.chunks)

    def _error(self, kind: str, timeout_s: float) -> ExpertError:
        name, reason = self._card.name, "its script says so"
        errors: dict[str, ExpertError] = {
            "unavailable": ExpertUnavailableError(name, reason),
            "timeout": ExpertTimeoutError(name, timeout_s),
            "overloaded": ExpertOverloadedError(name),
            "failed": ExpertFailedError(name, reason),
            "auth": ExpertAuthError(name),
            "invalid": InvalidRequestError(reason, "messages"),
        }
        return errors[kind]


class _Faults:
    """Which answers go wrong, and how."""

    def __init__(self, config: ScriptedExpertConfig) -> None:
        self._config = config.faults
        self._random = random.Random(f"{config.faults and config.faults.seed} {config.name}")

    def next(self) -> Fault | None:
        """What is wrong with the next answer, if anything is."""
        if self._config is None or self._random.random() >= self._config.share:
            return None
        return self._random.choice(self._config.kinds)


def _faulty(rule: ScriptRule, fault: Fault | None, request: AnyRequest) -> ScriptRule:
    """The rule with what the fault makes of it, as far as that is a matter of the rule."""
    changes: dict[str, Any] = {}
    if fault == "error":
        changes = {"error": "failed", "error_after_chunks": 0}
    elif fault == "timeout":
        changes = {"error": "timeout", "error_after_chunks": 0}
    elif fault == "hang":
        changes = {"delay_s": math.inf}
    elif fault == "broken":
        pieces = max(2, rule.chunks or len(rule.answer.split()))
        changes = {"error": "failed", "error_after_chunks": 1, "chunks": pieces}
    elif fault == "garbage" and "json_schema" in required_features(request):
        changes = {"answer": rule.answer[: len(rule.answer) // 2] + "}{"}
    return rule.model_copy(update=changes) if changes else rule


class _Clock:
    """Sleeps, but not beyond the deadline."""

    def __init__(self, expert: str, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._expert = expert
        self._deadline = time.monotonic() + timeout_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0 and self.timeout_s > 0:
            return
        left = self._deadline - time.monotonic()
        await asyncio.sleep(max(0.0, min(seconds, left)))
        if seconds >= left:
            raise ExpertTimeoutError(self._expert, self.timeout_s)


# The same answers come again and again in load tests, where cutting them would be the main cost.
@lru_cache(maxsize=1024)
def _cut(answer: str, limit: int, stop_texts: tuple[str, ...], chunks: int | None) -> _Script:
    words = _WORD.findall(answer)
    rest = answer[sum(map(len, words)) :]
    finish_reason = "length" if len(words) > limit else "stop"
    text = "".join(words[:limit]) + (rest if finish_reason == "stop" else "")
    found = [at for stop in stop_texts if (at := text.find(stop)) >= 0]
    if found:
        text, finish_reason = text[: min(found)], "stop"
    words = _WORD.findall(text)
    count = chunks or max(1, len(words))
    units = words if len(words) >= count else list(text)
    pieces = []
    for step in range(count):
        part = units[step * len(units) // count : (step + 1) * len(units) // count]
        own = words[step * len(words) // count : (step + 1) * len(words) // count]
        pieces.append(("".join(part), tuple(own)))
    if units is words:
        # White space after the last word belongs to no word.
        pieces[-1] = (pieces[-1][0] + text[sum(map(len, words)) :], pieces[-1][1])
    return _Script(tuple(pieces), finish_reason, len(words))


def _texts(request: AnyRequest) -> list[str]:
    """The last user message, or the prompts."""
    if not isinstance(request, ChatRequest):
        return [request.prompt] if isinstance(request.prompt, str) else request.prompt
    spoken = (m.text for m in reversed(request.messages) if m.role == "user")
    return [next(spoken, request.messages[-1].text)]


def _peers(request: AnyRequest) -> dict[str, float] | None:
    """Whom the request has it listen to, with their gates."""
    given = (request.model_extra or {}).get("peers")
    if given is None:
        return None
    gates = given.values() if isinstance(given, dict) else [None]
    if not all(isinstance(gate, int | float) and 0 < gate <= 1 for gate in gates):
        raise InvalidRequestError("peers: must be names with gates in (0, 1]", "peers")
    return dict(given)


def _wants_tools(request: ChatRequest) -> bool:
    return bool(request.tools) and request.tool_choice != "none"


def _tool_call(index: int, call: ScriptedToolCall, fault: Fault | None) -> Chunk:
    arguments = json.dumps(call.arguments)
    if fault in ("truncated", "garbage", "broken"):
        arguments = arguments[: len(arguments) // 2]
    reasons = {"truncated": "length", "broken": None}
    delta = {
        "index": 0,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
    finish_reason = reasons.get(fault or "", "tool_calls")
    return Chunk(index, tool_calls=[delta], finish_reason=finish_reason)


def _logprobs_wanted(request: AnyRequest) -> bool:
    return request.logprobs is not None and request.logprobs is not False


def _logprobs(request: AnyRequest, words: tuple[str, ...]) -> dict[str, Any] | None:
    if not words:
        return None
    if not isinstance(request, ChatRequest):
        return {
            "tokens": list(words),
            "token_logprobs": [_LOGPROB] * len(words),
            "top_logprobs": [{word: _LOGPROB} if request.logprobs else {} for word in words],
            "text_offset": [0] * len(words),
        }
    entries = [{"token": w, "logprob": _LOGPROB, "bytes": list(w.encode())} for w in words]
    return {
        "content": [
            {**entry, "top_logprobs": [entry] if request.top_logprobs else []} for entry in entries
        ]
    }
