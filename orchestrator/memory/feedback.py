"""What users say of answers: a rating, or which of two was better. Never texts."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from orchestrator.errors import FeedbackExistsError, MemoryUnavailableError
from orchestrator.memory.decisions import DecisionLog, DecisionRecord
from orchestrator.memory.guard import Memory

__all__ = ["Feedback", "FeedbackBody", "FeedbackLog", "FeedbackRecord", "OnFeedback"]

logger = logging.getLogger("collegium.memory")

FEATURE = "feedback"

DecisionId = Annotated[str, StringConstraints(pattern=r"^dec_[0-9a-f]{32}$")]


class FeedbackBody(BaseModel):
    """Body of ``POST /v1/feedback``: a decision, and either ``rating`` or ``preferred_over``."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    decision_id: DecisionId
    """The answer's ``x-collegium-decision-id``."""
    rating: float | None = Field(default=None, ge=0, le=1)
    """How good the answer was, from 0 to 1."""
    preferred_over: DecisionId | None = None
    """Id of the decision whose answer to the same question was worse."""

    @model_validator(mode="after")
    def _one_statement(self) -> FeedbackBody:
        if (self.rating is None) == (self.preferred_over is None):
            raise ValueError("give either rating or preferred_over")
        if self.preferred_over == self.decision_id:
            raise ValueError("preferred_over must be another decision than decision_id")
        return self

    @property
    def id(self) -> str:
        """What it is about: a decision, or two in whichever order."""
        if self.preferred_over is None:
            return self.decision_id
        return "|".join(sorted([self.decision_id, self.preferred_over]))


class Feedback(FeedbackBody):
    """Feedback as it was taken."""

    object: Literal["feedback"] = "feedback"
    """What this is."""
    created: float
    """When it was given, in seconds since 1970."""


class FeedbackRecord(BaseModel):
    """Feedback together with the decision it is about, which the decision log may drop."""

    decision: DecisionRecord
    feedback: Feedback


OnFeedback = Callable[[DecisionRecord, Feedback], Awaitable[None]]


class FeedbackLog:
    """Takes feedback once per decision, and once per pair of decisions.

    Args:
        memory: Where to keep it.
        decisions: What it can be about.

    Attributes:
        on_feedback: Are called where it is taken, again if it is given again. Other replicas, and
            this one after a restart, find it by ``since``.
    """

    def __init__(self, memory: Memory, decisions: DecisionLog) -> None:
        self.on_feedback: list[OnFeedback] = []
        self._memory = memory
        self._decisions = decisions

    async def give(self, body: FeedbackBody, scope: str) -> Feedback:
        """Take feedback; the same again changes nothing.

        Returns:
            The feedback as it is kept.

        Raises:
            UnknownDecisionError: A decision is not there (any more), or somebody else's.
            FeedbackExistsError: Something else was said already.
            MemoryUnavailableError: The store does not answer.
        """
        decision = await self._decisions.find(body.decision_id, scope)
        if body.preferred_over is not None:
            await self._decisions.find(body.preferred_over, scope)
        feedback = Feedback(**body.model_dump(), created=time.time())
        content = FeedbackRecord(decision=decision, feedback=feedback).model_dump_json().encode()
        store = self._memory.store
        if not await self._memory.required(FEATURE, store.append(FEATURE, body.id, content)):
            earlier = await self._memory.required(FEATURE, store.read(FEATURE, body.id))
            kept = FeedbackRecord.model_validate_json(earlier).feedback if earlier else feedback
            if kept.model_dump(exclude={"created"}) != feedback.model_dump(exclude={"created"}):
                raise FeedbackExistsError(body.decision_id)
            feedback = kept
        for callback in self.on_feedback:
            try:
                await callback(decision, feedback)
            except MemoryUnavailableError:
                raise
            except Exception:
                logger.exception("feedback was kept, but not everybody could use it")
        return feedback

    async def since(
        self, after: str | None = None, *, limit: int = 1000
    ) -> list[tuple[str, FeedbackRecord]]:
        """Feedback in the order in which it was given, with its ids.

        Args:
            after: Id of the last one seen; none starts with the oldest that is kept.
            limit: How many at most.

        Raises:
            MemoryUnavailableError: The store does not answer.
        """
        found = await self._memory.required(
            FEATURE, self._memory.store.scan(FEATURE, after=after, limit=limit)
        )
        return [(id, FeedbackRecord.model_validate_json(content)) for id, content in found]
