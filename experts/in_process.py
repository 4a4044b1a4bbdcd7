"""What the engines that decode in this process share: from requests to rows, from rows to chunks.

Knows nothing of Ray or HTTP, nor of which passes the rows go through.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from experts.answer_writer import AnswerWriter, Piece
from experts.base import AnyRequest
from experts.errors import (
    ContextLengthError,
    ExpertError,
    ExpertFailedError,
    ExpertTimeoutError,
    ExpertUnavailableError,
    InvalidRequestError,
    UnsupportedFeatureError,
)
from experts.features import check_features
from experts.loading import end_ids_of
from experts.prompts import PromptReader
from experts.structured import GrammarFactory, shape_of
from experts.types import ChatRequest, Chunk, ExpertCard, Usage

if TYPE_CHECKING:
    from experts.decoding import Decoder, Prompt, Row
    from experts.sampling import SamplingOptions

__all__ = ["InProcessEngine", "InProcessExpert", "RowMaker", "extra_field"]


class RowMaker:
    """Turns requests to one model into rows.

    Args:
        name: Of the model, for error messages.
        tokenizer: A Hugging Face tokenizer.
        model: A transformers causal language model.
        context_length: Longest prompt plus answer in tokens.
        default_max_tokens: Longest answer in tokens when a request names none.
    """

    def __init__(
        self, name: str, tokenizer: Any, model: Any, *, context_length: int, default_max_tokens: int
    ) -> None:
        self.context_length = context_length
        self._tokenizer = tokenizer
        self._default_max_tokens = default_max_tokens
        self._generation = model.generation_config
        self._end_ids = end_ids_of(tokenizer, self._generation)
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self._grammars = GrammarFactory(name, tokenizer, vocab_size, sorted(self._end_ids))
        self._params_b = sum(p.numel() for p in model.parameters()) / 1e9

    def complete(self, card: ExpertCard) -> ExpertCard:
        """Fill in what the config leaves to the model."""
        params_b = self._params_b if card.total_params_b is None else card.total_params_b
        active = params_b if card.active_params_b is None else card.active_params_b
        capabilities = card.capabilities
        if not self._tokenizer.chat_template:
            capabilities = capabilities - {"chat"}
        return card.model_copy(
            update={
                "context_length": self.context_length,
                "total_params_b": params_b,
                "active_params_b": active,
                "capabilities": capabilities,
            }
        )

    def read(self, card: ExpertCard, request: AnyRequest) -> list[list[int]]:
        """Check a request and return the token ids of each of its prompts."""
        check_features(card, request)
        _refuse_unknown(card.name, request)
        id_lists = PromptReader(card.name, self._tokenizer).read(request)
        for ids in id_lists:
            self._token_limit(card.name, request, len(ids))
        return id_lists

    async def rows(
        self,
        card: ExpertCard,
        request: AnyRequest,
        prompts: Sequence[Prompt],
        pieces: asyncio.Queue[Piece],
    ) -> list[Row]:
        """The rows that answer a checked request: ``n`` for each of its prompts."""
        from experts.decoding import Row
        from experts.sampling import Sampler

        shape = shape_of(request)
        compiled = shape and await asyncio.to_thread(self._grammars.compile, shape)
        end_ids = frozenset() if extra_field(request, "ignore_eos") else self._end_ids
        rows = []
        for number, prompt in enumerate(prompts):
            limit = self._token_limit(card.name, request, len(prompt.token_ids))
            for index in range(number * request.n, (number + 1) * request.n):
                writer = AnswerWriter(
                    index,
                    pieces,
                    self._decode,
                    end_ids=end_ids,
                    stop_texts=request.stop_texts,
                    chat_logprobs=isinstance(request, ChatRequest),
                )
                constraint = self._grammars.constraint(compiled) if compiled else None
                sampler = Sampler(self._sampling(request, index), constraint)
                rows.append(Row(prompt, sampler, limit, end_ids, writer))
        return rows

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _token_limit(self, name: str, request: AnyRequest, prompt_tokens: int) -> int:
        room = self.context_length - prompt_tokens
        wanted = request.token_limit or min(self._default_max_tokens, max(room, 1))
        if wanted > room:
            raise ContextLengthError(name, prompt_tokens + wanted, self.context_length)
        return wanted

    def _sampling(self, request: AnyRequest, index: int) -> SamplingOptions:
        from experts.sampling import SamplingOptions

        temperature, top_p = request.temperature, request.top_p
        sampled = getattr(self._generation, "do_sample", None)
        if temperature is None:
            temperature = (self._generation.temperature if sampled else None) or 1.0
        if top_p is None:
            top_p = (self._generation.top_p if sampled else None) or 1.0
        return SamplingOptions(
            temperature=temperature,
            top_p=top_p,
            top_k=_top_k(request),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=_logit_bias(request, len(self._tokenizer)),
            # Each of n answers has its own seed, or all would be the same.
            seed=None if request.seed is None else (request.seed + index) % 2**63,
            top_logprobs=_top_logprobs(request),
        )


class InProcessExpert:
    """One name on an engine in this process."""

    def __init__(self, engine: InProcessEngine[Any], card: ExpertCard) -> None:
        self.engine = engine
        self.closed = False
        self._card = card

    @property
    def card(self) -> ExpertCard:
        """What is publicly known of this expert."""
        return self._card

    async def stream(self, request: AnyRequest, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        """Answer a request piece by piece; see ``experts.base.Expert``."""
        deadline = time.monotonic() + timeout_s
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        if self.closed:
            raise ExpertUnavailableError(self._card.name, "it is closed")
        rows, prompt_tokens = await self.engine.rows(request, self, pieces)
        self.engine.submit(rows)
        try:
            unfinished = len(rows)
            while unfinished:
                chunk = await self._next(pieces, deadline, timeout_s)
                unfinished -= chunk.finish_reason is not None
                yield chunk
        finally:
            for row in rows:
                row.cancelled = True
        yield Chunk(usage=Usage.of(prompt_tokens, sum(row.drawn for row in rows)))

    async def check_health(self) -> None:
        """Return if it can answer now."""
        if self.closed:
            raise ExpertUnavailableError(self._card.name, "it is closed")
        await self.engine.check_health()

    async def aclose(self) -> None:
        """Take no more requests; the last expert of an engine closes the engine."""
        if not self.closed:
            self.closed = True
            await self.engine.release()

    async def _next(self, pieces: asyncio.Queue[Piece], deadline: float, timeout_s: float) -> Chunk:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                piece = await pieces.get()
        except TimeoutError as exc:
            raise ExpertTimeoutError(self._card.name, timeout_s) from exc
        if isinstance(piece, ExpertError):
            raise piece
        if isinstance(piece, Exception):
            raise ExpertFailedError(self._card.name, repr(piece)) from piece
        return piece


E = TypeVar("E", bound=InProcessExpert)


class InProcessEngine(ABC, Generic[E]):
    """Hosts experts on one decode thread.

    Args:
        name: Of the config entry, for error messages.
        decoder: Decodes their rows.
    """

    def __init__(self, name: str, decoder: Decoder) -> None:
        self._name = name
        self._decoder = decoder
        self._experts: dict[str, E] = {}

    @property
    def load(self) -> int:
        """Answers being written or waiting for a place."""
        return self._decoder.load

    def experts(self) -> dict[str, E]:
        """Its experts by name, all on this engine."""
        return dict(self._experts)

    @abstractmethod
    async def rows(
        self, request: AnyRequest, expert: E, pieces: asyncio.Queue[Piece]
    ) -> tuple[list[Row], int]:
        """Check a request and turn it into rows; also return its number of prompt tokens."""

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows for decoding."""
        try:
            self._decoder.submit(rows)
        except RuntimeError as exc:
            raise ExpertUnavailableError(self._name, str(exc)) from exc

    async def check_health(self) -> None:
        """Return if the decode thread is alive."""
        if not self._decoder.alive:
            raise ExpertUnavailableError(self._name, "its decode thread has ended")

    async def aclose(self) -> None:
        """Stop the decode thread after the running step. Idempotent."""
        await asyncio.to_thread(self._decoder.close)

    async def release(self) -> None:
        """Close the engine if all of its experts are closed."""
        if all(expert.closed for expert in self._experts.values()):
            await self.aclose()


