"""Finds earlier questions that ask the same in other words."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from orchestrator.memory.guard import Memory
from orchestrator.memory.questions import difference
from orchestrator.strict import StrictModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Question", "QuestionIndex", "SemanticConfig"]

FEATURE = "semantic_cache"

# Nearest questions that are held against the rules.
CANDIDATES = 8

# Questions in memory, of all scopes together: 50,000 vectors of 384 float32 are 77 MB.
MAX_QUESTIONS = 50_000

SCANNED_AT_ONCE = 500


class SemanticConfig(StrictModel):
    """When a question asks the same as an earlier one."""

    threshold: float = Field(default=0.84, ge=0, le=1)
    """Least cosine of the questions' vectors. The default is calibrated for the default encoder,
    see ``docs/results/semantic_cache.md``."""
    max_questions: int = Field(default=10_000, ge=1, le=MAX_QUESTIONS)
    """Questions of one API key that are compared with, the newest ones."""


@dataclass(slots=True)
class Question:
    """A question as it is compared.

    Attributes:
        text: The last user turn.
        scope: Whose it is.
        frame: Hash of everything else in the request, which must be the same.
        vector: Of the text, shape (width,), length 1.
    """

    text: str
    scope: str
    frame: str
    vector: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Record:
    text: str
    frame: str
    key: str
    until: float


class _Scope:
    """The questions of one scope, newest last, with their vectors."""

    def __init__(self, width: int, most: int) -> None:
        import numpy as np

        self.last: str | None = None
        self.reading = asyncio.Lock()
        self.records: list[_Record] = []
        self._vectors = np.empty((0, width), np.float32)
        self._most = most

    def extend(self, found: list[tuple[_Record, NDArray[np.float32]]]) -> None:
        """Take questions in; the oldest ones go."""
        import numpy as np

        if not found:
            return
        now = time.time()
        if len(self.records) + len(found) > len(self._vectors):
            kept = [i for i, record in enumerate(self.records) if record.until > now][-self._most :]
            self.records = [self.records[i] for i in kept]
            # Room for some more, so that few questions are copied often.
            size = len(kept) + len(found) + min(len(kept), self._most // 4) + 64
            room = np.empty((size, self._vectors.shape[1]), np.float32)
            room[: len(kept)] = self._vectors[kept]
            self._vectors = room
        for record, vector in found:
            self._vectors[len(self.records)] = vector
            self.records.append(record)

    def nearest(self, question: Question, threshold: float) -> list[_Record]:
        """Some of the closest questions in the same frame, closest first."""
        import numpy as np

        now = time.time()
        oldest = max(0, len(self.records) - self._most)
        cosines = self._vectors[: len(self.records)] @ question.vector
        near = [
            place
            for place in np.flatnonzero(cosines[oldest:] >= threshold) + oldest
            if self.records[place].frame == question.frame and self.records[place].until > now
        ]
        near.sort(key=lambda place: -cosines[place])
        return [self.records[place] for place in near[:CANDIDATES]]


class QuestionIndex:
    """Questions of every scope: vectors in memory, beside a log in the store.

    The log is what survives and what replicas share: each reads what others appended since it
    looked last. Vectors are made, kept and searched in one thread.

    Args:
        config: When a question asks the same as an earlier one.
        memory: Where the log is.

    Raises:
        RouterError: The encoder cannot be used.
    """

    def __init__(self, config: SemanticConfig, memory: Memory) -> None:
        from routers.encoders import get_encoder

        self._config = config
        self._memory = memory
        self._encoder = get_encoder()
        # A missing model shows now, and loading it does not delay a request.
        self._encoder.encode(["warm-up"])
        self._scopes: OrderedDict[str, _Scope] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="semantic")

    async def question(self, text: str, scope: str, frame: str) -> Question:
        """A question with its vector.

        Args:
            text: The last user turn.
            scope: Whose it is.
            frame: Hash of everything else in the request.
        """
        loop = asyncio.get_running_loop()
        (vector,) = await loop.run_in_executor(self._thread, self._encoder.encode, [text])
        return Question(text, scope, frame, vector)

    async def alike(self, question: Question) -> list[str]:
        """Keys of answers to questions that ask the same, closest first."""
        await self._read_on(question.scope)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._alike, question)

    def keep(self, question: Question, key: str, ttl_s: float) -> None:
        """Have later questions compared with this one.

        Args:
            question: The question.
            key: Of its answer.
            ttl_s: Seconds for which the answer is kept.
        """
        until = time.time() + ttl_s
        record = {
            "text": question.text,
            "frame": question.frame,
            "key": key,
            "until": until,
            "encoder": self._encoder.revision,
            "vector": base64.b64encode(question.vector.astype("<f2").tobytes()).decode(),
        }
        content = json.dumps(record).encode()
        # The same question may come again when its answer is forgotten.
        id = f"{key}@{until:.0f}"
        log = _log(question.scope)
        self._memory.later(FEATURE, lambda: self._memory.store.append(log, id, content))

    def close(self) -> None:
        """Free the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _read_on(self, name: str) -> None:
        """Take in what was appended to a scope's log since the last time.

        After a restart, the first requests take in a part each, so that none waits for all.
        """
        scope = self._scopes.get(name)
        if scope is None:
            scope = _Scope(self._encoder.width, self._config.max_questions)
            self._scopes[name] = scope
        self._scopes.move_to_end(name)
        if scope.reading.locked():
            return  # with what is there: waiting for others' reading has no bound
        async with scope.reading:
            await self._read(name, scope)
        while len(self._scopes) > 1 and self._size > MAX_QUESTIONS:
            self._scopes.popitem(last=False)

    async def _read(self, name: str, scope: _Scope) -> None:
        after = scope.last
        scan = self._memory.store.scan(_log(name), after=after, limit=SCANNED_AT_ONCE)
        nothing: list[tuple[str, bytes]] = []
        records = await self._memory.guarded(FEATURE, scan, nothing)
        if records:
            await asyncio.get_running_loop().run_in_executor(
                self._thread, self._take_in, scope, after, records
            )

    @property
    def _size(self) -> int:
        return sum(len(scope.records) for scope in self._scopes.values())

    def _take_in(self, scope: _Scope, after: str | None, records: list[tuple[str, bytes]]) -> None:
        if scope.last != after:
            return  # whoever was cancelled while this ran has left the same records
        found = (self._parsed(content) for _, content in records)
        scope.extend([one for one in found if one is not None])
        # Here, since whoever reads may be cancelled before this begins.
        scope.last = records[-1][0]

    def _parsed(self, content: bytes) -> tuple[_Record, NDArray[np.float32]] | None:
        import numpy as np

        try:
            record = json.loads(content)
            if record["encoder"] != self._encoder.revision:
                return None
            halves = np.frombuffer(base64.b64decode(record["vector"]), "<f2")
            one = _Record(record["text"], record["frame"], record["key"], float(record["until"]))
        except (ValueError, KeyError, TypeError, binascii.Error):
            return None  # of another version
        return (one, halves.astype(np.float32)) if len(halves) == self._encoder.width else None

    def _alike(self, question: Question) -> list[str]:
        scope = self._scopes.get(question.scope)
        near = scope.nearest(question, self._config.threshold) if scope else []
        return [one.key for one in near if difference(question.text, one.text) is None]


def _log(scope: str) -> str:
    return f"{FEATURE}:{scope}"
