"""The FastAPI application: endpoints, keys, and an OpenAPI page that is true."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from experts.errors import ExpertError
from orchestrator.core import Orchestrator
from orchestrator.decision import PUBLIC, RequestContext
from orchestrator.embeddings import EmbeddingRequest
from orchestrator.errors import AuthenticationError, RequestError, UnknownModelError
from orchestrator.http import errors, schemas
from orchestrator.http.admission import Admission
from orchestrator.http.body import parse_body
from orchestrator.http.embeddings import EmbeddingsEndpoint
from orchestrator.http.encoding import JSONBytes
from orchestrator.http.generation import DEBUG_HEADER, Generation, decision_headers
from orchestrator.http.requests import OPTION_HEADERS, ChatBody, CompletionBody, options_of
from orchestrator.memory.decisions import DecisionRecord
from orchestrator.memory.feedback import Feedback, FeedbackBody
from orchestrator.telemetry import CONTENT_TYPE_LATEST, Telemetry
from orchestrator.version import version

__all__ = ["create_app"]

_COMPONENTS = "#/components/schemas/{model}"


def create_app(orchestrator: Orchestrator, *, api_keys: Iterable[str] = ()) -> FastAPI:
    """Build the application.

    Args:
        orchestrator: Who decides and has requests answered.
        api_keys: Keys to accept under ``/v1``; none accepts everybody.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await orchestrator.aclose()

    # FastAPI's own page loads its scripts from the internet, which many clusters do not reach.
    app = FastAPIOffline(title="Collegium", version=version(), redoc_url=None, lifespan=lifespan)
    admission = Admission(orchestrator.config.server.limits.max_in_flight)
    telemetry = Telemetry(lambda: admission.in_flight)
    orchestrator.memory.on_error = telemetry.memory_failed
    orchestrator.shadows.has_room = lambda: admission.has_room
    orchestrator.shadows.listener = telemetry.shadowed
    generation = Generation(orchestrator, telemetry, admission)
    keys = [key.encode() for key in api_keys if key]
    for kind in (RequestError, ExpertError, Exception):
        app.add_exception_handler(kind, errors.handle)
    # Starlette's types know handlers of any Exception only.
    app.add_exception_handler(HTTPException, _http_exception)  # type: ignore[arg-type]
    _add_generation(app, generation, keys)
    _add_embeddings(app, EmbeddingsEndpoint(orchestrator, telemetry, admission), keys)
    _add_route(app, orchestrator, admission, keys)
    _add_models(app, orchestrator, keys)
    _add_memory(app, orchestrator, keys)
    _add_experiments(app, orchestrator, keys)
    _add_operations(app, orchestrator, telemetry)
    # FastAPI's documented way to change the page.
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _check_key(request: Request, keys: list[bytes]) -> str:
    """The scope of the request's key; one and the same for all if none is needed."""
    if not keys:
        return PUBLIC
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    # Starlette decodes headers as Latin-1; this gives back the bytes that were sent.
    sent = key.strip().encode("latin-1")
    known = [hmac.compare_digest(sent, accepted) for accepted in keys]
    if scheme.lower() != "bearer" or not any(known):
        raise AuthenticationError
    return hashlib.sha256(b"collegium:" + sent).hexdigest()[:16]


async def _http_exception(request: Request, error: HTTPException) -> JSONBytes:
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONBytes({"error": body}, error.status_code, dict(error.headers or {}))


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schemas.ErrorBody} for status in statuses}


def _parameter(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema,
            "description": description}  # fmt: skip


_GENERATION_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504)
_OPTIONS = [
    _parameter(
        header,
        {"type": "string"},
        f"As the body's {name}, for clients that cannot add fields; the body goes first."
        + (" Several are separated by commas." if name == "allowed_models" else ""),
    )
    for header, name in OPTION_HEADERS.items()
]
_DEBUG = _parameter(
    DEBUG_HEADER, {"type": "string"}, "1 adds the whole decision as x-collegium-trace."
)


