"""One chat or text completion over HTTP, plain or streamed."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from experts.base import AnyRequest
from experts.errors import ExpertTimeoutError
from experts.types import ChatRequest, Completion, Usage, collect
from orchestrator.core import Orchestrator
from orchestrator.decision import Decision, RequestContext
from orchestrator.http.admission import Admission
from orchestrator.http.body import parse_body
from orchestrator.http.encoding import JSONBytes, encode
from orchestrator.http.errors import error_object, error_response, status_of
from orchestrator.http.openai_shapes import AnswerShape
from orchestrator.http.requests import PREFIX, ChatBody, CompletionBody, options_of
from orchestrator.http.streaming import (
    DONE,
    ClientLeft,
    EventStream,
    Feed,
    comment,
    event,
    unless_client_leaves,
)
from orchestrator.memory.budget import Budget
from orchestrator.memory.decisions import DecisionRecord
from orchestrator.options import RoutingOptions
from orchestrator.telemetry import Telemetry

__all__ = ["CLIENT_LEFT_STATUS", "DEBUG_HEADER", "Generation", "decision_headers"]

logger = logging.getLogger("collegium.http")

CLIENT_LEFT_STATUS = 499
DEBUG_HEADER = PREFIX + "debug"

# Experts keep the deadline themselves; one that does not is stopped this much later.
GRACE_S = 0.5

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")


def decision_headers(
    decision: Decision, context: RequestContext | None, *, debug: bool
) -> dict[str, str]:
    """What a response says of its decision; the whole of it if ``debug``."""
    values = {
        "decision-id": decision.id,
        "route": decision.route,
        "policy": decision.policy,
        "strategy": decision.strategy if decision.route else None,
        "category": decision.category,
        "confidence": None if decision.confidence is None else f"{decision.confidence:.4f}",
    }
    if context is not None:
        values["model"] = context.expert
        values["path"] = ">".join(context.path) or None
        values["peers"] = _weights(context.peers)
        if context.mixture is not None:
            values["adapters"] = _weights(context.mixture.shares)
            values["merging"] = context.mixture.merging
        if all(call.seconds is not None for call in context.calls):
            values["cost"] = f"{context.cost_usd:.6g}"
        values["cache"] = context.cache.state if context.cache else None
        values["overhead-ms"] = f"{context.overhead_ms:.2f}"
    if debug:
        values["trace"] = encode(decision).decode()
    return {PREFIX + name: _header(value) for name, value in values.items() if value is not None}


def _weights(weights: Mapping[str, float] | None) -> str | None:
    if weights is None:
        return None
    return ",".join(f"{name}={weight:.4f}" for name, weight in weights.items()) or "none"


def _header(text: str) -> str:
    # Category names are users' own words; headers hold one line of ASCII.
    if text.isascii() and text.isprintable():
        return text
    # As JSON escapes them: the trace is JSON.
    plain = _CONTROL_CHARACTERS.sub(" ", text)
    return "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in plain)


@dataclass(slots=True)
class _Turn:
    """One request on its way through.

    Attributes:
        status: The HTTP status as telemetry counts it; a stream that broke off has its error's.
    """

    context: RequestContext
    request: AnyRequest | None = None
    decision: Decision | None = None
    status: int = CLIENT_LEFT_STATUS
    usage: Usage | None = None
    ended: bool = False

    def take(self, options: RoutingOptions) -> None:
        """Keep to the request's own deadline and cost limit, and know its session."""
        if options.deadline_ms is not None:
            own = self.context.received + options.deadline_ms / 1000
            self.context.deadline = min(self.context.deadline, own)
        self.context.max_cost_usd = options.max_cost
        self.context.session_id = options.session_id

    @property
    def model(self) -> str:
        """What the request asked for."""
        # Names nobody defined must not become label values: anyone could make up millions.
        if self.request is None or self.decision is None:
            return ""
        return self.decision.route or self.request.model