def extra_field(request: AnyRequest, name: str) -> Any:
    """A field of a request that is not OpenAI's; none if it is not there."""
    return (request.model_extra or {}).get(name)


def _refuse_unknown(name: str, request: AnyRequest) -> None:
    if not isinstance(request, ChatRequest) and request.echo:
        raise UnsupportedFeatureError(name, "echo")
    for param in ("suffix", "best_of"):
        if extra_field(request, param) not in (None, 1):
            raise UnsupportedFeatureError(name, param)


def _top_logprobs(request: AnyRequest) -> int | None:
    if isinstance(request, ChatRequest):
        return request.top_logprobs or 0 if request.logprobs else None
    return request.logprobs


def _top_k(request: AnyRequest) -> int | None:
    top_k = extra_field(request, "top_k")
    if top_k is None:
        return None
    if isinstance(top_k, int) and not isinstance(top_k, bool) and top_k > 0:
        return top_k
    raise InvalidRequestError(f"top_k must be a number of tokens from 1, got {top_k!r}", "top_k")


def _logit_bias(request: AnyRequest, vocabulary: int) -> Mapping[int, float]:
    bias = extra_field(request, "logit_bias") or {}
    try:
        parsed = {int(token): float(value) for token, value in bias.items()}
        if not all(-100 <= value <= 100 for value in parsed.values()):
            raise ValueError
    except (AttributeError, TypeError, ValueError) as exc:
        raise InvalidRequestError(
            "logit_bias must map token ids to numbers from -100 to 100", "logit_bias"
        ) from exc
    for token in parsed:
        if not 0 <= token < vocabulary:
            raise InvalidRequestError(
                f"logit_bias names token {token}, but tokens are 0 to {vocabulary - 1}",
                "logit_bias",
            )
    return parsed
