"""Several answers, and the one that a judge finds best."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from itertools import combinations
from typing import Literal

from pydantic import Field

from experts.base import AnyRequest, Expert
from experts.errors import ExpertError
from experts.types import ChatRequest, Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.errors import CostLimitError
from orchestrator.strategies.calls import Answer, Failure, another_may_answer, answer, play
from orchestrator.strategies.judging import ExpertJudge, Judge, Verdict, spoken
from orchestrator.strategies.prompting import appended, marked
from orchestrator.strategies.several import (
    SeveralStrategy,
    answers_in_time,
    predicted,
    preference,
    ticks,
)

__all__ = ["BestOfStrategy"]

# Up to so many answers every pair is compared; of more, the winners go on to the next round.
ALL_PAIRS = 4

_RETRY = """\
You have answered this before:

{answer}

A reviewer says of it:

{critique}

Answer again, and mend what the reviewer is right about. Give the new answer only, as if it were \
the first."""


class BestOfStrategy(SeveralStrategy):
    """Several answers, and the one that a judge finds best.

    Answers come from several experts, or from one with several samples (``experts: 1``), or both.
    Equal ones are judged once. An answer that the judge gives no grade comes after all that have
    one; if it grades none, the answer of the highest predicted quality wins. With ``bar``, the best
    answer may go back to its expert once, with the judge's critique; the judge says which of both
    is better.

    References:
        Quan, "DMoERM" (arXiv:2403.01197): a judge per category; here any expert, with no
        training. Jiang et al., "LLM-Blender" (arXiv:2306.02561): ranking by pairs; here by prompt.
        Shinn et al., "Reflexion" (arXiv:2303.11366): trying again with a critique; here once.
    """

    type: Literal["best_of"]
    """Which kind of strategy."""
    judge: str = Field(min_length=1)
    """Expert that judges; it need not be one of the route's."""
    judges: dict[str, str] = Field(default_factory=dict)
    """Experts that judge instead, by the router's category."""
    ranking: Literal["pointwise", "pairwise"] = "pointwise"
    """How it judges. ``pointwise``: a grade for each answer. ``pairwise``: pairs in both orders,
    all pairs of up to four answers, in rounds of more; dearer, and surer with a weak judge."""
    bar: float | None = Field(default=None, ge=0, le=1)
    """Grade in [0, 1] below which the best answer is tried once more; none never tries again."""
    judge_tokens: int = Field(default=256, ge=1)
    """Longest verdict in tokens."""
    deadline_share: float = Field(default=0.6, gt=0, le=1)
    """Share of the request's time after which the answers that are there are judged, if any is."""

    @property
    def named_experts(self) -> tuple[str, ...]:
        """All judges."""
        return (self.judge, *self.judges.values())

    @property
    def composes_one(self) -> bool:
        """Whether a single answer is judged."""
        return self.bar is not None

    async def compose(
        self,
        request: ChatRequest,
        calls: Sequence[tuple[str, AnyRequest]],
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Give the best answer."""
        found: list[Answer] = []
        failure: Failure | None = None
        coming = answers_in_time(calls, experts, context, share=self.deadline_share)
        async with aclosing(coming):
            async for one in coming:
                if isinstance(one, Answer):
                    found.append(one)
                elif one is not None:
                    failure = one
                    if not found and not another_may_answer(one):
                        raise one
                elif request.stream:
                    yield Chunk(progress=f"{len(found)} of {len(calls)} answers")
        if not found:
            assert failure is not None  # every call ends in an answer or a failure
            rest = self.otherwise(failure, request, calls, decision, experts, context)
            async with aclosing(rest) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        known = predicted(decision)
        found.sort(key=lambda one: preference(known, one.expert, one.place), reverse=True)
        name = self.judges.get(decision.category or "", self.judge)
        judge = ExpertJudge(name, experts, context, max_tokens=self.judge_tokens)
        contest = _Contest(self, judge, request, found)
        judging = asyncio.ensure_future(contest.run(experts, context))
        async with aclosing(ticks(judging, until=context.deadline)) as waiting:
            async for _ in waiting:
                if request.stream:
                    yield Chunk(progress=f"judging {len(found)} answers")
        if not judging.cancelled():
            judging.result()
        context.answered_by = contest.best.expert
        for chunk in play(contest.best.completion, context.usage):
            yield chunk


class _Contest:
    """The judging of one request's answers.

    Attributes:
        best: The best answer as far as is known; the one predicted best to begin with.
    """

    def __init__(
        self, config: BestOfStrategy, judge: Judge, request: ChatRequest, answers: Sequence[Answer]
    ) -> None:
        self.best = answers[0]
        self._config = config
        self._judge = judge
        self._request = request
        different: dict[str, Answer] = {}
        for one in answers:
            different.setdefault(spoken(one.completion), one)
        self._answers = list(different.values())

    async def run(self, experts: Mapping[str, Expert], context: RequestContext) -> None:
        """Find the best answer; try once more where it is below the bar."""
        verdict = None
        if self._config.ranking == "pointwise":
            if len(self._answers) > 1 or self._config.bar is not None:
                verdict = await self._by_grades()
        elif len(self._answers) > ALL_PAIRS:
            await self._by_rounds()
        elif len(self._answers) > 1:
            await self._by_pairs()
        if self._config.bar is None:
            return
        verdict = verdict or await self._grade(self.best)
        if verdict.score is not None and verdict.score < self._config.bar:
            await self._try_again(verdict, experts, context)

    async def _by_grades(self) -> Verdict:
        verdicts = await asyncio.gather(*map(self._grade, self._answers))
        grades = [-1.0 if one.score is None else one.score for one in verdicts]
        place = grades.index(max(grades))
        self.best = self._answers[place]
        return verdicts[place]

    async def _by_pairs(self) -> None:
        pairs = list(combinations(range(len(self._answers)), 2))
        shares = await asyncio.gather(
            *(self._share(self._answers[one], self._answers[other]) for one, other in pairs)
        )
        points = [0.0] * len(self._answers)
        for (one, other), share in zip(pairs, shares, strict=True):
            points[one] += share
            points[other] += 1.0 - share
        self.best = self._answers[points.index(max(points))]

    async def _by_rounds(self) -> None:
        left = self._answers
        while len(left) > 1:
            pairs = list(zip(left[::2], left[1::2], strict=False))
            shares = await asyncio.gather(*(self._share(one, other) for one, other in pairs))
            won = [pair[share < 0.5] for pair, share in zip(pairs, shares, strict=True)]
            left = [*won, *left[2 * len(pairs) :]]
        self.best = left[0]

    async def _grade(self, one: Answer) -> Verdict:
        return await self._judge.grade(self._request, one.completion)

    async def _share(self, one: Answer, other: Answer) -> float:
        verdict = await self._judge.compare(self._request, one.completion, other.completion)
        return 0.5 if verdict.score is None else verdict.score

    async def _try_again(
        self, verdict: Verdict, experts: Mapping[str, Expert], context: RequestContext
    ) -> None:
        request = _with_critique(self._request, self.best, verdict.critique)
        try:
            again = await answer(self.best.expert, request, experts, context, purpose="retry")
        except (ExpertError, CostLimitError):
            return
        if self._config.ranking == "pairwise":
            better = await self._share(again, self.best) > 0.5
        else:
            better = ((await self._grade(again)).score or 0.0) > (verdict.score or 0.0)
        if better:
            self.best = again


def _with_critique(request: ChatRequest, best: Answer, critique: str) -> ChatRequest:
    given, review = marked(("answer", spoken(best.completion)), ("review", critique))
    return appended(request, _RETRY.format(answer=given, critique=review))