class Generation:
    """Answers requests; one instance serves all.

    Args:
        orchestrator: Who decides and has requests answered.
        telemetry: Who counts.
        admission: How many requests may be in work.
    """

    def __init__(
        self, orchestrator: Orchestrator, telemetry: Telemetry, admission: Admission
    ) -> None:
        self._orchestrator = orchestrator
        self._telemetry = telemetry
        self._admission = admission
        self._server = orchestrator.config.server
        self._limits = self._server.limits
        self._fingerprint = orchestrator.config.fingerprint
        budget = orchestrator.config.server.budget
        self._budget = Budget(orchestrator.memory, budget.usd_per_day) if budget else None

    async def respond(
        self, http: Request, model: type[ChatBody] | type[CompletionBody], scope: str
    ) -> Response:
        """Answer one request. Everything that fails becomes an error object."""
        deadline = time.monotonic() + self._limits.timeout_s
        turn = _Turn(RequestContext(deadline=deadline, scope=scope))
        try:
            self._admission.enter()
        except Exception as error:
            refusal = self._failed(turn, error)
            self._telemetry.finished(turn.model, turn.context, turn.status)
            return refusal
        response: Response | None = None
        try:
            response = await self._answer(http, model, turn)
        except ClientLeft:
            response = Response(status_code=CLIENT_LEFT_STATUS)
        except Exception as error:
            response = self._failed(turn, error)
        finally:
            # A stream goes on after this, and ends itself.
            if not isinstance(response, EventStream):
                self._end(turn)
        return response

    def _failed(self, turn: _Turn, error: Exception) -> Response:
        turn.status = status_of(error)
        if turn.decision is None:
            return error_response(error)
        headers = decision_headers(turn.decision, turn.context, debug=False)
        return error_response(error, headers, turn.decision.id)

    def _end(self, turn: _Turn) -> None:
        if turn.ended:
            return
        turn.ended = True
        self._admission.leave()
        self._telemetry.finished(turn.model, turn.context, turn.status)
        self._remember(turn)

    def _remember(self, turn: _Turn) -> None:
        context = turn.context
        if turn.request is None or turn.decision is None:
            return
        record = DecisionRecord.of(
            turn.decision,
            context,
            model=turn.request.model,
            status=turn.status,
            session_id=turn.context.session_id,
        )
        self._orchestrator.decisions.add(record)
        if self._budget is not None:
            self._budget.spend(context.scope, context.cost_usd)

    async def _answer(
        self, http: Request, model: type[ChatBody] | type[CompletionBody], turn: _Turn
    ) -> Response:
        limits = self._limits
        turn.request = request = await parse_body(
            http, model, max_bytes=limits.max_body_bytes, timeout_s=limits.timeout_s
        )
        options = options_of(http, request)
        # A header's too: engines that schedule by it read it from the request.
        request.priority = options.priority
        turn.take(options)
        if self._budget is not None:
            await self._budget.check(turn.context.scope)
        if options.priority == "low":
            self._admission.check_low_priority()
        decision = await self._orchestrator.recall(
            request, options, turn.context
        ) or await self._orchestrator.decide(request, options=options, context=turn.context)
        turn.decision = decision
        if decision.route is None and request.top_k is not None and request.model_extra is not None:
            request.model_extra["top_k"] = request.top_k
        self._telemetry.decided(decision, turn.context)
        begin = self._stream if request.stream else self._plain
        return await begin(http, request, decision, turn)

    async def _plain(
        self, http: Request, request: AnyRequest, decision: Decision, turn: _Turn
    ) -> Response:
        completion = await unless_client_leaves(http, self._collected(request, decision, turn))
        turn.status = 200
        body = self._shape(request, decision, turn).whole(completion)
        return JSONBytes(body, headers=self._headers(http, decision, turn))

    async def _collected(self, request: AnyRequest, decision: Decision, turn: _Turn) -> Completion:
        try:
            async with (
                asyncio.timeout(turn.context.remaining_s + GRACE_S),
                aclosing(self._orchestrator.run(request, decision, turn.context)) as chunks,
            ):
                return await collect(chunks)
        except TimeoutError as error:
            raise self._late(decision, turn) from error

    async def _stream(
        self, http: Request, request: AnyRequest, decision: Decision, turn: _Turn
    ) -> Response:
        feed = Feed(self._events(request, decision, turn), http.receive)
        try:
            # Headers name the expert that answers, which is certain with its first chunk only.
            await feed.begin()
        except BaseException:
            await feed.aclose()
            raise
        # Where the task is cancelled before its first step, nothing inside it runs.
        feed.task.add_done_callback(lambda _: self._end(turn))
        return EventStream(feed, self._headers(http, decision, turn))

    async def _events(
        self, request: AnyRequest, decision: Decision, turn: _Turn
    ) -> AsyncGenerator[bytes, None]:
        """The answer's events. Errors are raised up to the first event, and an event later."""
        shape: AnswerShape | None = None
        waiting = False
        begun, ended = set[int](), set[int]()
        try:
            async with (
                asyncio.timeout(turn.context.remaining_s + GRACE_S),
                aclosing(self._orchestrator.run(request, decision, turn.context)) as chunks,
            ):
                async for chunk in chunks:
                    if chunk.progress is not None:
                        waiting = True
                        yield comment(chunk.progress)
                        continue
                    if shape is None:
                        self._telemetry.first_chunk(turn.context)
                        shape = self._shape(request, decision, turn)
                    turn.usage = chunk.usage or turn.usage
                    if shape.chat and chunk.index not in begun:
                        begun.add(chunk.index)
                        yield event(shape.role(chunk.index))
                    if chunk.text or chunk.tool_calls or chunk.finish_reason or chunk.logprobs:
                        yield event(shape.piece(chunk))
                    if chunk.finish_reason:
                        ended.add(chunk.index)
            for last in self._last_events(request, decision, shape, turn):
                yield last
        except Exception as error:
            shown = self._late(decision, turn) if isinstance(error, TimeoutError) else error
            if len(ended) == _answers_wanted(request):
                # Whoever has all of its answer must not be told that it failed.
                logger.warning("only counts of tokens are missing (%s): %s", decision.id, shown)
                for last in self._last_events(request, decision, shape, turn):
                    yield last
                return
            turn.status = status_of(shown)
            if shape is None and not waiting:
                raise shown from (None if shown is error else error)
            logger.error("stream broke off (%s)", decision.id, exc_info=error)
            yield event(encode(error_object(shown, decision.id)))
        finally:
            self._end(turn)

    def _last_events(
        self, request: AnyRequest, decision: Decision, shape: AnswerShape | None, turn: _Turn
    ) -> Iterator[bytes]:
        if request.stream_options and request.stream_options.include_usage:
            usage = turn.usage or turn.context.usage
            yield event((shape or self._shape(request, decision, turn)).usage(usage))
        yield DONE
        turn.status = 200

    def _late(self, decision: Decision, turn: _Turn) -> ExpertTimeoutError:
        context = turn.context
        name = context.expert or decision.experts[0]
        return ExpertTimeoutError(name, round(context.deadline - context.received, 3))

    def _shape(self, request: AnyRequest, decision: Decision, turn: _Turn) -> AnswerShape:
        return AnswerShape(
            chat=isinstance(request, ChatRequest),
            decision_id=decision.id,
            model=turn.context.expert or "",
            fingerprint=self._fingerprint,
        )

    def _headers(self, http: Request, decision: Decision, turn: _Turn) -> dict[str, str]:
        debug = http.headers.get(DEBUG_HEADER) == "1"
        return decision_headers(decision, turn.context, debug=debug)


def _answers_wanted(request: AnyRequest) -> int:
    if isinstance(request, ChatRequest) or isinstance(request.prompt, str):
        return request.n
    return request.n * len(request.prompt)