def _body(*models: type[BaseModel]) -> dict[str, Any]:
    refs = [{"$ref": _COMPONENTS.format(model=model.__name__)} for model in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    # As is usual before OpenAPI 3.2, the schema is that of one event.
    event = {
        "type": "object",
        "description": "One of the server-sent events, of which the last one's data is [DONE].",
        "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE]."}},
        "required": ["data"],
    }
    stream = {"schema": event}
    return {
        200: {"model": model, "content": {"text/event-stream": stream}},
        **_failures(*_GENERATION_ERRORS),
    }


class _RawRoute(APIRoute):
    """Hands requests over as they are.

    These endpoints take nothing that FastAPI would parse, and its way to find that out for every
    request costs more than all of routing.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint itself."""
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def _add_generation(app: FastAPI, generation: Generation, keys: list[bytes]) -> None:
    extra = {"parameters": [*_OPTIONS, _DEBUG]}
    router = APIRouter(route_class=_RawRoute)

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        responses=_answers(schemas.ChatCompletion),
        openapi_extra={**_body(ChatBody), **extra},
    )
    async def chat_completions(http: Request) -> Response:
        scope = _check_key(http, keys)
        return await generation.respond(http, ChatBody, scope)

    @router.post(
        "/v1/completions",
        summary="Go on from a text",
        responses=_answers(schemas.TextCompletion),
        openapi_extra={**_body(CompletionBody), **extra},
    )
    async def completions(http: Request) -> Response:
        scope = _check_key(http, keys)
        return await generation.respond(http, CompletionBody, scope)

    app.include_router(router)


def _add_embeddings(app: FastAPI, endpoint: EmbeddingsEndpoint, keys: list[bytes]) -> None:
    router = APIRouter(route_class=_RawRoute)

    @router.post(
        "/v1/embeddings",
        summary="Turn texts into vectors",
        responses={
            200: {"model": schemas.EmbeddingList},
            **_failures(400, 401, 404, 408, 413, 415, 429, 500, 502, 504),
        },
        openapi_extra=_body(EmbeddingRequest),
    )
    async def embeddings(http: Request) -> Response:
        _check_key(http, keys)
        return await endpoint.respond(http)

    app.include_router(router)


def _add_route(
    app: FastAPI, orchestrator: Orchestrator, admission: Admission, keys: list[bytes]
) -> None:
    limits = orchestrator.config.server.limits

    @app.post(
        "/v1/route",
        summary="Decide who would answer, without asking",
        response_model=schemas.RouteBody,
        responses=_failures(400, 401, 404, 408, 413, 415, 429, 500),
        openapi_extra={**_body(ChatBody), "parameters": _OPTIONS},
    )
    async def route(http: Request) -> Response:
        scope = _check_key(http, keys)
        with admission.entered():
            request = await parse_body(
                http, ChatBody, max_bytes=limits.max_body_bytes, timeout_s=limits.timeout_s
            )
            context = RequestContext(time.monotonic() + limits.timeout_s, scope=scope)
            decision = await orchestrator.decide(
                request, options=options_of(http, request), context=context
            )
        return JSONBytes(decision, headers=decision_headers(decision, None, debug=False))


