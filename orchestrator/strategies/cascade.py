"""Experts answer one after the other, as long as another answer is expected to be worth asking."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from experts.base import AnyRequest, Expert
from experts.errors import ExpertError
from experts.types import ChatRequest, Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.errors import CostLimitError
from orchestrator.policies import LEAST_KNOB
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.calls import (
    Answer,
    another_may_answer,
    answer,
    expected_usd,
    held_back,
    play,
    stream_one,
)
from orchestrator.strategies.confidence import (
    Calibration,
    Signal,
    confidence_of,
    shape_wanted,
    unusable,
    with_signal,
    without_signal,
)
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.strategies.supermodels import Beliefs, best_supermodel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CascadeStrategy", "Walk"]

logger = logging.getLogger("collegium.strategies")

# What is expected of an expert where no router was asked.
UNKNOWN_QUALITY = 0.5


class CascadeStrategy(Strategy):
    """Experts answer one after the other, as long as another answer is expected to be worth asking.

    What asking costs in points of quality is the route's policy's to say: a candidate's predicted
    quality less its utility. So the knob, a budget's price and a margin mean what they mean for one
    expert, and with ``max_answers`` 1 the strategy chooses as ``single`` does.

    After each answer its expert's quality becomes the calibrated confidence in it. The answer of
    the best quality is given. An expert that fails counts as one of quality 0, and so does an
    answer that is empty or not of the shape asked for. An expert of which it is certain that its
    answer will be given, whatever it says, is not judged but streamed.

    Several answers (``n``) and text completions are answered as ``fallback`` does.

    References:
        Dekoninck et al., "A Unified Approach to Routing and Cascading for LLMs" (arXiv:2410.10347);
        see ``orchestrator.strategies.supermodels`` for the departures. Of the best supermodel's
        unasked experts, the cheapest is asked first. Chen et al., "FrugalGPT" (arXiv:2305.05176):
        the mode ``cascade``, with thresholds on calibrated confidences.
    """

    type: Literal["cascade"] = "cascade"
    """Which kind of strategy."""
    mode: Literal["cascade_routing", "cascade"] = "cascade_routing"
    """``cascade_routing`` asks whoever is worth most next; ``cascade`` goes through a fixed order
    until an answer is sure enough."""
    max_answers: int = Field(default=3, ge=1, le=16)
    """Experts that answer one request at most; failures do not count. A request's ``top_k`` and the
    policy ``top_p`` say it for one request."""
    signal: Signal = "logprob"
    """What confidence is made of: ``logprob``, the mean token probability; ``margin``, the mean
    margin between the two likeliest tokens; ``verify``, the expert itself is asked whether its
    answer is right; ``judge``, another expert rates it."""
    judge: str | None = None
    """Who rates answers, for the signal ``judge``."""
    calibrations: dict[str, Calibration] = Field(default_factory=dict)
    """By expert, what the signal says of an answer's quality; found by ``collegium calibrate``.
    Answers of other experts are taken to be as good as predicted."""
    correlation: float = Field(default=0.0, ge=0, lt=1)
    """Of experts' qualities beyond what the router predicts; found by ``collegium calibrate``. An
    unsure answer makes one expect less of the others too."""
    order: tuple[str, ...] = ()
    """For ``cascade``: whom to ask, first to last; none asks all, the cheapest first."""
    thresholds: tuple[float, ...] = ()
    """For ``cascade``: an answer of at least this quality is given. The first is for the first
    answer and so on, the last for all that follow."""

    @model_validator(mode="after")
    def _complete(self) -> CascadeStrategy:
        if (self.signal == "judge") != (self.judge is not None):
            raise ValueError("'judge' names who rates answers: with the signal 'judge', only then")
        plain = self.mode == "cascade"
        if plain != bool(self.thresholds) or (self.order and not plain):
            raise ValueError(
                "'thresholds' are what the mode 'cascade' goes by, and 'order' is whom it asks; "
                "'cascade_routing' has neither"
            )
        return self

    @property
    def named_experts(self) -> tuple[str, ...]:
        """The judge, and who is calibrated or ordered."""
        judge = () if self.judge is None else (self.judge,)
        return tuple(dict.fromkeys((*judge, *self.calibrations, *self.order)))

    async def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Ask until it pays no more, then give the best answer."""
        if not isinstance(request, ChatRequest) or request.n > 1:
            fallback = FallbackStrategy().run(request, decision, experts, context)
            async with aclosing(fallback) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        walk = self.walk(decision, experts)
        limits = _Limits(request, walk.names, experts, context)
        found: dict[int, Answer] = {}
        error: ExpertError | CostLimitError | None = None
        while (place := walk.next(limits.fitting(walk))) is not None:
            name = walk.names[place]
            begun = False
            try:
                after = limits.fitting(walk, after=place)
                if walk.settled(place, after, shaped=shape_wanted(request)):
                    chunks = stream_one(name, request, experts, context)
                    async with aclosing(held_back(chunks, request, context)) as pieces:
                        async for piece in pieces:
                            begun = True
                            yield piece
                    return
                judged = walk.judged(place)
                wanted = with_signal(request, self.signal) if judged else request
                found[place] = given = await answer(name, wanted, experts, context)
            except (ExpertError, CostLimitError) as failure:
                # What one expert did not mind is no error that all would meet.
                if begun or (not found and not another_may_answer(failure)):
                    raise
                logger.warning("expert %s failed: %s", name, failure)
                error = failure
                walk.fail(place)
                if context.remaining_s <= 0:
                    break
                continue
            walk.answer(place, await self._quality(given, place, walk, request, experts, context))
        if not found:
            assert error is not None, "somebody is asked first"
            raise error
        best = max(found, key=walk.rank)
        context.answered_by = walk.names[best]
        for chunk in play(without_signal(found[best].completion, request), context.usage):
            yield chunk

    async def _quality(
        self,
        given: Answer,
        place: int,
        walk: Walk,
        request: ChatRequest,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> float | None:
        """The quality of an answer; none if nothing is known but what was predicted."""
        if unusable(request, given.completion):
            return 0.0
        if not walk.judged(place):
            return None
        signal = await confidence_of(
            given, self.signal, request, experts, context, judge=self.judge
        )
        return None if signal is None else walk.chance(place, signal)

    def walk(self, decision: Decision, experts: Mapping[str, Expert]) -> Walk:
        """The state of a request nobody has answered yet."""
        candidates = {one.expert: one for one in decision.candidates}
        quality = [
            candidates[name].quality if name in candidates else None for name in decision.experts
        ]
        known = [UNKNOWN_QUALITY if one is None else one for one in quality]
        utility = [candidates[name].utility if name in candidates else None
                   for name in decision.experts]  # fmt: skip
        costs = [candidates[name].cost_usd if name in candidates else 0.0
                 for name in decision.experts]  # fmt: skip
        knob = max(LEAST_KNOB, 1.0 if decision.cost_quality is None else decision.cost_quality)
        charges = [q if u is None else q - u / knob for q, u in zip(known, utility, strict=True)]
        if None in utility:
            charges = [0.0] * len(known)
        able = [
            name
            for name in decision.experts
            if self.signal in ("verify", "judge") or "logprobs" in experts[name].card.capabilities
        ]
        at_most = decision.width or self.max_answers
        return Walk(self, decision.experts, known, charges, costs, able=able, at_most=at_most)


class Walk:
    """One request's way through a cascade: whom to ask next, by what is known so far.

    Args:
        strategy: The cascade.
        names: Of the experts, in the order of utility.
        quality: Predicted, one per expert.
        charges: Points of quality that asking costs.
        costs: What is cheaper, where charges are equal.
        able: Names of those whose answers bring the signal.
        at_most: How many may answer.
    """

    def __init__(
        self,
        strategy: CascadeStrategy,
        names: Sequence[str],
        quality: Sequence[float],
        charges: Sequence[float],
        costs: Sequence[float],
        *,
        able: Sequence[str],
        at_most: int,
    ) -> None:
        import numpy as np

        self.names = tuple(names)
        self.answered: list[int] = []
        self._strategy = strategy
        self._costs = costs
        self._left = at_most
        # A threshold below zero would pay for asking.
        self._charges = np.array(charges, np.float64) - min(0.0, *charges)
        known = strategy.calibrations
        self._information = [
            known[name].information if name in known and name in able else 0.0 for name in names
        ]
        self._beliefs = Beliefs(quality, self._information, strategy.correlation)
        self._open = set(range(len(names)))
        self._order = self._ordered()

    def _ordered(self) -> list[int]:
        if self._strategy.order:
            named = [name for name in self._strategy.order if name in self.names]
            return [self.names.index(name) for name in named]
        return sorted(self._open, key=lambda j: (self._charges[j], self._costs[j], j))

    @property
    def quality(self) -> NDArray[np.float64]:
        """What is known of each expert's answer."""
        return self._beliefs.quality

    @property
    def open(self) -> list[int]:
        """Positions of experts that were not asked yet."""
        return sorted(self._open)

    def judged(self, place: int) -> bool:
        """Whether an expert's answer can be judged."""
        return self._information[place] > 0

    def rank(self, place: int) -> tuple[float, int]:
        """What answers are compared by; of equally good ones, the earlier expert's."""
        return float(self.quality[place]), -place

    def next(self, fitting: Sequence[int]) -> int | None:
        """Whom to ask next, of those that fit into the request's limits; none to stop."""
        if not self._left or not fitting:
            return None
        if self._strategy.mode == "cascade":
            return self._next_in_order(fitting)
        found = best_supermodel(
            self._beliefs, self._charges, fitting, best=self._best(), at_most=self._left
        )
        return min(found, key=lambda j: (self._charges[j], self._costs[j], j), default=None)

    def _next_in_order(self, fitting: Sequence[int]) -> int | None:
        best, thresholds = self._best(), self._strategy.thresholds
        if best is not None:
            stage = min(len(self.answered), len(thresholds)) - 1
            if best >= thresholds[stage]:
                return None
        rest = [place for place in self._order if place in fitting]
        # An order that names nobody who can serve the request must not leave it unanswered.
        return next(iter(rest), None if self.answered else fitting[0])

    def _best(self) -> float | None:
        return max((float(self.quality[j]) for j in self.answered), default=None)

    def settled(self, place: int, fitting: Sequence[int], *, shaped: bool = False) -> bool:
        """Whether an expert's answer is certain to be given, if it gives one.

        Args:
            place: Who is asked next.
            fitting: Who could still be asked after it.
            shaped: Whether the answer must have a shape, and is worth nothing without it.
        """
        after = copy(self)
        after.answered = [*self.answered, place]
        after._open = self._open - {place}
        after._left = self._left - 1
        if max(after.answered, key=after.rank) != place:
            return False
        if not self.judged(place):
            return after.next(fitting) is None
        followers = set(fitting) & set(self._order)
        if not after._left or not followers:
            return True
        return not shaped and after._stops_anyway(place, fitting)

    def _stops_anyway(self, place: int, fitting: Sequence[int]) -> bool:
        """Whether neither the worst nor the best signal of the last answer changes anything."""
        calibration = self._strategy.calibrations[self.names[place]]
        for signal, _ in (calibration.points[0], calibration.points[-1]):
            then = copy(self)
            then._beliefs = deepcopy(self._beliefs)
            then._beliefs.observe(place, self.chance(place, signal))
            if max(then.answered, key=then.rank) != place or then.next(fitting) is not None:
                return False
        return True

    def chance(self, place: int, signal: float) -> float:
        """The chance that an answer with this signal is right."""
        calibration = self._strategy.calibrations[self.names[place]]
        return calibration.chance(signal, float(self.quality[place]))

    def answer(self, place: int, quality: float | None) -> None:
        """An expert has answered.

        Args:
            place: Who.
            quality: Of its answer, 0 if it is of no use; none leaves it at what was expected.
        """
        self._open.discard(place)
        self.answered.append(place)
        self._left -= 1
        if quality == 0.0:
            self._beliefs.fix(place, 0.0)
        elif quality is not None:
            self._beliefs.observe(place, quality)

    def fail(self, place: int) -> None:
        """An expert could not answer, which says nothing of the others."""
        self._open.discard(place)
        self._beliefs.fix(place, 0.0)


@dataclass(frozen=True, slots=True)
class _Limits:
    """Who fits into what is left of a request's time and money."""

    request: ChatRequest
    names: Sequence[str]
    experts: Mapping[str, Expert]
    context: RequestContext
    usd: list[float] = field(init=False)
    seconds: list[float] = field(init=False)

    def __post_init__(self) -> None:
        cards = [self.experts[name].card for name in self.names]
        usd = [0.0] * len(self.names)
        if self.context.max_cost_usd is not None:
            usd = [expected_usd(self.experts[name], self.request) for name in self.names]
        object.__setattr__(self, "usd", usd)
        object.__setattr__(self, "seconds", [card.latency_s or 0.0 for card in cards])

    def fitting(self, walk: Walk, *, after: int | None = None) -> list[int]:
        """Positions of open experts that still fit; all if nobody was asked yet.

        Args:
            walk: Who is open.
            after: An expert whose time and money are taken as spent.
        """
        usd, seconds = (0.0, 0.0) if after is None else (self.usd[after], self.seconds[after])
        left = self.context.remaining_s - seconds
        fit = [
            place
            for place in walk.open
            if place != after
            and self.context.affords(usd + self.usd[place])
            and self.seconds[place] < left
        ]
        # Somebody has to be asked first, or the error would say nothing of what is missing.
        return fit or ([] if walk.answered or after is not None else walk.open)
