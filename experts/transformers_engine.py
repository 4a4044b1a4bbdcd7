"""A model and its LoRA adapters run in process by Hugging Face transformers.

Why a decode loop of our own (``experts.decoding``) and not transformers' continuous batching:
``ContinuousBatchingManager`` (5.19) has one random generator for the whole batch, no adapters, no
constraints per request, and reports the log-probability of the drawn token alone. ``generate``
takes a whole batch and lets nobody join.

Knows nothing of Ray or HTTP. torch and transformers are imported when an engine is built.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experts.answer_writer import Piece
from experts.base import AnyRequest
from experts.config import TransformersExpertConfig, cards_of
from experts.errors import ContextLengthError, InvalidRequestError
from experts.in_process import InProcessEngine, InProcessExpert, RowMaker
from experts.loading import context_length_of, load_model
from experts.prompts import PromptReader
from experts.types import ExpertCard, Message

if TYPE_CHECKING:
    import torch

    from experts.decoding import Row

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
    """One name on a transformers engine: its model, or one of its adapters."""

    def __init__(self, engine: TransformersEngine, card: ExpertCard, adapter: int) -> None:
        super().__init__(engine, card)
        self.adapter = adapter


class TransformersEngine(InProcessEngine[TransformersExpert]):
    """Hosts one model with all its adapters; gives one expert for each.

    Args:
        config: What to host.

    Raises:
        ExpertConfigError: Weights are missing or cannot be hosted.
    """

    def __init__(self, config: TransformersExpertConfig) -> None:
        from experts.decoding import Decoder
        from experts.lora import AdapterRows
        from experts.passes import ModelPasses

        self.config = config
        self._adapter_rows = AdapterRows()
        self._tokenizer, self._model = load_model(config, self._adapter_rows)
        # Stacked adapters are buffers, so parameters are those of the model alone.
        self._maker = RowMaker(
            config.name,
            self._tokenizer,
            self._model,
            context_length=context_length_of(config, self._model.config),
            default_max_tokens=config.default_max_tokens,
        )
        passes = ModelPasses(self._model, self._adapter_rows, max_rows=config.max_batch_size)
        decoder = Decoder(passes, max_rows=config.max_batch_size, threads=config.threads)
        super().__init__(config.name, decoder)
        self._experts = {
            card.name: TransformersExpert(self, self._maker.complete(card), adapter)
            for adapter, card in enumerate(cards_of(config))
        }

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        return self._tokenizer

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
            ids = PromptReader(expert.card.name, self._tokenizer).chat(messages)
        limit = self._maker.context_length
        if len(ids) > limit:
            raise ContextLengthError(expert.card.name, len(ids), limit)
        return self._decoder.call(lambda: self._forward(ids, expert.adapter)).result()

    async def rows(
        self, request: AnyRequest, expert: TransformersExpert, pieces: asyncio.Queue[Piece]
    ) -> tuple[list[Row], int]:
        """Check a request and turn it into rows; also return its number of prompt tokens."""
        from experts.decoding import Prompt

        id_lists = self._maker.read(expert.card, request)
        prompts = [Prompt(ids, expert.adapter) for ids in id_lists]
        rows = await self._maker.rows(expert.card, request, prompts, pieces)
        return rows, sum(map(len, id_lists))

    def _forward(self, ids: list[int], adapter: int) -> ForwardResult:
        import torch

        device = self._model.device
        self._adapter_rows.indices = torch.tensor([adapter], device=device) if adapter else None
        output = self._model(
            input_ids=torch.tensor([ids], device=device), output_hidden_states=True, use_cache=False
        )
        hidden = torch.stack([state[0] for state in output.hidden_states])
        return ForwardResult(ids, output.logits[0], hidden)