def _add_models(app: FastAPI, orchestrator: Orchestrator, keys: list[bytes]) -> None:
    created = int(time.time())

    def entries() -> dict[str, schemas.ModelEntry]:
        # Not once for all: a new release of a router may know other experts.
        return {
            **{
                name: schemas.ModelEntry(
                    id=name,
                    created=created,
                    kind="route",
                    description=route.config.description,
                    experts=list(route.experts),
                )
                for name, route in orchestrator.routes.items()
            },
            **{
                name: schemas.ModelEntry(
                    id=name,
                    created=created,
                    kind="expert",
                    description=card.description,
                    card=card.model_dump(mode="json"),
                )
                for name, card in orchestrator.cards.items()
            },
            **{
                name: schemas.ModelEntry(
                    id=name,
                    created=created,
                    kind="experiment",
                    description=experiment.config.description,
                    experts=list(
                        dict.fromkeys(
                            expert
                            for arm in (experiment.config.a, experiment.config.b)
                            for expert in orchestrator.routes[arm].experts
                        )
                    ),
                )
                for name, experiment in orchestrator.experiments.items()
            },
            **{
                name: schemas.ModelEntry(
                    id=name, created=created, kind="embedder", description=embedder.description
                )
                for name, embedder in orchestrator.config.embedders.items()
            },
        }

    @app.get(
        "/v1/models",
        summary="List experts, routes, experiments and embedders",
        responses=_failures(401),
    )
    async def list_models(http: Request) -> schemas.ModelList:
        _check_key(http, keys)
        return schemas.ModelList(data=list(entries().values()))

    @app.get("/v1/models/{id}", summary="Show one of these", responses=_failures(401, 404))
    async def show_model(http: Request, id: str) -> schemas.ModelEntry:
        _check_key(http, keys)
        known = entries()
        if id not in known:
            raise UnknownModelError(id, known)
        return known[id]


def _add_memory(app: FastAPI, orchestrator: Orchestrator, keys: list[bytes]) -> None:
    limits = orchestrator.config.server.limits

    @app.get(
        "/v1/decisions/{id}",
        summary="Show what was decided for a request, and what came of it",
        responses=_failures(401, 404, 503),
    )
    async def show_decision(http: Request, id: str) -> DecisionRecord:
        scope = _check_key(http, keys)
        return await orchestrator.decisions.find(id, scope)

    @app.post(
        "/v1/feedback",
        summary="Say how good an answer was",
        response_model=Feedback,
        responses=_failures(400, 401, 404, 408, 409, 413, 415, 503),
        openapi_extra=_body(FeedbackBody),
    )
    async def give_feedback(http: Request) -> Response:
        scope = _check_key(http, keys)
        body = await parse_body(
            http, FeedbackBody, max_bytes=limits.max_body_bytes, timeout_s=limits.timeout_s
        )
        return JSONBytes(await orchestrator.feedback.give(body, scope))


def _add_experiments(app: FastAPI, orchestrator: Orchestrator, keys: list[bytes]) -> None:
    @app.get(
        "/v1/experiments",
        summary="Compare the arms of experiments, and routes with their shadows",
        responses=_failures(401, 503),
    )
    async def list_experiments(http: Request) -> schemas.ExperimentList:
        _check_key(http, keys)
        return schemas.ExperimentList.model_validate({"data": await orchestrator.comparisons()})


def _add_operations(app: FastAPI, orchestrator: Orchestrator, telemetry: Telemetry) -> None:
    @app.get("/health", summary="Whether the process answers")
    async def health() -> schemas.HealthBody:
        return schemas.HealthBody()

    @app.get(
        "/ready",
        summary="Whether the experts can answer",
        response_model=schemas.ReadyBody,
        responses={503: {"model": schemas.ReadyBody}},
    )
    async def ready() -> Response:
        failures = await orchestrator.check_health()
        good = not any(failures.values())
        body = schemas.ReadyBody(
            status="ready" if good else "not ready",
            experts={
                name: None if error is None else errors.public_message(error)
                for name, error in failures.items()
            },
        )
        return JSONBytes(body, 200 if good else 503)

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(telemetry.render(), media_type=CONTENT_TYPE_LATEST)


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        # Bodies are parsed from the raw request, so FastAPI cannot find their models by itself.
        for model in (ChatBody, CompletionBody, EmbeddingRequest, FeedbackBody):
            described = model.model_json_schema(ref_template=_COMPONENTS)
            components.update(described.pop("$defs", {}))
            components[model.__name__] = described
        # FastAPI promises a 422 wherever a path has a parameter; ours accept any text.
        for operation in (op for path in schema["paths"].values() for op in path.values()):
            operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
