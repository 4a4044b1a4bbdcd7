"""A model and its LoRA adapters run in process by Hugging Face transformers.

Why a decode loop of our own (``experts.decoding``) and not transformers' continuous batching:
``ContinuousBatchingManager`` (5.19) has one random generator for the whole batch, no adapters, no
constraints per request, and reports the log-probability of the drawn token alone. ``generate``
takes a whole batch and lets nobody join.

Knows nothing of Ray or HTTP. torch and transformers are imported when an engine is built.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experts.answer_writer import AnswerWriter, Piece
from experts.base import AnyRequest
from experts.config import TransformersExpertConfig, cards_of
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
from experts.loading import context_length_of, end_ids_of, load_model
from experts.prompts import PromptReader
from experts.structured import GrammarFactory, shape_of
from experts.types import ChatRequest, Chunk, ExpertCard, Message, Usage

if TYPE_CHECKING:
    import torch

    from experts.decoding import Row
    from experts.sampling import SamplingOptions

__all__ = ["ForwardResult", "TransformersEngine", "TransformersExpert"]


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What the model computes for one text.

    Attributes:
        token_ids: The text's tokens; length n_tokens.
        logits: Shape (n_tokens, vocabulary), in the engine's dtype.
        hidden_states: Shape (n_layers + 1, n_tokens, hidden_size): the embeddings, then what each
            layer gives; the last one after the final norm.
    """

    token_ids: list[int]
    logits: torch.Tensor
    hidden_states: torch.Tensor


