"""Feedback on answers, and signs of it: who learns what from it. Knows nothing of HTTP."""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from experts.base import AnyRequest
from experts.types import Chunk
from orchestrator.decision import PUBLIC, Decision, RequestContext
from orchestrator.learning.experiments import Experiment
from orchestrator.learning.learner import Learner, Lesson, Lessons, preferred

__all__ = ["Learning"]

REMEMBERED_REQUESTS = 10_000


class Learning:
    """Brings what is said of answers to those who learn from it. Owned by the event loop.

    Args:
        learners: Of the routes that learn, by name.
        experiments: By name.

    Attributes:
        on_lesson: Is called with a decision's id and what can be learnt from its answer.
    """

    def __init__(self, learners: dict[str, Learner], experiments: Mapping[str, Experiment]) -> None:
        self.on_lesson: Callable[[str, Lesson], None] = lambda decision_id, lesson: None
        self.learners = learners
        self.experiments = experiments
        self.lessons = Lessons()
        self._answered: OrderedDict[bytes, tuple[float, str]] = OrderedDict()

    @property
    def learns(self) -> bool:
        """Whether anybody does."""
        return bool(self.learners or self.experiments)

    def learn(self, decision_id: str, reward: float) -> bool:
        """Learn how good an answer was; whether anything was learnt.

        Raises:
            ValueError: The reward lies outside [0, 1].
        """
        if not 0.0 <= reward <= 1.0:
            raise ValueError(f"a reward must lie in [0, 1], got {reward}")
        lesson = self.lessons.take(decision_id)
        if lesson is None:
            return False
        experiment = self.experiments.get(lesson.experiment or "")
        # Arms may have been other routes when the answer was given.
        of_arm = experiment and lesson.arm and experiment.route(lesson.arm) == lesson.route
        if experiment is not None and lesson.arm is not None and of_arm:
            experiment.ratings[lesson.arm].add(reward)
        learner = self.learners.get(lesson.route)
        learnt = learner is not None and learner.learn(lesson, lesson.expert, reward)
        return learnt or bool(of_arm)

    def learn_preference(self, better_id: str, worse_id: str) -> bool:
        """Learn that one answer was preferred to another of the same route.

        Whether anything was learnt; two answers of one expert say nothing of experts.
        """
        better, worse = self.lessons.get(better_id), self.lessons.get(worse_id)
        if better is None or worse is None or better.route != worse.route:
            return False
        learner = self.learners.get(better.route)
        if learner is None or better.expert == worse.expert:
            return False
        if not (learner.knows(better, better.expert) and learner.knows(worse, worse.expert)):
            return False
        assert better.expert is not None
        assert worse.expert is not None
        up, down = preferred(learner.expected(better), learner.expected(worse))
        learner.learn(better, better.expert, up)
        learner.learn(worse, worse.expert, down)
        self.lessons.take(better_id)
        self.lessons.take(worse_id)
        return True

    async def followed(
        self,
        chunks: AsyncGenerator[Chunk, None],
        request: AnyRequest,
        decision: Decision,
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Pass an answer on, and keep what can be learnt from it."""
        self._notice_retry(request, decision, context)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        finally:
            self._keep(decision, context)

    def _keep(self, decision: Decision, context: RequestContext) -> None:
        lesson = context.lesson
        assert lesson is not None
        learner = self.learners.get(lesson.route)
        if learner is not None:
            for call in context.calls:
                if call.failed:
                    learner.learn(lesson, call.expert, 0.0, weight=learner.config.error_weight)
        experiment = self.experiments.get(lesson.experiment or "")
        if experiment is not None and lesson.arm is not None:
            experiment.requests.add(lesson.arm)
        lesson.expert = context.expert
        self.lessons.add(decision.id, lesson)
        self.on_lesson(decision.id, lesson)

    def _notice_retry(
        self, request: AnyRequest, decision: Decision, context: RequestContext
    ) -> None:
        learner = self.learners.get(decision.route or "")
        if learner is None or not learner.config.retry_weight:
            return
        # Without a key or a session nobody knows whether it is the same client.
        if context.scope == PUBLIC and context.session_id is None:
            return
        asked = (
            f"{context.scope}\0{context.session_id}\0{decision.route}\0{request.model_dump_json()}"
        )
        key, now = hashlib.sha256(asked.encode()).digest(), time.monotonic()
        before, earlier_id = self._answered.pop(key, (-math.inf, ""))
        self._answered[key] = (now, decision.id)
        while len(self._answered) > REMEMBERED_REQUESTS:
            self._answered.popitem(last=False)
        lesson = self.lessons.get(earlier_id)
        if lesson is None or lesson.expert is None:
            return
        if now - before <= learner.config.retry_within_s:
            learner.learn(lesson, lesson.expert, 0.0, weight=learner.config.retry_weight)
