"""A model behind any OpenAI-compatible URL.

Speaks the protocol over aiohttp instead of the official client, because the client is on the hot
path of every answer. CPU per streamed answer of 40 chunks at concurrency 32, two cores, busy
machine: openai 3.54 8.9 ms, httpx 0.28 4.7 ms, httpx2 2.16 2.0 ms, aiohttp 3.14 0.5 ms.

Knows nothing of routing. aiohttp is imported when an expert is built.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from experts.base import AnyRequest
from experts.config import OpenAIExpertConfig, cards_of
from experts.errors import (
    ExpertConfigError,
    ExpertError,
    ExpertFailedError,
    ExpertTimeoutError,
    ExpertUnavailableError,
)
from experts.features import check_features
from experts.openai_errors import error_event, error_of_status
from experts.types import ChatRequest, Chunk, ExpertCard, Usage

if TYPE_CHECKING:
    import aiohttp

__all__ = ["OpenAIExpert"]

_HEALTH_TIMEOUT_S = 5.0
_DRAIN_TIMEOUT_S = 0.05
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 8.0
# A single event may hold the log-probabilities of many tokens.
_READ_BUFFER_BYTES = 1 << 20
# Compressing servers hold small pieces of a stream back.
_BASE_HEADERS = {"content-type": "application/json", "accept-encoding": "identity"}
# Fields that are set anew in every request.
_OURS = frozenset({"model", "stream", "stream_options"})


class OpenAIExpert:
    """Asks an OpenAI-compatible API.

    Connections are pooled and belong to the event loop of the first request.

    Args:
        config: Where it is.

    Raises:
        ExpertConfigError: The key's environment variable is not set.
    """

    def __init__(self, config: OpenAIExpertConfig) -> None:
        try:
            import aiohttp
        except ImportError as exc:
            raise ExpertConfigError("engine openai needs aiohttp: pip install aiohttp") from exc
        self._aiohttp = aiohttp
        self._config = config
        self._card = cards_of(config)[0]
        self._url = config.base_url.rstrip("/")
        self._headers = {**config.headers, **_authorization(config)}
        self._proxy = _proxy(self._url)
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    @property
    def card(self) -> ExpertCard:
        """What is publicly known of this expert."""
        return self._card

    async def stream(self, request: AnyRequest, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        """Answer a request piece by piece; see ``experts.base.Expert``.

        A request that does not ask for a stream is sent on as such and answered by one chunk per
        choice: reading an answer of 50 pieces costs both sides more than all the rest. Retryable
        errors before the first chunk are tried again within the deadline. Usage is zero if the
        upstream reports none.
        """
        check_features(self._card, request)
        path, body = self._body(request)
        deadline = time.monotonic() + timeout_s
        for retries in range(self._config.max_retries + 1):
            started = False
            attempt = self._attempt(path, body, request.stream, deadline, timeout_s)
            try:
                async with aclosing(attempt) as chunks:
                    async for chunk in chunks:
                        started = True
                        yield chunk
                return
            except ExpertError as error:
                if started or not error.retryable or retries == self._config.max_retries:
                    raise
                pause = _pause_s(error, retries)
                if pause >= deadline - time.monotonic():
                    raise
            await asyncio.sleep(pause)

    async def check_health(self) -> None:
        """Ask for the list of models; what counts is that the API answers and takes the key."""
        deadline = time.monotonic() + _HEALTH_TIMEOUT_S
        async with self._response("GET", "/models", None, deadline, _HEALTH_TIMEOUT_S) as response:
            if response.status in (401, 403, 429) or response.status >= 500:
                raise await self._refusal(response, _HEALTH_TIMEOUT_S)

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        self._closed = True
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def _attempt(
        self, path: str, body: bytes, stream: bool, deadline: float, timeout_s: float
    ) -> AsyncGenerator[Chunk, None]:
        name, usage, finished = self._card.name, Usage(), False
        parse = _chat_chunk if path == "/chat/completions" else _completion_chunk
        async with self._response("POST", path, body, deadline, timeout_s) as response:
            if response.status != 200:
                raise await self._refusal(response, timeout_s)
            async for event in _events(response) if stream else _whole(response):
                if "error" in event:
                    raise error_event(self._config, event["error"], timeout_s)
                if event.get("usage"):
                    usage = _usage(event["usage"])
                for choice in event.get("choices") or ():
                    chunk = parse(choice)
                    finished = finished or chunk.finish_reason is not None
                    if chunk.text or chunk.tool_calls or chunk.finish_reason or chunk.logprobs:
                        yield chunk
        if not finished:
            raise ExpertFailedError(name, "the upstream's answer ended in the middle")
        yield Chunk(usage=usage)

    def _response(
        self, method: str, path: str, body: bytes | None, deadline: float, timeout_s: float
    ) -> _Response:
        if self._closed:
            raise ExpertUnavailableError(self._card.name, "it is closed")
        if self._session is None:
            self._session = self._aiohttp.ClientSession(
                connector=self._aiohttp.TCPConnector(limit=self._config.max_connections),
                headers={**_BASE_HEADERS, **self._headers},
                cookie_jar=self._aiohttp.DummyCookieJar(),
                read_bufsize=_READ_BUFFER_BYTES,
            )
        timeout = self._aiohttp.ClientTimeout(
            total=max(deadline - time.monotonic(), 0.001),
            sock_connect=self._config.connect_timeout_s,
            ceil_threshold=float("inf"),
        )
        request = self._session.request(
            method, self._url + path, data=body, timeout=timeout, proxy=self._proxy
        )
        return _Response(self._card.name, request, timeout_s)

    async def _refusal(self, response: aiohttp.ClientResponse, timeout_s: float) -> ExpertError:
        text = await response.text(errors="replace")
        return error_of_status(
            self._config, response.status, text, response.headers.get("retry-after"), timeout_s
        )

    def _body(self, request: AnyRequest) -> tuple[str, bytes]:
        given = request.model_fields_set - _OURS
        body = request.model_dump(include=set(given), exclude_none=True, by_alias=True)
        body["model"] = self._config.model
        if request.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if request.token_limit is None and "default_max_tokens" in self._config.model_fields_set:
            body["max_tokens"] = self._config.default_max_tokens
        path = "/chat/completions" if isinstance(request, ChatRequest) else "/completions"
        return path, json.dumps(body, separators=(",", ":")).encode()


class _Response:
    """An aiohttp response whose errors are ours and whose connection is closed if left early."""

    def __init__(self, expert: str, request: Any, timeout_s: float) -> None:
        self._expert = expert
        self._request = request
        self._timeout_s = timeout_s
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            self._response = await self._request
        except Exception as exc:
            raise self._translated(exc) from exc
        assert self._response is not None
        return self._response

    async def __aexit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        assert self._response is not None
        if exc is None:
            self._response.release()
            return
        # A release would read on to reuse the connection; the upstream must stop at once.
        self._response.close()
        if isinstance(exc, Exception) and not isinstance(exc, ExpertError):
            raise self._translated(exc) from exc

    def _translated(self, exc: Exception) -> Exception:
        import aiohttp

        if isinstance(exc, aiohttp.ConnectionTimeoutError):
            return ExpertUnavailableError(self._expert, "no connection to the upstream in time")
        if isinstance(exc, TimeoutError):
            return ExpertTimeoutError(self._expert, self._timeout_s)
        if isinstance(exc, aiohttp.InvalidURL):
            return ExpertConfigError(f"expert {self._expert!r}: base_url is not a URL ({exc})")
        if self._response is None and isinstance(exc, aiohttp.ClientError | OSError):
            return ExpertUnavailableError(self._expert, f"{type(exc).__name__}: {exc}")
        # An answer of another shape than OpenAI's fails wherever it is read first.
        shape = AttributeError | LookupError | TypeError | ValueError
        if isinstance(exc, aiohttp.ClientError | OSError | shape):
            return ExpertFailedError(self._expert, f"{type(exc).__name__}: {exc}")
        return exc


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events up to ``[DONE]``. OpenAI's are one ``data:`` line of JSON each."""
    rest = b""
    async for data in response.content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                await _drain(response)
                return
            if payload:
                yield json.loads(payload)


