"""How a base model and adapters of it behave on texts: what tests of admission look at.

Imports torch when it is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from experts.config import AdapterConfig, TokenRouterConfig, TransformersExpertConfig
from experts.finetune_data import ChatPair, TokenPair, common_start, pack, tokenize

if TYPE_CHECKING:
    import torch

    from experts.lora import AdapterUse

__all__ = ["Examiner", "Reader"]

# Tokens that are computed together, about; attention over a row of texts grows with its square.
ROW_TOKENS = 1024


Reader: TypeAlias = "str | AdapterUse | None"
"""Who reads texts: an adapter by name, a mixture of some, or the base alone."""


class Examiner:
    """A base model with adapters.

    Args:
        base: The model, as in an expert's config.
        adapters: Folder of each adapter, by name.
        device: A torch device.
        dtype: Number format of the model.
        token_routers: Ways to choose among the adapters token by token.

    Attributes:
        tokenizer: The base's.
        model: The base.
        adapters: On the base.

    Raises:
        ExpertConfigError: Something cannot be loaded, or does not fit the base.
    """

    def __init__(
        self,
        base: str,
        adapters: Mapping[str, Path],
        *,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        token_routers: Sequence[TokenRouterConfig] = (),
    ) -> None:
        from experts.loading import load_model

        hosted = [AdapterConfig(name=name, path=str(folder)) for name, folder in adapters.items()]
        config = TransformersExpertConfig(
            name="base", engine="transformers", model=base, adapters=tuple(hosted), device=device,
            dtype=dtype, token_routers=tuple(token_routers),
        )  # fmt: skip
        self.tokenizer, self.model, self.adapters = load_model(config)

    def read(self, pairs: Sequence[ChatPair]) -> list[TokenPair]:
        """Pairs as the base's tokenizer and chat template make them."""
        return tokenize(pairs, self.tokenizer)

    def logits(self, pairs: Sequence[TokenPair], adapter: Reader) -> Iterator[torch.Tensor]:
        """What follows: logits of each pair's answer tokens, shape (n_tokens, vocabulary) each.

        Args:
            pairs: Texts; those that begin alike are best neighbours.
            adapter: Who reads them.
        """
        import torch

        from experts.lora import NO_ADAPTER, AdapterUse

        use = adapter if isinstance(adapter, AdapterUse) else NO_ADAPTER
        if isinstance(adapter, str):
            use = AdapterUse(((self.adapters.adapter(adapter), 1.0),))
        self.adapters.acquire(use)
        try:
            for group in _rows_of(pairs):
                self.adapters.set_rows([use])
                with torch.no_grad():
                    found = pack(group).answer_logits(self.model)
                yield from found.float().split([len(pair.answer_ids) for pair in group])
        finally:
            self.adapters.release(use)

    def losses(self, pairs: Sequence[TokenPair], adapter: Reader) -> NDArray[np.float64]:
        """Loss of each answer, summed over its tokens, in nats; shape (n_pairs,)."""
        import torch
        from torch.nn import functional

        found = [
            float(
                functional.cross_entropy(
                    logits.cpu(), torch.tensor(pair.answer_ids), reduction="sum"
                )
            )
            for pair, logits in zip(pairs, self.logits(pairs, adapter), strict=True)
        ]
        return np.array(found)

    def divergence(self, pairs: Sequence[TokenPair], one: Reader, other: Reader) -> float:
        """How differently two of them go on: Jensen-Shannon divergence per token, in nats."""
        total, tokens = 0.0, 0
        for p, q in zip(self.logits(pairs, one), self.logits(pairs, other), strict=True):
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            middle = (log_p.exp() + log_q.exp()).div(2).log()
            total += sum(float((x.exp() * (x - middle)).sum()) for x in (log_p, log_q)) / 2
            tokens += len(p)
        return total / tokens


def _rows_of(pairs: Iterable[TokenPair]) -> Iterator[list[TokenPair]]:
    """Neighbours together, as many as a row bears; what all of a row begin with counts once."""
    row: list[TokenPair] = []
    shared, total = 0, 0
    for pair in pairs:
        start = common_start([row[0].prompt_ids[:shared], pair.prompt_ids]) if row else 0
        longer = total + (len(row) - 1) * (shared - start) + pair.length - start
        if row and longer > ROW_TOKENS:
            yield row
            row = []
        if row:
            shared, total = start, longer
        else:
            shared, total = len(pair.prompt_ids) - 1, pair.length
        row.append(pair)
    if row:
        yield row
