"""One chat or text completion over HTTP, plain or streamed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from experts.base import AnyRequest
from experts.types import ChatRequest, Chunk, Usage, collect
from orchestrator.core import Orchestrator
from orchestrator.decision import Decision, RequestContext
from orchestrator.errors import BadRequestError, OverloadedError
from orchestrator.http.errors import error_object, error_response, status_of
from orchestrator.http.openai_shapes import AnswerShape
from orchestrator.http.streaming import (
    DONE,
    ClientLeft,
    EventStream,
    event,
    unless_client_leaves,
)
from orchestrator.telemetry import Telemetry

__all__ = ["CLIENT_LEFT_STATUS", "Generation", "cost_quality_header", "decision_headers"]

logger = logging.getLogger("collegium.http")

CLIENT_LEFT_STATUS = 499
PREFIX = "x-collegium-"
COST_QUALITY_HEADER = PREFIX + "cost-quality"
DEBUG_HEADER = PREFIX + "debug"


def decision_headers(
    decision: Decision, context: RequestContext | None, *, debug: bool
) -> dict[str, str]:
    """What a response says of its decision; the whole of it if ``debug``."""
    values = {
        "decision-id": decision.id,
        "route": decision.route,
        "policy": decision.policy,
        "category": decision.category,
        "confidence": None if decision.confidence is None else f"{decision.confidence:.4f}",
    }
    if context is not None:
        values["model"] = context.path[-1] if context.path else None
        values["path"] = ">".join(context.path) or None
        values["overhead-ms"] = f"{context.overhead_ms:.2f}"
    if debug:
        values["trace"] = json.dumps(asdict(decision), separators=(",", ":"))
    # Category names are users' own words; headers hold ASCII only.
    return {
        PREFIX + name: value.encode("ascii", "backslashreplace").decode()
        for name, value in values.items()
        if value is not None
    }


def cost_quality_header(request: Request) -> float | None:
    """The request's own cost-quality knob, if it sends one."""
    text = request.headers.get(COST_QUALITY_HEADER)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise BadRequestError(
            f"{COST_QUALITY_HEADER}: must be a number from 0 to 1, got {text!r}",
            COST_QUALITY_HEADER,
        )
    return value


class Generation:
    """Answers checked requests; one instance serves all.

    Args:
        orchestrator: Who decides and has requests answered.
        telemetry: Who counts.
    """

    def __init__(self, orchestrator: Orchestrator, telemetry: Telemetry) -> None:
        self._orchestrator = orchestrator
        self._telemetry = telemetry
        self._limits = orchestrator.config.server.limits
        self._fingerprint = orchestrator.config.fingerprint
        self._in_flight = 0

    def admit(self) -> None:
        """Refuse if too many requests are in work already."""
        if self._in_flight >= self._limits.max_in_flight:
            raise OverloadedError(self._limits.max_in_flight)

    async def respond(self, http: Request, request: AnyRequest) -> Response:
        """Answer one request. Everything that fails becomes an error object."""
        self._enter()
        context = RequestContext(deadline=time.monotonic() + self._limits.timeout_s)
        decision: Decision | None = None
        response: Response | None = None
        try:
            decision = await self._orchestrator.decide(
                request, cost_quality=cost_quality_header(http), context=context
            )
            self._telemetry.decided(decision, context)
            debug = http.headers.get(DEBUG_HEADER) == "1"
            begin = self._stream if request.stream else self._plain
            response = await begin(http, request, decision, context, debug)
            return response
        except ClientLeft:
            self._telemetry.finished(request.model, context, CLIENT_LEFT_STATUS)
            return Response(status_code=CLIENT_LEFT_STATUS)
        except Exception as error:
            self._telemetry.finished(_known_model(decision, request), context, status_of(error))
            headers = decision_headers(decision, context, debug=False) if decision else None
            return error_response(error, headers, decision.id if decision else None)
        finally:
            if not isinstance(response, EventStream):
                self._leave()

    def _enter(self) -> None:
        self._in_flight += 1
        self._telemetry.in_flight.set(self._in_flight)

    def _leave(self) -> None:
        self._in_flight -= 1
        self._telemetry.in_flight.set(self._in_flight)

    async def _plain(
        self,
        http: Request,
        request: AnyRequest,
        decision: Decision,
        context: RequestContext,
        debug: bool,
    ) -> Response:
        chunks = self._orchestrator.run(request, decision, context)
        completion = await unless_client_leaves(http, collect(chunks))
        self._telemetry.first_chunk(context)
        self._telemetry.finished(request.model, context, 200, completion.usage)
        body = self._shape(request, context).whole(completion)
        return JSONResponse(body, headers=decision_headers(decision, context, debug=debug))

    async def _stream(
        self,
        http: Request,
        request: AnyRequest,
        decision: Decision,
        context: RequestContext,
        debug: bool,
    ) -> Response:
        chunks = self._orchestrator.run(request, decision, context)
        try:
            # Headers name the expert that answers, which is certain with its first chunk only.
            first = await unless_client_leaves(http, anext(chunks, Chunk(finish_reason="stop")))
        except BaseException:
            await chunks.aclose()  # type: ignore[attr-defined]
            raise
        self._telemetry.first_chunk(context)
        events = self._events(request, first, chunks, context, decision.id)
        return EventStream(events, decision_headers(decision, context, debug=debug))

    async def _events(
        self,
        request: AnyRequest,
        first: Chunk,
        rest: AsyncIterator[Chunk],
        context: RequestContext,
        decision_id: str,
    ) -> AsyncIterator[bytes]:
        shape = self._shape(request, context)
        begun: set[int] = set()
        usage: Usage | None = None
        status = CLIENT_LEFT_STATUS
        try:
            async with aclosing(_chain(first, rest)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    usage = chunk.usage or usage
                    if shape.chat and chunk.index not in begun:
                        begun.add(chunk.index)
                        yield event(shape.role(chunk.index))
                    if chunk.text or chunk.tool_calls or chunk.finish_reason or chunk.logprobs:
                        yield event(shape.piece(chunk))
            if request.stream_options and request.stream_options.include_usage:
                yield event(shape.usage(usage or Usage()))
            yield DONE
            status = 200
        except Exception as error:
            status = status_of(error)
            logger.error("stream broke off (%s)", decision_id, exc_info=error)
            yield event(error_object(error, decision_id))
        finally:
            self._leave()
            self._telemetry.finished(request.model, context, status, usage)

    def _shape(self, request: AnyRequest, context: RequestContext) -> AnswerShape:
        return AnswerShape(isinstance(request, ChatRequest), context.path[-1], self._fingerprint)


def _known_model(decision: Decision | None, request: AnyRequest) -> str:
    # Names nobody defined must not become label values: anyone could make up millions.
    return request.model if decision else ""


async def _chain(first: Chunk, rest: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    async with aclosing(rest) as chunks:  # type: ignore[type-var]
        yield first
        async for chunk in chunks:
            yield chunk
