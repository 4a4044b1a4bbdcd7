"""The nouns every package shares: requests in OpenAI's shape, answers as chunks, expert cards.

Requests are OpenAI bodies as pydantic models: checked where we act on a field, open for the rest,
so that a parameter only one engine knows reaches that engine. Nothing here knows about HTTP,
routing or any engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_serializer,
    field_validator,
)

__all__ = [
    "Capability",
    "ChatRequest",
    "Choice",
    "Chunk",
    "Completion",
    "CompletionRequest",
    "ExpertCard",
    "FunctionCall",
    "GenerationRequest",
    "Merging",
    "Message",
    "Mixture",
    "StreamOptions",
    "Tool",
    "ToolCall",
    "Usage",
    "collect",
]

Capability = Literal["chat", "completion", "tools", "json_schema", "choice", "images", "logprobs"]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


def _null_means(default: Any, kind: Any) -> BeforeValidator:
    # Clients send null for what they do not set; OpenAI takes that for its default.
    return BeforeValidator(
        lambda value: default if value is None else value, json_schema_input_type=kind | None
    )


class _Open(BaseModel):
    """An OpenAI object: unknown fields are kept and passed on."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class FunctionCall(_Open):
    """A function's name and its arguments as the JSON text the model wrote."""

    name: str
    arguments: str


class ToolCall(_Open):
    """One call of a tool by the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(_Open):
    """One part of a message's content, such as text or an image."""

    type: str
    text: Annotated[str | None, Field(validate_default=True)] = None

    @field_validator("text")
    @classmethod
    def _text_parts_have_text(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is None and info.data.get("type") == "text":
            raise ValueError("a part of type 'text' must have a text")
        return text


class Message(_Open):
    """One message of a conversation."""

    role: Role
    content: Annotated[str | list[ContentPart] | None, Field(validate_default=True)] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content")
    @classmethod
    def _others_than_assistants_say_something(
        cls, content: str | list[ContentPart] | None, info: ValidationInfo
    ) -> str | list[ContentPart] | None:
        role = info.data.get("role", "assistant")
        if content is None and role not in ("assistant", "function"):
            raise ValueError(f"must be a text or a list of parts for the role {role!r}, got null")
        return content

    @property
    def text(self) -> str:
        """The message's text; parts are joined by line breaks, other parts left out."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content if part.text)


class FunctionSpec(_Open):
    """A function the model may call; ``parameters`` is a JSON Schema."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Open):
    """A tool the model may call."""

    type: Literal["function"] = "function"
    function: FunctionSpec


class JSONSchemaFormat(_Open):
    """The named JSON Schema an answer must satisfy."""

    name: str = "answer"
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Open):
    """The shape an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JSONSchemaFormat | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _schemas_are_given(
        cls, schema: JSONSchemaFormat | None, info: ValidationInfo
    ) -> JSONSchemaFormat | None:
        if schema is None and info.data.get("type") == "json_schema":
            raise ValueError("must be given for the type 'json_schema': {name, schema}")
        return schema


class StreamOptions(_Open):
    """Options of a streamed answer."""

    include_usage: Annotated[bool, _null_means(False, bool)] = False
    """Send one more chunk with token counts before the end."""


class GenerationRequest(_Open):
    """What chat and text completion requests share. Defaults and limits are OpenAI's."""

    model: Annotated[
        str, StringConstraints(min_length=1, max_length=256), _null_means("auto", str)
    ] = "auto"
    """An expert's name, or a route from the config."""
    stream: Annotated[bool, _null_means(False, bool)] = False
    """Send the answer as server-sent events while it is written."""
    stream_options: StreamOptions | None = None
    """Options of a streamed answer."""
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Longest answer in tokens; none means what the expert's context leaves."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Randomness; 0 takes the likeliest token each time. The default is the expert's, mostly 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest tokens that together have this probability."""
    n: Annotated[int, Field(ge=1, le=16), _null_means(1, int)] = 1
    """Number of answers."""
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    """Up to four texts that end the answer; they are not part of it."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Same seed, same request: same answer, where the engine can promise that."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Make tokens that occurred less likely."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Make tokens less likely the more often they occurred."""
    user: str | None = None
    """An opaque name of the end user."""

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts as a tuple, empty ones left out."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)

    @property
    def token_limit(self) -> int | None:
        """Longest answer in tokens, under whichever of OpenAI's two names it came."""
        return self.max_tokens


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    """The conversation so far."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """The newer name of ``max_tokens``."""
    logprobs: Annotated[bool, _null_means(False, bool)] = False
    """Return the log-probability of each token."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Return this many alternatives for each token."""
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    """Functions the model may call."""
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    """Whether it must call one: ``auto``, ``none``, ``required``, or one by name."""
    response_format: ResponseFormat | None = None
    """Plain text, any JSON object, or JSON that satisfies a schema."""

    @property
    def token_limit(self) -> int | None:
        """Longest answer in tokens, under whichever of OpenAI's two names it came."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    """The text to go on from, or several."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Return log-probabilities with this many alternatives per token."""
    echo: Annotated[bool, _null_means(False, bool)] = False
    """Repeat the prompt before the answer."""