async def _whole(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The object of a plain answer, as if it were the only event of a stream."""
    yield json.loads(await response.read())


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read the body's end, which follows at once or never, so that the connection is reused."""
    try:
        async with asyncio.timeout(_DRAIN_TIMEOUT_S):
            await response.content.read()
    except TimeoutError:
        response.close()


def _chat_chunk(choice: dict[str, Any]) -> Chunk:
    # Plain answers have a message where streams have deltas; only deltas number their calls.
    message = choice.get("delta") or choice.get("message") or {}
    calls = message.get("tool_calls") or ()
    return Chunk(
        index=choice.get("index", 0),
        text=message.get("content") or message.get("refusal") or "",
        tool_calls=[{"index": i, **call} for i, call in enumerate(calls)] or None,
        finish_reason=choice.get("finish_reason"),
        logprobs=_dense(choice.get("logprobs")),
    )


def _completion_chunk(choice: dict[str, Any]) -> Chunk:
    return Chunk(
        index=choice.get("index", 0),
        text=choice.get("text") or "",
        finish_reason=choice.get("finish_reason"),
        logprobs=_dense(choice.get("logprobs")),
    )


def _dense(logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Log-probabilities without empty members, which would replace earlier lists when merged."""
    return {key: value for key, value in (logprobs or {}).items() if value} or None


def _usage(usage: dict[str, Any]) -> Usage:
    return Usage.of(usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)


def _pause_s(error: ExpertError, retries: int) -> float:
    wanted = getattr(error, "retry_after_s", 0.0)
    backoff = min(_FIRST_BACKOFF_S * 2.0**retries, _LONGEST_BACKOFF_S)
    # Jitter keeps replicas that failed together from coming back together.
    return max(wanted, backoff * random.uniform(0.5, 1.0))


def _authorization(config: OpenAIExpertConfig) -> dict[str, str]:
    if config.api_key_env is None:
        return {}
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ExpertConfigError(
            f"expert {config.name!r} reads its key from the environment variable "
            f"{config.api_key_env}, which is not set"
        )
    return {"authorization": f"Bearer {key}"}


def _proxy(url: str) -> str | None:
    """The environment's proxy for a URL, looked up once instead of in every request."""
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    return getproxies().get(parts.scheme)
