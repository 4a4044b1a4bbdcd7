"""Shapes of responses, for the OpenAPI page; tests hold real responses against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from experts.types import Usage

__all__ = [
    "ChatChunk",
    "ChatCompletion",
    "EmbeddingList",
    "ErrorBody",
    "ExperimentList",
    "HealthBody",
    "ModelEntry",
    "ModelList",
    "ReadyBody",
    "RouteBody",
    "TextChunk",
    "TextCompletion",
]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorDetail(_Shape):
    """What went wrong."""

    message: str
    """A sentence that says what to do."""
    type: str
    """The family of the error, as OpenAI names it."""
    param: str | None
    """The offending field or header."""
    code: str
    """A stable name of this very error."""


class ErrorBody(_Shape):
    """OpenAI's error object."""

    error: ErrorDetail


class Source(_Shape):
    """A passage that an answer was made from."""

    id: str
    title: str
    """The headings it stands under."""
    path: str
    """The document."""
    score: float
    """Cosine with the question."""


class AnswerMessage(_Shape):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None
    sources: list[Source] | None = None
    """What a retriever answered from, in the order of the numbers cited; not of other experts."""


class ChatChoice(_Shape):
    """One of the ``n`` answers."""

    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: dict[str, Any] | None


class _Answer(_Shape):
    id: str
    created: int
    model: str
    """The expert that answered."""
    system_fingerprint: str
    """Hash of the service's config."""
    usage: Usage


class ChatCompletion(_Answer):
    """A whole chat answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextChoice(_Shape):
    """One of the answers."""

    index: int
    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None


class TextCompletion(_Answer):
    """A whole text completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class _Chunk(_Shape):
    id: str
    created: int
    model: str
    """The expert that answers."""
    system_fingerprint: str
    """Hash of the service's config."""
    usage: Usage | None = None
    """Token counts; only on the chunk after the last, which has no choices."""


class ChatDelta(_Shape):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    sources: list[Source] | None = None
    """What a retriever answers from; on the last chunk of an answer."""


class ChatChunkChoice(_Shape):
    """A piece of one of the ``n`` answers."""

    index: int
    delta: ChatDelta
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class ChatChunk(_Chunk):
    """An event of a streamed chat answer."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class TextChunkChoice(_Shape):
    """A piece of one of the answers."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class TextChunk(_Chunk):
    """An event of a streamed text completion."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]


class Embedding(_Shape):
    """The vector of one input."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or the base64 of little-endian float32."""


class EmbeddingUsage(_Shape):
    """Estimated token counts: encoders do not tell theirs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(_Shape):
    """Vectors of all inputs, by one embedder."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    """The embedder."""
    usage: EmbeddingUsage


class ModelEntry(_Shape):
    """A name that can stand in ``model``: an expert, a route, an experiment or an embedder."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "collegium"
    kind: Literal["expert", "route", "experiment", "embedder"]
    description: str = ""
    experts: list[str] | None = None
    """A route's experts, or those of an experiment's two routes."""
    card: dict[str, Any] | None = None
    """An expert's card: capabilities, context length, parameters, prices, base model, adapter."""


class ModelList(_Shape):
    """All names that can stand in ``model``."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class CandidateBody(_Shape):
    """One expert as the policy saw it."""

    expert: str
    quality: float | None
    """Predicted score in [0, 1]."""
    cost_usd: float
    """Expected cost of this request in US dollars."""
    utility: float | None
    """Quality less cost, by the policy; higher is better."""


class SessionBody(_Shape):
    """What a conversation's earlier turns had to say."""

    expert: str
    """Who answered last, and has the earlier turns in its prompt cache."""
    cached_tokens: int
    """About how many of the prompt's tokens that are."""
    cached_usd: float
    """What these cost it less than anybody else, in US dollars."""
    stickiness: float
    """Points of quality that others had to be better by."""
    tool_call: bool
    """Whether the request answers its tool call, so that it goes on in any case."""


class RouteBody(_Shape):
    """A decision that was not carried out."""

    id: str
    experts: list[str]
    """Names, best first."""
    width: int | None
    """How many of them shall answer, for strategies that compose several answers; null leaves it to
    the strategy."""
    route: str | None
    router: str | None
    router_release: str | None
    policy: str
    strategy: str
    cost_quality: float | None
    candidates: list[CandidateBody]
    """Every expert that could serve the request, best first."""
    excluded: dict[str, str]
    """Experts that could not, with the reason."""
    category: str | None
    confidence: float | None
    """Calibrated probability of the category."""
    fallback: bool
    """Whether the router was too unsure and used its general category."""
    detail: dict[str, Any]
    """Further facts from the router."""
    session: SessionBody | None
    """What the earlier turns had to say; null without a session."""
    experiment: str | None
    """The experiment asked for, if one was; ``route`` is then its arm's."""
    arm: str | None
    """The arm that the client belongs to."""


class ArmBody(_Shape):
    """One of two routes that are compared."""

    name: Literal["a", "b"]
    route: str
    requests: int
    """How many it was given, or of a shadow was to be copied."""
    outcomes: int
    """How many of them are rated, or compared by the judge."""
    mean: float | None
    """Mean rating, or share of wins with ties as halves; null while there is none."""


class ExperimentBody(_Shape):
    """Two routes and what is known of their difference, by all replicas that share a memory."""

    name: str
    """The experiment, or the route that has a shadow."""
    kind: Literal["split", "shadow"]
    arms: list[ArmBody]
    counts: dict[str, int] | None = None
    """What became of a shadow's copies."""
    difference: float | None
    """Mean of b less mean of a."""
    low: float
    """Lower end of the true difference, valid whenever one looks."""
    high: float
    """Upper end."""
    error: float
    """Probability that low and high ever leave out the true difference."""
    verdict: Literal["a", "b", "undecided"]
    """The better arm, once it is certain enough."""


class ExperimentList(_Shape):
    """All experiments and shadows."""

    object: Literal["list"] = "list"
    data: list[ExperimentBody]


class HealthBody(_Shape):
    """The process answers."""

    status: Literal["ok"] = "ok"


class ReadyBody(_Shape):
    """Whether the experts can answer."""

    status: Literal["ready", "not ready"]
    experts: dict[str, str | None]
    """Null for each expert that can answer, else what is wrong."""
