"""Several answers, and the one that most of them agree with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from math import fsum
from typing import Literal

from pydantic import Field

from experts.base import AnyRequest, Expert
from experts.types import ChatRequest, Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.strategies.agreement import AnswerForm, answer_key, is_free_text, medoid
from orchestrator.strategies.calls import Answer, Failure, another_may_answer, play
from orchestrator.strategies.judging import spoken
from orchestrator.strategies.several import (
    SeveralStrategy,
    answers_in_time,
    predicted,
    preference,
)
from routers.base import RouterError

__all__ = ["VoteStrategy"]

logger = logging.getLogger("collegium.strategies")


class VoteStrategy(SeveralStrategy):
    """Several answers, and the one that most of them agree with.

    Several experts vote, or one with several samples (``experts: 1``), or both. Answers agree if
    they are equal after a small normalisation (case, white space, punctuation at the ends, numbers
    by value); tool calls by name and arguments, JSON by value. Who fails, or says nothing of the
    wanted form, has no vote. As soon as the lead cannot be overtaken, the rest is cancelled. Ties
    go to the higher predicted quality, then to the expert's place. The answer given is one expert's
    own: the first of those that agree.

    References:
        Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models"
        (arXiv:2203.11171). Departs from it in votes of several experts, and in the medoid of
        sentence vectors for texts, where no two answers are equal.
    """

    type: Literal["vote"]
    """Which kind of strategy."""
    answer: AnswerForm = "auto"
    """What must agree. ``exact``: the whole answer. ``final_line``: what follows its last
    ``Answer:``, its boxed part, or its last line. ``number``: its last number. ``json``: its value.
    ``text``: nothing; the answer most like all others wins. ``auto``: JSON, what is marked as the
    answer, or all of it; if three or more are longer than eight words and none agree, as ``text``.
    Requests for JSON vote by its value."""
    weights: Literal["equal", "quality"] = "equal"
    """What a vote counts: 1, or the predicted quality of its expert."""
    deadline_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the request's time after which the answers that are there decide, if any is."""

    async def compose(
        self,
        request: ChatRequest,
        calls: Sequence[tuple[str, AnyRequest]],
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Give the answer that has most votes."""
        ballot = _Ballot(self._form(request), self._weights(calls, decision), decision, calls)
        failure: Failure | None = None
        coming = answers_in_time(calls, experts, context, share=self.deadline_share)
        async with aclosing(coming):
            async for found in coming:
                if found is None:
                    if request.stream:
                        yield Chunk(progress=f"{len(ballot.answers)} of {len(calls)} answers")
                    continue
                if isinstance(found, Answer):
                    ballot.add(found)
                else:
                    failure = found
                    ballot.failed += 1
                    if not ballot.answers and not another_may_answer(found):
                        raise found
                if ballot.decided:
                    break
        if not ballot.answers:
            assert failure is not None  # every call ends in an answer or a failure
            rest = self.otherwise(failure, request, calls, decision, experts, context)
            async with aclosing(rest) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        winner = await ballot.winner(context)
        context.answered_by = winner.expert
        for chunk in play(winner.completion, context.usage):
            yield chunk

    def _form(self, request: ChatRequest) -> AnswerForm:
        wanted = request.response_format
        return "json" if wanted is not None and wanted.type != "text" else self.answer

    def _weights(
        self, calls: Iterable[tuple[str, AnyRequest]], decision: Decision
    ) -> dict[str, float]:
        known = predicted(decision) if self.weights == "quality" else {}
        return {name: known.get(name, 1.0) for name, _ in calls}


class _Ballot:
    """The votes of one request.

    Attributes:
        answers: All answers so far.
        failed: Calls that ended without one.
    """

    def __init__(
        self,
        form: AnswerForm,
        weights: Mapping[str, float],
        decision: Decision,
        calls: Sequence[tuple[str, AnyRequest]],
    ) -> None:
        self.answers: list[Answer] = []
        self.failed = 0
        self._form = form
        self._weights = weights
        self._preference = [
            preference(predicted(decision), name, place) for place, (name, _) in enumerate(calls)
        ]
        self._open = dict(enumerate(name for name, _ in calls))
        self._votes: dict[str, list[Answer]] = {}

    def add(self, answer: Answer) -> None:
        """Take an answer."""
        self.answers.append(answer)
        del self._open[answer.place]
        if (key := answer_key(answer.completion.choices[0], self._form)) is not None:
            self._votes.setdefault(key, []).append(answer)

    @property
    def decided(self) -> bool:
        """Whether the answers still out cannot change the winner, whatever they are."""
        if not self._votes or self._form == "text":
            return False
        leader = max(self._votes, key=lambda key: self._standing(self._votes[key]))
        lead = self._votes[leader]
        if len(lead) == 1 and self._texts_may_decide:
            return False
        out = self._most_to_come()
        rivals = [votes for key, votes in self._votes.items() if key != leader]
        # All of them for the same rival, or for an answer nobody gave yet, is the worst case.
        return all(self._standing(lead) > self._standing(rival, out) for rival in (*rivals, []))

    @property
    def _texts_may_decide(self) -> bool:
        return self._form == "auto" and len(self.answers) + len(self._open) - self.failed > 2

    @property
    def _all_differ(self) -> bool:
        """Whether there are several texts of which no two are equal, as texts hardly are."""
        alone = all(len(votes) == 1 for votes in self._votes.values())
        return (
            self._form == "auto"
            and alone
            and len(self._votes) == len(self.answers) > 2
            and all(map(is_free_text, self._votes))
        )

    def _most_to_come(self) -> list[int]:
        """Places of the calls still out; of the heaviest that may be, as failures name none."""
        places = sorted(
            self._open,
            key=lambda place: (self._weights[self._open[place]], self._preference[place]),
            reverse=True,
        )
        return places[: len(places) - self.failed]

    def _standing(
        self, votes: Sequence[Answer], out: Sequence[int] = ()
    ) -> tuple[float, tuple[float, int]]:
        """What votes count, then the preference among equals, if those still out join them."""
        weights = [self._weights[vote.expert] for vote in votes]
        weights += [self._weights[self._open[place]] for place in out]
        places = [*(vote.place for vote in votes), *out]
        best = max((self._preference[place] for place in places), default=(0.0, -len(places)))
        return round(fsum(weights), 9), best

    async def winner(self, context: RequestContext) -> Answer:
        """The answer to give."""
        preferred = sorted(self.answers, key=lambda one: self._preference[one.place], reverse=True)
        if not self._votes:
            return preferred[0]
        if self._form == "text" or self._all_differ:
            return await self._medoid(preferred, context)
        votes = max(self._votes.values(), key=self._standing)
        return min(votes, key=lambda vote: vote.place)

    async def _medoid(self, preferred: Sequence[Answer], context: RequestContext) -> Answer:
        texts = [spoken(one.completion) for one in preferred]
        weights = [self._weights[one.expert] for one in preferred]
        try:
            async with asyncio.timeout(max(0.0, context.remaining_s)):
                return preferred[await asyncio.to_thread(medoid, texts, weights)]
        except (TimeoutError, RouterError, ImportError) as error:
            logger.warning("vote: texts cannot be compared, the best predicted wins: %s", error)
            return preferred[0]
