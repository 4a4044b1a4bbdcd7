"""A base model answers with a mixture of those of its adapters that fit the query."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Literal

from pydantic import Field

from experts.base import AnyRequest, Expert
from experts.config import ExpertConfig, TransformersExpertConfig, cards_of
from experts.types import Chunk, Merging
from orchestrator.decision import Decision, RequestContext
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.calls import stream_one
from orchestrator.strategies.several import predicted, shares_by_quality

__all__ = ["MixStrategy"]

# Decimals of shares. No answer shows finer differences, but each would make an adapter of its
# own where parameters are merged, which no other request finds in memory.
SHARE_DECIMALS = 3

# Engines that mix adapters; scripted experts stand in for a base and its adapters.
MIXING: frozenset[str] = frozenset({"transformers", "scripted"})


class MixStrategy(Strategy):
    """The base model answers with a mixture of the best adapters, or alone.

    Experts of the route are adapters of ``base``, and ``base`` itself if no adapter may be worth
    its update: where the base is predicted to be best it answers as it is.

    References:
        With the router ``centroids``: LoraRetriever (arXiv:2402.09997) is ``weights: uniform``, its
        mixture adds up outputs and its fusion parameters; TTMM (arXiv:2505.14136) is ``weights:
        quality`` with a ``top_k`` of 50. AdapterSoup (arXiv:2302.07027) is the fusion, chosen for a
        task there and for each query here.
    """

    type: Literal["mix"]
    """Which kind of strategy."""
    base: str
    """The model whose adapters are mixed; it answers."""
    top_k: int = Field(default=3, ge=1, le=64)
    """Adapters that are mixed at most, where neither the policy nor the request says."""
    weights: Literal["quality", "uniform"] = "quality"
    """Shares: the softmax of the log-odds of predicted qualities, or all the same."""
    min_share: float = Field(default=0.01, ge=0, lt=1)
    """Adapters with less are left out, and the others' shares made 1 again."""
    merging: Merging = "outputs"
    """What is added up: what adapters do, or their matrices, which makes one adapter of them."""
    token_router: str | None = None
    """A token router of the base, which shares out adapters instead wherever one of them is
    predicted to be better than the base."""

    @property
    def named_experts(self) -> tuple[str, ...]:
        """The base, and its token router."""
        return (self.base,) if self.token_router is None else (self.base, self.token_router)

    def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the base's answer."""
        shares = self.shares(decision)
        if shares and self.token_router is not None:
            return stream_one(self.token_router, request, experts, context)
        fields = {"adapters": shares, "adapter_merging": self.merging}
        return stream_one(self.base, request.model_copy(update=fields), experts, context)

    def shares(self, decision: Decision) -> dict[str, float]:
        """What each adapter's update is multiplied by; none where the base answers alone."""
        if decision.experts[0] == self.base:
            return {}
        names = [name for name in decision.experts if name != self.base]
        names = names[: decision.width or self.top_k]
        if self.weights == "uniform":
            return dict.fromkeys(names, 1 / len(names))
        known = predicted(decision)
        shares = shares_by_quality([known.get(name, 0.5) for name in names])
        # The largest is never left out, however many share.
        least = min(self.min_share, max(shares))
        kept = _whole({n: share for n, share in zip(names, shares, strict=True) if share >= least})
        return _whole({name: round(share, SHARE_DECIMALS) for name, share in kept.items()})

    def check_experts(
        self, route: str, names: Sequence[str], entries: Iterable[ExpertConfig]
    ) -> None:
        """Make sure that all experts are the base or adapters of it.

        Raises:
            ValueError: One is not, or the base's engine does not mix.
        """
        entries = list(entries)
        routers = {
            one.name
            for entry in entries
            if isinstance(entry, TransformersExpertConfig) and entry.name == self.base
            for one in entry.token_routers
        }
        if self.token_router is not None and self.token_router not in routers:
            raise ValueError(
                f"the strategy 'mix' of route {route!r} names {self.token_router!r}, which is no "
                f"token router of {self.base!r}; it has {', '.join(map(repr, routers)) or 'none'}"
            )
        own = {
            card.name
            for entry in entries
            if entry.engine in MIXING and (entry.name == self.base or entry.engine == "scripted")
            for card in cards_of(entry)
            if entry.engine == "scripted" or card.adapter is not None or card.name == self.base
        }
        others = [name for name in (self.base, *names) if name not in own]
        if others:
            raise ValueError(
                f"the strategy 'mix' of route {route!r} needs {self.base!r} to be a model with "
                f"engine 'transformers' and the route's experts to be its adapters, which "
                f"{', '.join(map(repr, others))} are not"
            )


def _whole(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares that sum to 1, without those of nothing."""
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items() if share}