class TransformersEngine:
    """Hosts one model with all its adapters; gives one expert for each.

    Args:
        config: What to host.

    Raises:
        ExpertConfigError: Weights are missing or cannot be hosted.
    """

    def __init__(self, config: TransformersExpertConfig) -> None:
        from experts.decoding import Decoder
        from experts.lora import AdapterRows

        self.config = config
        self._adapter_rows = AdapterRows()
        self._tokenizer, self._model = load_model(config, self._adapter_rows)
        self._context_length = context_length_of(config, self._model.config)
        self._generation = self._model.generation_config
        self._end_ids = end_ids_of(self._tokenizer, self._generation)
        vocab_size = self._model.get_output_embeddings().weight.shape[0]
        self._grammars = GrammarFactory(
            config.name, self._tokenizer, vocab_size, sorted(self._end_ids)
        )
        self._decoder = Decoder(
            self._model,
            self._adapter_rows,
            max_rows=config.max_batch_size,
            threads=config.threads,
        )
        self._experts = {
            card.name: TransformersExpert(self, self._complete(card), adapter)
            for adapter, card in enumerate(cards_of(config))
        }

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        return self._tokenizer

    @property
    def load(self) -> int:
        """Answers being written or waiting for a place."""
        return self._decoder.load

    def experts(self) -> dict[str, TransformersExpert]:
        """One expert per name: the model's own, then its adapters', all on this engine."""
        return dict(self._experts)

    def forward(
        self, text: Sequence[Message] | Sequence[int], adapter: str | None = None
    ) -> ForwardResult:
        """Run the model over one text and return everything it computes.

        Waits for the running decode step, then has the model for itself. Blocks: from a coroutine
        call it by ``asyncio.to_thread``.

        Args:
            text: A conversation, put through the chat template, or token ids.
            adapter: Name of one of the engine's experts; none is the model itself.
        """
        expert = self._experts.get(adapter or self.config.name)
        if expert is None:
            raise InvalidRequestError(
                f"unknown expert {adapter!r}; known: {', '.join(self._experts)}", "adapter"
            )
        ids = [item for item in text if isinstance(item, int)]
        if not ids:
            messages = [item for item in text if isinstance(item, Message)]
            ids = self._reader(expert.card).chat(messages)
        if len(ids) > self._context_length:
            raise ContextLengthError(expert.card.name, len(ids), self._context_length)
        return self._decoder.call(lambda: self._forward(ids, expert.adapter)).result()

    async def check_health(self) -> None:
        """Return if the decode thread is alive."""
        if not self._decoder.alive:
            raise ExpertUnavailableError(self.config.name, "its decode thread has ended")

    async def aclose(self) -> None:
        """Stop the decode thread after the running step. Idempotent."""
        await asyncio.to_thread(self._decoder.close)

    async def release(self, expert: TransformersExpert) -> None:
        """Close the engine once all of its experts are closed."""
        if all(other.closed for other in self._experts.values()):
            await self.aclose()

    async def rows(
        self, request: AnyRequest, expert: TransformersExpert, pieces: asyncio.Queue[Piece]
    ) -> tuple[list[Row], int]:
        """Check a request and turn it into rows; also return its number of prompt tokens."""
        from experts.decoding import Prompt, Row
        from experts.sampling import Sampler

        card = expert.card
        check_features(card, request)
        _refuse_unknown(card.name, request)
        id_lists = self._reader(card).read(request)
        limits = [self._token_limit(card.name, request, len(ids)) for ids in id_lists]
        shape = shape_of(request)
        compiled = shape and await asyncio.to_thread(self._grammars.compile, shape)
        end_ids = frozenset() if _extra(request, "ignore_eos") else self._end_ids
        rows = []
        for number, ids in enumerate(id_lists):
            prompt = Prompt(ids, expert.adapter)
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
                rows.append(Row(prompt, sampler, limits[number], end_ids, writer))
        return rows, sum(map(len, id_lists))

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows for decoding."""
        try:
            self._decoder.submit(rows)
        except RuntimeError as exc:
            raise ExpertUnavailableError(self.config.name, str(exc)) from exc

    def _forward(self, ids: list[int], adapter: int) -> ForwardResult:
        import torch

        device = self._model.device
        self._adapter_rows.indices = torch.tensor([adapter], device=device) if adapter else None
        output = self._model(
            input_ids=torch.tensor([ids], device=device), output_hidden_states=True, use_cache=False
        )
        hidden = torch.stack([state[0] for state in output.hidden_states])
        return ForwardResult(ids, output.logits[0], hidden)

    def _complete(self, card: ExpertCard) -> ExpertCard:
        """Fill in what the config leaves to the model."""
        params_b = card.total_params_b
        if params_b is None:
            # Stacked adapters are buffers, so this counts the model alone.
            params_b = sum(p.numel() for p in self._model.parameters()) / 1e9
        active = params_b if card.active_params_b is None else card.active_params_b
        capabilities = card.capabilities
        if not self._tokenizer.chat_template:
            capabilities = capabilities - {"chat"}
        return card.model_copy(
            update={
                "context_length": self._context_length,
                "total_params_b": params_b,
                "active_params_b": active,
                "capabilities": capabilities,
            }
        )

    def _reader(self, card: ExpertCard) -> PromptReader:
        return PromptReader(card.name, self._tokenizer)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _token_limit(self, name: str, request: AnyRequest, prompt_tokens: int) -> int:
        room = self._context_length - prompt_tokens
        wanted = request.token_limit or min(self.config.default_max_tokens, max(room, 1))
        if wanted > room:
            raise ContextLengthError(name, prompt_tokens + wanted, self._context_length)
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
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=_logit_bias(request, len(self._tokenizer)),
            # Each of n answers has its own seed, or all would be the same.
            seed=None if request.seed is None else (request.seed + index) % 2**63,
            top_logprobs=_top_logprobs(request),
        )


class TransformersExpert:
    """One name on a transformers engine: its model, or one of its adapters."""

    def __init__(self, engine: TransformersEngine, card: ExpertCard, adapter: int) -> None:
        self.engine = engine
        self.adapter = adapter
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
            await self.engine.release(self)

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


def _extra(request: AnyRequest, name: str) -> Any:
    return (request.model_extra or {}).get(name)


def _refuse_unknown(name: str, request: AnyRequest) -> None:
    if not isinstance(request, ChatRequest) and request.echo:
        raise UnsupportedFeatureError(name, "echo")
    for param in ("suffix", "best_of"):
        if _extra(request, param) not in (None, 1):
            raise UnsupportedFeatureError(name, param)


def _top_logprobs(request: AnyRequest) -> int | None:
    if isinstance(request, ChatRequest):
        return request.top_logprobs or 0 if request.logprobs else None
    return request.logprobs


def _logit_bias(request: AnyRequest, vocabulary: int) -> Mapping[int, float]:
    bias = _extra(request, "logit_bias") or {}
    try:
        parsed = {int(token): float(value) for token, value in bias.items()}
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
