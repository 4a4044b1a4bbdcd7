"""Two routes under one name, told apart by the client, compared by ratings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.learning.config import ExperimentConfig
from orchestrator.learning.learner import drawn
from orchestrator.learning.sequential import Arm, compare
from orchestrator.learning.tally import Tally

__all__ = ["ArmName", "Experiment"]

ArmName = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment and what it has seen. Owned by the event loop.

    Attributes:
        name: What users put in ``model``.
        requests: How many each arm has had, by all replicas.
        ratings: What was said of each arm's answers.
    """

    name: str
    config: ExperimentConfig
    requests: Tally
    ratings: dict[ArmName, Arm] = field(default_factory=lambda: {"a": Arm(), "b": Arm()})

    def arm_of(self, client: str | None, session: str | None, decision_id: str) -> ArmName:
        """The arm of a request: always the same for the same client.

        Args:
            client: Hash of its API key, if there is one.
            session: Its session id, if it has one.
            decision_id: Of the request.
        """
        units = {"key": client, "session": session, "request": decision_id}
        known = list(units.values())[list(units).index(self.config.by) :]
        unit = next(one for one in known if one is not None)
        return "b" if drawn(f"{self.name}:{unit}", self.config.share_b) else "a"

    def route(self, arm: ArmName) -> str:
        """The route of an arm."""
        return self.config.a if arm == "a" else self.config.b

    async def results(self) -> dict[str, Any]:
        """Counts, means, and what they say by now."""
        error, requests = self.config.error, await self.requests.read()
        found = compare(self.ratings["a"], self.ratings["b"], error=error)
        return {
            "name": self.name,
            "kind": "split",
            "arms": [
                {
                    "name": arm,
                    "route": self.route(arm),
                    "requests": requests[arm],
                    "outcomes": self.ratings[arm].n,
                    "mean": self.ratings[arm].mean,
                }
                for arm in self.ratings
            ],
            "difference": found.difference,
            "low": found.low,
            "high": found.high,
            "error": error,
            "verdict": found.verdict,
        }
