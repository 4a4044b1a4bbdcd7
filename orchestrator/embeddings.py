"""Texts to vectors by name, or by whichever embedder a router expects to retrieve best.

Vectors of different embedders are not comparable, so all inputs of a request get the same one.
Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from orchestrator.config import CollegiumConfig, ConfigError
from orchestrator.errors import BadRequestError, UnknownModelError
from routers.base import Query, Router, RouterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.encoders import Encoder

__all__ = ["AUTO", "MAX_INPUTS", "Embedded", "EmbeddingRequest", "Embeddings"]

AUTO = "auto"
# OpenAI's limit.
MAX_INPUTS = 2048
# Encoding keeps a core busy; the event loop needs one too.
THREADS = 2
# Inputs per hop to a thread: a request that nobody waits for any more ends after so many. Fewer
# than make encoders keep vectors on disk, where nothing of a request belongs.
STEP = 16

Result = TypeVar("Result")
Text = Annotated[str, StringConstraints(min_length=1)]


class EmbeddingRequest(BaseModel):
    """Body of ``POST /v1/embeddings``."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] = AUTO
    """An embedder's name, or ``auto``."""
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    """A text or up to 2,048 texts. Encoders read the first 256 tokens of each."""
    encoding_format: Literal["float", "base64"] = "float"
    """Vectors as numbers, or as the base64 of little-endian float32."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Length of the vectors. No encoder here can shorten its own, so ``auto`` chooses among
    embedders of this length, and a named one must have it."""
    user: str | None = None
    """An opaque name of the end user."""

    @field_validator("input", mode="before")
    @classmethod
    def _some_texts_and_no_tokens(cls, given: Any) -> Any:
        # Of a union pydantic tells what is wrong for its first member.
        if isinstance(given, list) and not 1 <= len(given) <= MAX_INPUTS:
            raise ValueError(f"must be a text or 1 to {MAX_INPUTS} texts, got {len(given)}")
        first = given[0] if isinstance(given, list) and given else None
        if isinstance(first, int | list) and not isinstance(first, bool):
            raise ValueError("token ids belong to another model's vocabulary; send texts")
        return given

    @property
    def texts(self) -> list[str]:
        """The inputs as a list."""
        return [self.input] if isinstance(self.input, str) else self.input


class Embedded(NamedTuple):
    """What came of a request.

    Attributes:
        embedder: Whose vectors these are.
        vectors: Shape (n_inputs, width).
    """

    embedder: str
    vectors: NDArray[np.float32]


class _Choice(NamedTuple):
    """Who chooses among whom."""

    router: Router | None
    names: list[str]


class Embeddings:
    """The embedders of a config.

    Args:
        config: The config all names come from.
        routers: One Router per router of the config.

    Raises:
        ConfigError: An encoder is unknown, or the route's router does not know its embedders.
    """

    def __init__(self, config: CollegiumConfig, routers: Mapping[str, Router]) -> None:
        self._encoders = {
            name: _find(name, entry.encoder) for name, entry in config.embedders.items()
        }
        self._route = config.embedding_route
        self._choice = _Choice(None, list(self._encoders)[:1])
        if self._route is not None:
            self.prepare(self._route.router, routers[self._route.router])()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="embedder")

    def prepare(self, name: str, router: Router) -> Callable[[], None]:
        """What puts a router in use, if it is the one that chooses; requests under way keep theirs.

        Raises:
            ConfigError: It does not know the route's embedders.
        """
        route = self._route
        if route is None or route.router != name:
            return lambda: None
        known = router.models
        routed = list(route.embedders or (one for one in self._encoders if one in known))
        if not routed or any(one not in known for one in routed):
            raise ConfigError(
                f"embedding_route: router {name!r} knows {', '.join(map(repr, known))}, but "
                f"embedders are {', '.join(map(repr, self._encoders)) or 'none'}; train it on a "
                "table whose models are embedders, or list only known ones under 'embedders'"
            )

        def use() -> None:
            self._choice = _Choice(router, routed)

        return use

    def load(self) -> None:
        """Load all weights now, so that no request waits for them.

        Raises:
            ConfigError: An encoder cannot be used.
        """
        for name, encoder in self._encoders.items():
            try:
                encoder.encode(["warm-up"])
            except RouterError as error:
                raise ConfigError(f"embedder {name!r}: {error}") from error

    async def choose(self, request: EmbeddingRequest) -> str:
        """The embedder of a request.

        For ``auto`` it is the one with the highest mean predicted quality over the inputs; ties go
        to the one listed first. It depends on this request and the config alone, and not on the
        order of the inputs.

        Raises:
            UnknownModelError: ``model`` names no embedder.
            BadRequestError: No embedder has these ``dimensions``.
        """
        if request.model != AUTO or not self._encoders:
            encoder = self._encoders.get(request.model)
            if encoder is None:
                known = [AUTO, *self._encoders] if self._encoders else []
                raise UnknownModelError(request.model, known)
            _check_width([request.model], [encoder.width], request.dimensions)
            return request.model
        router, routed = self._choice
        widths = [self._encoders[name].width for name in routed]
        _check_width(routed, widths, request.dimensions)
        names = [
            name
            for name, width in zip(routed, widths, strict=True)
            if request.dimensions in (None, width)
        ]
        if router is None or len(names) == 1:
            return names[0]

        def predict(texts: Sequence[str]) -> NDArray[np.float32]:
            return router.predict([Query(text) for text in texts], names).quality

        parts = await self._in_steps(predict, request.texts)
        # Exact sums: added up in another order, floats would be a little different.
        columns = zip(*(row for part in parts for row in part.tolist()), strict=True)
        sums = [math.fsum(column) for column in columns]
        return names[sums.index(max(sums))]

    async def embed(self, request: EmbeddingRequest, embedder: str) -> Embedded:
        """Vectors of the inputs by the chosen embedder."""
        import numpy as np

        parts = await self._in_steps(self._encoders[embedder].encode, request.texts)
        return Embedded(embedder, np.concatenate(parts))

    def close(self) -> None:
        """Free the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_steps(
        self, work: Callable[[Sequence[str]], Result], texts: Sequence[str]
    ) -> list[Result]:
        loop = asyncio.get_running_loop()
        return [
            await loop.run_in_executor(self._threads, work, texts[start : start + STEP])
            for start in range(0, len(texts), STEP)
        ]


def _find(name: str, encoder: str) -> Encoder:
    from routers.encoders import get_encoder

    try:
        return get_encoder(encoder)
    except RouterError as error:
        raise ConfigError(f"embedder {name!r}: {error}") from error


def _check_width(names: Sequence[str], widths: Sequence[int], wanted: int | None) -> None:
    if wanted is None or wanted in widths:
        return
    have = ", ".join(f"{name!r} has {width}" for name, width in zip(names, widths, strict=True))
    raise BadRequestError(
        f"dimensions: vectors cannot be shortened; {have}, got {wanted}", "dimensions"
    )