class Usage(BaseModel):
    """Token counts of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Usage:
        """Counts with their sum."""
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )

    def __add__(self, other: Usage) -> Usage:
        """Counts of both."""
        return Usage.of(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


Merging = Literal["outputs", "parameters"]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Adapters that a model mixes for a request.

    Attributes:
        shares: What each adapter's update is multiplied by, by name; empty if the model answers as
            it is.
        merging: What is added up: what each adapter does, or their matrices, which makes one
            adapter of their rank.
    """

    shares: dict[str, float]
    merging: Merging


@dataclass(slots=True)
class Chunk:
    """A piece of an answer.

    Attributes:
        index: Which of the ``n`` answers it belongs to.
        text: New text; may be empty.
        tool_calls: New pieces of tool calls, in OpenAI's delta form.
        finish_reason: Set on the last chunk of an answer: ``stop``, ``length``, ``tool_calls`` ...
        logprobs: OpenAI's logprobs object for the new text.
        usage: Token counts so far; set on the last chunk of a request at the latest.
        progress: What is being done, for whoever waits; no part of the answer.
        sources: What the answer was made from, ``[{id, title, path, score}]`` in the order of their
            numbers; on the last chunk of an answer.
        peers: Who the writer listens to, with their gates; on the first chunk of a latent answer,
            and again when that changes.
        mixture: Which adapters were mixed; on the first chunk of a request that asked for it.
    """

    index: int = 0
    text: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    usage: Usage | None = None
    progress: str | None = None
    sources: list[dict[str, Any]] | None = None
    peers: dict[str, float] | None = None
    mixture: Mixture | None = None


@dataclass(slots=True)
class Choice:
    """One whole answer."""

    text: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    sources: list[dict[str, Any]] | None = None
    peers: dict[str, float] | None = None


@dataclass(slots=True)
class Completion:
    """All answers to one request, collected."""

    choices: list[Choice]
    usage: Usage

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.choices[0].text


async def collect(chunks: AsyncIterable[Chunk]) -> Completion:
    """Collect a stream into whole answers, ordered by index."""
    choices: dict[int, Choice] = {}
    texts: dict[int, list[str]] = {}
    usage = Usage()
    async for chunk in chunks:
        if chunk.progress is not None:
            continue
        choice = choices.setdefault(chunk.index, Choice())
        texts.setdefault(chunk.index, []).append(chunk.text)
        for delta in chunk.tool_calls or []:
            _merge_tool_call(choice.tool_calls, delta)
        if chunk.logprobs:
            choice.logprobs = _merge_logprobs(choice.logprobs, chunk.logprobs)
        choice.finish_reason = chunk.finish_reason or choice.finish_reason
        if chunk.sources is not None:
            choice.sources = chunk.sources
        if chunk.peers is not None:
            choice.peers = chunk.peers
        usage = chunk.usage or usage
    for index, choice in choices.items():
        choice.text = "".join(texts[index])
    return Completion([choices[index] for index in sorted(choices)] or [Choice()], usage)


def _merge_tool_call(calls: list[dict[str, Any]], delta: Mapping[str, Any]) -> None:
    position = delta.get("index", len(calls))
    while len(calls) <= position:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[position], delta.get("function") or {}
    call["id"] = delta.get("id") or call["id"]
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _merge_logprobs(old: dict[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old or {})
    for key, value in new.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            merged[key] = [*(merged.get(key) or []), *value]
        else:
            merged[key] = value
    return merged


class ExpertCard(BaseModel):
    """What is publicly known of an expert."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    name: str
    """What users put in ``model``."""
    description: str = ""
    """What it is good at, in a sentence."""
    capabilities: frozenset[Capability] = frozenset({"chat", "completion"})
    """What it can do; requests that need more are not sent to it."""
    context_length: int | None = Field(default=None, gt=0)
    """Longest prompt plus answer in tokens; none means unknown and unchecked."""
    total_params_b: float | None = Field(default=None, ge=0)
    """Parameters in billions."""
    active_params_b: float | None = Field(default=None, ge=0)
    """Parameters active per token in billions; for dense models the same as the total."""
    input_usd_per_mtok: float = Field(default=0.0, ge=0)
    """US dollars per million prompt tokens."""
    output_usd_per_mtok: float = Field(default=0.0, ge=0)
    """US dollars per million answer tokens."""
    added_prompt_tokens: int = Field(default=0, ge=0)
    """Tokens it puts into each prompt by itself, such as passages it has looked up."""
    latency_s: float | None = Field(default=None, gt=0)
    """Seconds a whole answer typically takes; none leaves it to what was measured."""
    energy_j: float | None = Field(default=None, gt=0)
    """Joules a whole answer typically takes."""
    base_model: str | None = None
    """The model it is a fine-tune of."""
    adapter: str | None = None
    """The LoRA adapter put on the base model."""

    def usd(self, usage: Usage) -> float:
        """What so many tokens cost in US dollars."""
        return (
            usage.prompt_tokens * self.input_usd_per_mtok
            + usage.completion_tokens * self.output_usd_per_mtok
        ) / 1e6

    @field_serializer("capabilities", when_used="json")
    def _in_order(self, capabilities: frozenset[Capability]) -> list[str]:
        # Sets have another order in every process.
        return sorted(capabilities)
