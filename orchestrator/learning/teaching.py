"""Feedback reaches every replica's learners once, and again after a restart."""

from __future__ import annotations

import asyncio
import json
import logging
import time

from orchestrator.errors import MemoryUnavailableError
from orchestrator.learning.feedback import Learning
from orchestrator.learning.learner import Lesson
from orchestrator.memory.decisions import DecisionRecord
from orchestrator.memory.feedback import Feedback
from orchestrator.memory.guard import Memory

__all__ = ["Teaching"]

logger = logging.getLogger("collegium.learning")

FEATURE = "learning"
# An answer is rated within a day, or nothing is learnt from it.
LESSON_TTL_S = 86_400.0
# Seconds between two looks for what other replicas were told.
LOOK_S = 2.0
AT_ONCE = 500


class Teaching:
    """Writes down what there is to learn, and has everything learnt in the order of that log.

    A lesson waits in the store until its answer is rated, so any replica may be told. What was said
    goes into a log with its lessons; every replica, and each one that starts, learns from the log
    alone. Signs that nobody gave on purpose, such as failures, stay with the replica that saw them.

    Args:
        memory: Where lessons and the log are kept.
        learning: Who learns.
    """

    def __init__(self, memory: Memory, learning: Learning) -> None:
        self._memory = memory
        self._learning = learning
        self._seen: str | None = None
        self._looked = float("-inf")
        self._reading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        learning.on_lesson = self._keep

    def look(self) -> None:
        """Begin to read what is new, where it is time to; returns at once."""
        now = time.monotonic()
        if not self._learning.learns or now - self._looked < LOOK_S:
            return
        self._looked = now
        task = asyncio.ensure_future(self.read())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def told(self, decision: DecisionRecord, feedback: Feedback) -> None:
        """Take in feedback: if there is a lesson in it, all replicas learn it, once.

        Raises:
            MemoryUnavailableError: The store does not answer; said again, it may be learnt.
        """
        if not self._learning.learns:
            return
        ids = [i for i in (feedback.decision_id, feedback.preferred_over) if i is not None]
        lessons = [await self._lesson(i) for i in ids]
        if not all(lessons):
            return
        said = {
            "rating": feedback.rating,
            "lessons": [
                [i, found.to_json()] for i, found in zip(ids, lessons, strict=True) if found
            ],
        }
        content = json.dumps(said).encode()
        store = self._memory.store
        await self._memory.required(FEATURE, store.append(FEATURE, feedback.id, content))
        await self.read()

    def _keep(self, decision_id: str, lesson: Lesson) -> None:
        content = lesson.to_json().encode()
        key, store = f"lesson:{decision_id}", self._memory.store
        self._memory.later(FEATURE, lambda: store.put(key, content, ttl_s=LESSON_TTL_S))

    async def _lesson(self, decision_id: str) -> Lesson | None:
        if found := self._learning.lessons.get(decision_id):
            return found
        store = self._memory.store
        kept = await self._memory.required(FEATURE, store.get(f"lesson:{decision_id}"))
        return Lesson.of_json(kept.decode()) if kept else None

    async def read(self) -> None:
        """Learn what is new, as far as the store answers."""
        async with self._reading:
            try:
                while True:
                    found = await self._memory.required(
                        FEATURE,
                        self._memory.store.scan(FEATURE, after=self._seen, limit=AT_ONCE),
                    )
                    for id, content in found:
                        self._seen = id
                        try:
                            self._learn(content)
                        except Exception:
                            # One record of another version must not end all learning.
                            logger.exception("nothing is learnt from feedback %s", id)
                    if len(found) < AT_ONCE:
                        return
            except MemoryUnavailableError:
                return  # counted and logged; the next look goes on from here

    def _learn(self, content: bytes) -> None:
        said = json.loads(content)
        ids = []
        for decision_id, text in said["lessons"]:
            self._learning.lessons.add(decision_id, Lesson.of_json(text))
            ids.append(decision_id)
        if said["rating"] is not None:
            self._learning.learn(ids[0], said["rating"])
        else:
            self._learning.learn_preference(*ids)
