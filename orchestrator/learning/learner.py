"""What one route has learnt, and what waits for feedback. Knows nothing of HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.learning.bandit import LinUCB, features_of
from orchestrator.learning.config import GUESSED, LEARNT, LearningConfig
from routers.encoders import get_encoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Correction", "Learner", "Lesson", "Lessons", "drawn", "preferred"]

# About 0.5 kB each.
REMEMBERED = 10_000


def drawn(text: str, share: float) -> bool:
    """Whether a draw by a text's hash hits; the same text is always drawn the same.

    Args:
        text: Such as a decision's id, so that nothing of other requests has a say.
        share: Of all texts that shall be hit.
    """
    first = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(first, "big") < share * 2**64


@dataclass(frozen=True, slots=True)
class Correction:
    """What a learner makes of one prediction.

    Attributes:
        quality: Predicted and learnt together, shape (1, n_candidates).
        bonus: Points for being uncertain, shape (1, n_candidates); zeros unless it explores.
        detail: The decision's account of it.
    """

    quality: NDArray[np.float64]
    bonus: NDArray[np.float64]
    detail: dict[str, Any]


@dataclass(slots=True)
class Lesson:
    """What is kept of a decision until somebody says how good the answer was.

    Attributes:
        route: Whose decision it was.
        expert: Who answered; none while nobody has.
        priors: The router's predicted quality of each candidate.
        features: Of the query; none where the route does not learn.
        encoder: Name of the encoder that features are from.
        experiment: The experiment it belongs to, if one.
        arm: Its arm there.
    """

    route: str
    expert: str | None = None
    priors: Mapping[str, float] = field(default_factory=dict)
    features: NDArray[np.float16] | None = None
    experiment: str | None = None
    arm: Literal["a", "b"] | None = None
    encoder: str | None = None

    def to_json(self) -> str:
        """The lesson for a store."""
        features = None if self.features is None else self.features.astype("<f2").tobytes()
        return json.dumps(
            {
                "route": self.route,
                "expert": self.expert,
                "priors": dict(self.priors),
                "features": None if features is None else base64.b64encode(features).decode(),
                "experiment": self.experiment,
                "arm": self.arm,
                "encoder": self.encoder,
            }
        )

    @classmethod
    def of_json(cls, text: str) -> Lesson:
        """The lesson that ``to_json`` wrote."""
        import numpy as np

        found = json.loads(text)
        if found["features"] is not None:
            found["features"] = np.frombuffer(base64.b64decode(found["features"]), "<f2")
        return cls(**found)


class Lessons:
    """Lessons by decision id; the oldest are forgotten first."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self._size = size
        self._kept: OrderedDict[str, Lesson] = OrderedDict()

    def add(self, decision_id: str, lesson: Lesson) -> None:
        """Keep a lesson."""
        self._kept[decision_id] = lesson
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def get(self, decision_id: str) -> Lesson | None:
        """A lesson that is kept."""
        return self._kept.get(decision_id)

    def take(self, decision_id: str) -> Lesson | None:
        """A lesson that is kept, and is no longer: nobody teaches the same twice."""
        return self._kept.pop(decision_id, None)


class Learner:
    """Corrects a route's predictions by what feedback taught. Owned by the event loop.

    A decision may depend on what was learnt from earlier answers, which is the point; never on what
    other requests contain that are in work at the same time. Whether a request explores depends on
    its own id alone.

    Args:
        config: The route's.
        experts: The route's.
        guessed: Whether predictions are numbers that somebody wrote down.
    """

    def __init__(
        self, config: LearningConfig, experts: Sequence[str], *, guessed: bool = False
    ) -> None:
        self.config = config
        self._encoder = get_encoder(config.encoder)
        self.bandit = LinUCB(
            experts,
            min(config.dimensions, self._encoder.width) + 1,
            forgetting=config.forgetting,
            penalty=config.penalty or (GUESSED if guessed else LEARNT),
        )

    def features(self, text: str) -> NDArray[np.float16]:
        """What is known of a query. Takes as long as encoding does; safe for threads."""
        return features_of(self._encoder.encode([text])[0], self.config.dimensions)

    def correct(
        self,
        decision_id: str,
        features: NDArray[np.float16],
        quality: NDArray[np.floating],
        candidates: Sequence[str],
        usd: NDArray[np.float64],
    ) -> Correction:
        """Correct a prediction.

        Args:
            decision_id: Decides whether it explores.
            features: Of the query.
            quality: Predicted, shape (1, n_candidates).
            candidates: Their names.
            usd: What their answers are expected to cost, same shape.
        """
        import numpy as np

        config = self.config
        found = self.bandit.adjust(features, quality[0], candidates)
        explores = drawn(f"explore:{decision_id}", config.exploration_share)
        bonus = np.zeros_like(found.quality)
        if explores:
            ceiling = config.exploration_max_cost_usd
            bonus = config.alpha * found.uncertainty
            bonus[usd[0] > (np.inf if ceiling is None else ceiling)] = 0.0
        return Correction(
            found.quality[None],
            bonus[None],
            {
                "explores": explores,
                "observations": self.bandit.observations,
                "predicted": _by_name(candidates, quality[0]),
                "uncertainty": _by_name(candidates, found.uncertainty),
            },
        )

    def learn(
        self, lesson: Lesson, expert: str | None, reward: float, *, weight: float = 1.0
    ) -> bool:
        """Learn how good an expert's answer was; whether anything was learnt."""
        if weight == 0 or not self.knows(lesson, expert):
            return False
        assert expert is not None
        assert lesson.features is not None
        prior = lesson.priors[expert]
        # Other replicas may have taken up a release with it already.
        self.bandit.include([expert])
        self.bandit.update(lesson.features, expert, reward, prior, weight=weight)
        return True

    def knows(self, lesson: Lesson, expert: str | None) -> bool:
        """Whether it can learn from an answer: its config may have been another one at the time."""
        return (
            lesson.features is not None
            and lesson.encoder == self.config.encoder
            and len(lesson.features) == self.bandit.n_features
            and expert in lesson.priors
        )

    def expected(self, lesson: Lesson) -> float:
        """The quality it now expects of the answer."""
        assert lesson.features is not None
        assert lesson.expert is not None
        import numpy as np

        self.bandit.include([lesson.expert])
        prior = np.array([lesson.priors[lesson.expert]])
        return float(self.bandit.adjust(lesson.features, prior, [lesson.expert]).quality[0])


def preferred(better: float, worse: float) -> tuple[float, float]:
    """Rewards of two answers of which one was preferred.

    Where the chance to be preferred is a half plus half the difference of qualities, rewards half
    a point above and below the middle differ by just as much in expectation as the qualities do.
    The middle stays where it was believed to be: preferences say nothing of the level.

    Args:
        better: Expected quality of the preferred answer.
        worse: Expected quality of the other.
    """
    middle = (better + worse) / 2
    return middle + 0.5, middle - 0.5


def _by_name(names: Sequence[str], values: NDArray[np.floating]) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}
