"""A model and its LoRA adapters run in process by Hugging Face transformers.

Why a decode loop of our own (``experts.decoding``) and not transformers' continuous batching:
``ContinuousBatchingManager`` (5.19) has one random generator for the whole batch, no adapters, no
constraints per request, and reports the log-probability of the drawn token alone. ``generate``
takes a whole batch and lets nobody join.

Knows nothing of Ray or HTTP. torch and transformers are imported when an engine is built.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experts.answer_writer import Piece
from experts.base import AnyRequest
from experts.config import TransformersExpertConfig, cards_of
from experts.errors import (
    ContextLengthError,
    ExpertConfigError,
    ExpertFailedError,
    InvalidRequestError,
)
from experts.in_process import InProcessEngine, InProcessExpert, RowMaker
from experts.loading import context_length_of, load_model
from experts.mixtures import mixture_of
from experts.prompts import PromptReader
from experts.types import Chunk, Message, Mixture

if TYPE_CHECKING:
    import torch

    from experts.decoding import Row
    from experts.lora import AdapterUse

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


class TransformersExpert(InProcessExpert):
    """One name on a transformers engine: its model, an adapter, or a token router."""

    engine: TransformersEngine

    async def stream(self, request: AnyRequest, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        """Answer a request piece by piece; see ``experts.base.Expert``."""
        mixture = self.engine.mixture(self.card.name, request)
        async with aclosing(super().stream(request, timeout_s=timeout_s)) as chunks:
            async for chunk in chunks:
                chunk.mixture, mixture = mixture, None
                yield chunk


class TransformersEngine(InProcessEngine[TransformersExpert]):
    """Hosts one model with all its adapters; gives one expert for each.

    Args:
        config: What to host.

    Raises:
        ExpertConfigError: Weights are missing or cannot be hosted.
    """

    def __init__(self, config: TransformersExpertConfig) -> None:
        from experts.decoding import Decoder
        from experts.passes import ModelPasses

        self.config = config
        self._tokenizer, self._model, self._adapters = load_model(config)
        # Stacked adapters are buffers, so parameters are those of the model alone.
        self._maker = RowMaker(
            config.name,
            self._tokenizer,
            self._model,
            context_length=context_length_of(config, self._model.config),
            default_max_tokens=config.default_max_tokens,
        )
        passes = ModelPasses(self._model, self._adapters, max_rows=config.max_batch_size)
        decoder = Decoder(passes, max_rows=config.max_batch_size, threads=config.threads)
        super().__init__(config.name, decoder)
        self._experts = {
            card.name: TransformersExpert(self, self._maker.complete(card))
            for card in cards_of(config)
        }

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        return self._tokenizer

    def forward(
        self, text: Sequence[Message] | Sequence[int], name: str | None = None
    ) -> ForwardResult:
        """Run the model over one text and return everything it computes.

        Waits for the running decode step, then has the model for itself. Blocks: from a coroutine
        call it by ``asyncio.to_thread``.

        Args:
            text: A conversation, put through the chat template, or token ids.
            name: One of the engine's experts; none is the model itself.
        """
        expert = self._experts.get(name or self.config.name)
        if expert is None:
            raise InvalidRequestError(
                f"unknown expert {name!r}; known: {', '.join(self._experts)}", "name"
            )
        ids = [item for item in text if isinstance(item, int)]
        if not ids:
            messages = [item for item in text if isinstance(item, Message)]
            ids = PromptReader(expert.card.name, self._tokenizer).chat(messages)
        limit = self._maker.context_length
        if len(ids) > limit:
            raise ContextLengthError(expert.card.name, len(ids), limit)
        use = self._use(expert.card.name)
        return self._decoder.call(lambda: self._forward(ids, use)).result()

    async def rows(
        self, request: AnyRequest, expert: TransformersExpert, pieces: asyncio.Queue[Piece]
    ) -> tuple[list[Row], int]:
        """Check a request and turn it into rows; also return its number of prompt tokens."""
        from experts.decoding import Prompt

        id_lists = self._maker.read(expert.card, request)
        mixture = self.mixture(expert.card.name, request)
        # An adapter that is not in memory is read from disk.
        use = await asyncio.to_thread(self._use, expert.card.name, mixture)
        prompts = [Prompt(ids, use) for ids in id_lists]
        rows = await self._maker.rows(expert.card, request, prompts, pieces)
        return rows, sum(map(len, id_lists))

    def _use(self, name: str, mixture: Mixture | None = None) -> AdapterUse:
        """How adapters change what an expert computes."""
        from experts.lora import NO_ADAPTER, AdapterUse

        if name in {router.name for router in self.config.token_routers}:
            return AdapterUse(router=name)
        try:
            if mixture is None:
                if name == self.config.name:
                    return NO_ADAPTER
                return AdapterUse(((self._adapters.adapter(name), 1.0),))
            if mixture.merging == "parameters":
                parts = [(self._adapters.fused(mixture.shares), 1.0)] if mixture.shares else []
            else:
                shares = mixture.shares.items()
                parts = [(self._adapters.adapter(adapter), share) for adapter, share in shares]
        except ExpertConfigError as exc:
            raise ExpertFailedError(name, str(exc)) from exc
        use = AdapterUse(tuple(parts))
        self._adapters.check(use)
        return use

    def mixture(self, name: str, request: AnyRequest) -> Mixture | None:
        """Which adapters a request has an expert mix; none if it does not.

        Raises:
            InvalidRequestError: The expert cannot.
        """
        mixture = mixture_of(request)
        if mixture is None:
            return None
        if name != self.config.name:
            raise InvalidRequestError(
                f"adapters are mixed by {self.config.name!r}, not by {name!r}", "adapters"
            )
        known = [adapter.name for adapter in self.config.adapters]
        for adapter in mixture.shares:
            if adapter not in known:
                raise InvalidRequestError(
                    f"adapters names {adapter!r}, but {name!r} has "
                    f"{', '.join(map(repr, known)) or 'none'}",
                    "adapters",
                )
        return mixture

    def _forward(self, ids: list[int], use: AdapterUse) -> ForwardResult:
        import torch

        device = self._model.device
        self._adapters.acquire(use)
        try:
            self._adapters.set_rows([use])
            output = self._model(
                input_ids=torch.tensor([ids], device=device),
                output_hidden_states=True,
                use_cache=False,
            )
        finally:
            self._adapters.release(use)
        hidden = torch.stack([state[0] for state in output.hidden_states])
        return ForwardResult(ids, output.logits[0], hidden)
