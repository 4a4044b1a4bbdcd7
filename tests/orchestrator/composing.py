"""What tests of composing strategies share: a run with more to say than the battery's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from experts.config import ScriptedExpertConfig
from experts.errors import ExpertError
from experts.scripted import ScriptedExpert
from experts.types import ChatRequest, Chunk, Completion, collect
from orchestrator.decision import Candidate, Decision, RequestContext
from orchestrator.errors import CostLimitError
from orchestrator.strategies.base import Strategy
from orchestrator.testing import StrategyCheck, strategy_checks
from tests.orchestrator.support import chat_request, text_request

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CITY = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": {"type": "object", "required": ["city"]}},
}


def battery(**replaced: StrategyCheck) -> list[StrategyCheck]:
    """The checks every strategy must pass, those replaced that cannot hold, by name."""
    checks = {check.__name__: check for check in strategy_checks()}
    assert replaced.keys() <= checks.keys(), "a replacement for a check that there is not"
    return list((checks | replaced).values())


def scripted(name: str, *rules: Mapping[str, Any], **options: Any) -> ScriptedExpert:
    """A scripted expert; without rules it answers with its name."""
    content = {"name": name, "engine": "scripted", "rules": rules or [{"answer": name}], **options}
    return ScriptedExpert(ScriptedExpertConfig.model_validate(content))


class Run:
    """One request to a strategy.

    Args:
        strategy: The strategy to run.
        experts: Whom it may ask, best first; predicted 0.9, 0.8 and so on.
        outside: Experts that are not the decision's.
        stream: Whether the client wants a stream.
        timeout_s: Seconds for the request.
        max_cost: US dollars it may cost.
        width: The decision's.
        prompt: Of a text completion.
        fields: Of the request.
    """

    def __init__(
        self,
        strategy: Strategy,
        experts: Sequence[ScriptedExpert],
        *,
        outside: Sequence[ScriptedExpert] = (),
        stream: bool = True,
        timeout_s: float = 5.0,
        max_cost: float | None = None,
        width: int | None = None,
        prompt: str | None = None,
        **fields: Any,
    ) -> None:
        names = [expert.card.name for expert in experts]
        self.experts = {expert.card.name: expert for expert in [*experts, *outside]}
        self.context = RequestContext(time.monotonic() + timeout_s, max_cost)
        fields = {"stream": stream, **fields}
        self.request = chat_request(**fields) if prompt is None else text_request(prompt, **fields)
        self.decision = Decision(
            experts=tuple(names),
            width=width,
            route="auto",
            strategy=strategy.type,
            candidates=tuple(
                Candidate(name, quality=0.9 - 0.1 * place) for place, name in enumerate(names)
            ),
        )
        self.chunks = strategy.run(self.request, self.decision, self.experts, self.context)

    async def answer(self) -> Completion:
        """The whole answer."""
        return await collect(self.chunks)

    async def pieces(self) -> list[Chunk]:
        """All that comes, comments included."""
        return [chunk async for chunk in self.chunks]

    async def error(self) -> ExpertError | CostLimitError:
        """The error it ends with."""
        try:
            await self.answer()
        except (ExpertError, CostLimitError) as error:
            return error
        raise AssertionError("the strategy ended without an error")

    def calls(self, purpose: str) -> list[str]:
        """Who was asked for what."""
        return [call.expert for call in self.context.calls if call.purpose == purpose]

    def chats(self, name: str) -> list[ChatRequest]:
        """What an expert was asked."""
        return [asked for asked in self.experts[name].requests if isinstance(asked, ChatRequest)]

    def last_prompt(self, name: str) -> str:
        """The last message that an expert got last."""
        return self.chats(name)[-1].messages[-1].text

    @property
    def active(self) -> int:
        """Answers that are being written."""
        return sum(expert.active for expert in self.experts.values())
