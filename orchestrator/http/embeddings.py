"""``POST /v1/embeddings``: texts to vectors over HTTP."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from experts.errors import ExpertFailedError, ExpertTimeoutError
from experts.types import Usage
from orchestrator.core import Orchestrator
from orchestrator.decision import Call, RequestContext
from orchestrator.embeddings import Embedded, EmbeddingRequest
from orchestrator.http.admission import Admission
from orchestrator.http.body import parse_body
from orchestrator.http.encoding import JSONBytes
from orchestrator.http.errors import error_response, status_of
from orchestrator.http.generation import CLIENT_LEFT_STATUS
from orchestrator.http.streaming import ClientLeft, unless_client_leaves
from orchestrator.pool import estimated_tokens
from orchestrator.telemetry import Telemetry
from routers.base import RouterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["EmbeddingsEndpoint"]


class EmbeddingsEndpoint:
    """Answers requests for vectors; one instance serves all.

    Args:
        orchestrator: Who has the embedders.
        telemetry: Who counts.
        admission: How many requests may be in work.
    """

    def __init__(
        self, orchestrator: Orchestrator, telemetry: Telemetry, admission: Admission
    ) -> None:
        self._releases = orchestrator.releases
        self._embeddings = orchestrator.embeddings
        self._limits = orchestrator.config.server.limits
        self._telemetry = telemetry
        self._admission = admission
        self._embeddings.load()

    async def respond(self, http: Request) -> Response:
        """Answer one request. Everything that fails becomes an error object."""
        context = RequestContext(deadline=time.monotonic() + self._limits.timeout_s)
        status, model = CLIENT_LEFT_STATUS, ""
        try:
            with self._admission.entered():
                request = await parse_body(
                    http,
                    EmbeddingRequest,
                    max_bytes=self._limits.max_body_bytes,
                    timeout_s=self._limits.timeout_s,
                )
                embedded = await unless_client_leaves(http, self._embedded(request, context))
                model, status = request.model, 200
                return JSONBytes(_body(request, embedded, context))
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT_STATUS)
        except Exception as error:
            status = status_of(error)
            return error_response(error)
        finally:
            self._telemetry.finished(model, context, status)

    async def _embedded(self, request: EmbeddingRequest, context: RequestContext) -> Embedded:
        self._releases.look()
        name = request.model
        try:
            async with asyncio.timeout(context.remaining_s):
                name = await self._embeddings.choose(request)
                tokens = sum(max(1, estimated_tokens(text)) for text in request.texts)
                with _noted(Call(name, "embed", usage=Usage.of(tokens, 0)), context):
                    return await self._embeddings.embed(request, name)
        except TimeoutError:
            raise ExpertTimeoutError(name, self._limits.timeout_s) from None
        except RouterError as error:
            raise ExpertFailedError(name, str(error)) from error


@contextmanager
def _noted(call: Call, context: RequestContext) -> Iterator[None]:
    context.calls.append(call)
    try:
        yield
    except BaseException as error:
        left = isinstance(error, asyncio.CancelledError)
        call.error = "cancelled" if left else type(error).__name__
        raise
    finally:
        call.seconds = time.monotonic() - call.started


def _body(request: EmbeddingRequest, embedded: Embedded, context: RequestContext) -> dict[str, Any]:
    tokens = context.calls[-1].usage.prompt_tokens
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _vector(row, request)}
            for index, row in enumerate(embedded.vectors)
        ],
        "model": embedded.embedder,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vector(row: NDArray[np.float32], request: EmbeddingRequest) -> str | list[float]:
    if request.encoding_format == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    numbers: list[float] = row.tolist()
    return numbers
