from __future__ import annotations

import asyncio
import json
import re

import pytest
from pydantic import ValidationError

from experts.errors import ExpertFailedError, ExpertTimeoutError, InvalidRequestError
from orchestrator.config import parse_config
from orchestrator.core import Orchestrator
from orchestrator.errors import EmptyPoolError
from orchestrator.options import RoutingOptions
from orchestrator.strategies.chain import ChainStrategy
from routers.base import Explanation, Prediction
from tests.orchestrator.composing import CITY, TOOL, Run, battery, scripted
from tests.orchestrator.support import (
    CHAT,
    build,
    chat_body,
    client,
    config_content,
    eventually,
    expert,
)

DRAFT = r"\[draft [0-9a-f]+\]"
CALL = {"tool_call": {"name": "weather", "arguments": {"city": "Graz"}}}


def chain(**fields):
    return ChainStrategy.model_validate({"type": "chain", **fields})


def improver(name, **rule):
    """An expert with a first answer and a better one."""
    return scripted(
        name,
        {"match": DRAFT, "answer": f"better by {name}", **rule},
        {"answer": f"draft by {name}"},
    )


def rerouted(run, *names):
    """Have the run's further steps go to these experts in turn; returns what was routed."""
    asked, left = [], list(names)

    async def reroute(request):
        asked.append(request.messages[-1].text)
        name = left.pop(0)
        if isinstance(name, Exception):
            raise name
        return type(run.decision)(experts=(name, "nobody"))

    run.context.reroute = reroute
    return asked


async def path_is_known_with_first_chunk(strategy):
    # The first expert is asked twice, for the draft and for a better one.
    run = Run(strategy, [scripted("first", {"answer": "a b c"}), scripted("second")])
    await anext(run.chunks)
    path = list(run.context.path)
    await run.answer()
    assert run.context.path == path == ["first", "first"]


async def nothing_follows_a_late_error(strategy):
    # An error of an earlier step is followed by the next expert: nothing has left by then.
    breaks = improver("first", error="failed", error_after_chunks=1)
    run = Run(strategy, [breaks, scripted("second")])
    assert (await anext(run.chunks)).text == "better"
    assert isinstance(await run.error(), ExpertFailedError)
    assert run.context.path == ["first", "first"]


async def closing_frees_the_expert(strategy):
    # A draft is read to its end before the last step begins.
    first = improver("first", chunk_delay_s=30)
    run = Run(strategy, [first])
    await anext(run.chunks)
    assert first.active == 1
    await run.chunks.aclose()
    assert first.active == 0


CHECKS = battery(
    check_path_is_known_with_first_chunk=path_is_known_with_first_chunk,
    check_nothing_follows_an_error_after_the_first_chunk=nothing_follows_a_late_error,
    check_closing_frees_the_expert=closing_frees_the_expert,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_chain_passes_the_battery(check):
    await check(chain())


@pytest.mark.parametrize("stream", [True, False])
async def test_each_step_is_routed_on_what_is_there_so_far(stream):
    experts = [improver(name) for name in "abc"]
    run = Run(chain(depth=3), experts, stream=stream)
    asked = rerouted(run, "b", "c")
    answer = await run.answer()
    assert answer.text == "better by c"
    assert run.context.expert == "c"
    assert (run.calls("draft"), run.calls("answer")) == (["a", "b"], ["c"])
    assert asked == ["hello\n\ndraft by a", "hello\n\nbetter by b"]
    assert re.search(DRAFT + r"\nbetter by b\n\[end of draft", run.last_prompt("c"))
    assert answer.usage == run.context.usage


async def test_a_chain_ends_when_nothing_changes():
    same = scripted("a", {"answer": "perfect "})
    run = Run(chain(depth=5), [same, scripted("b", {"answer": " perfect"})])
    rerouted(run, "b", "a", "a", "a")
    assert (await run.answer()).text == "perfect "
    assert run.context.path == ["a", "b"]
    assert run.context.expert == "a"


@pytest.mark.parametrize("depth", [2, 3])
async def test_an_empty_step_leaves_the_draft(depth):
    run = Run(chain(depth=depth), [improver("a"), scripted("b", {"answer": ""})])
    rerouted(run, "b", "a")
    assert (await run.answer()).text == "draft by a"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("fault", [{"error": "failed"}, {"error": "invalid"}, {"delay_s": 30}])
async def test_a_step_that_fails_leaves_the_draft(stream, depth, fault):
    experts = [improver("a"), scripted("b", fault)]
    run = Run(chain(depth=depth), experts, stream=stream, timeout_s=0.3)
    rerouted(run, "b", "b")
    answer = await run.answer()
    assert answer.text == "draft by a"
    assert run.context.expert == "a"
    assert answer.usage == run.context.usage
    assert run.active == 0


async def test_a_plain_last_step_may_break_up_to_its_end():
    breaks = improver("a", error="failed", error_after_chunks=2)
    assert (await Run(chain(), [breaks], stream=False).answer()).text == "draft by a"


async def test_the_first_step_falls_back():
    run = Run(chain(), [scripted("a", {"error": "failed"}), improver("b"), improver("c")])
    assert (await run.answer()).text == "better by b"
    assert run.context.path == ["a", "b", "b"]
    run = Run(chain(), [scripted(name, {"error": "failed"}) for name in "abcd"])
    assert isinstance(await run.error(), ExpertFailedError)
    assert run.context.path == ["a", "b", "c"]


async def test_a_wrong_request_is_refused_at_once():
    run = Run(chain(), [scripted("a", {"error": "invalid"}), scripted("b")])
    assert isinstance(await run.error(), InvalidRequestError)
    assert run.context.path == ["a"]


async def test_a_router_that_fails_leaves_the_step_with_its_expert():
    run = Run(chain(), [improver("a"), improver("b")])
    rerouted(run, EmptyPoolError("auto", {}))
    assert (await run.answer()).text == "better by a"


async def test_steps_keep_to_the_money():
    # 256 tokens of an answer cost 0.000256 US dollars.
    experts = [scripted("a", {"answer": "draft"}, output_usd_per_mtok=1.0),
               scripted("b", {"answer": "better"}, output_usd_per_mtok=9.0)]  # fmt: skip
    run = Run(chain(), experts, max_cost=0.001)
    rerouted(run, "b")
    assert (await run.answer()).text == "draft"
    assert not run.experts["b"].requests


async def test_a_tool_call_ends_the_chain_and_is_its_experts():
    run = Run(chain(depth=4), [scripted("a", CALL), scripted("b", CALL)], tools=[TOOL])
    answer = await run.answer()
    assert [call["function"]["name"] for call in answer.choices[0].tool_calls] == ["weather"]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert run.context.path == ["a"]


async def test_every_step_keeps_to_the_form():
    garbage = scripted("b", {"answer": "no JSON"})
    run = Run(chain(), [scripted("a", {"answer": '{"city": "Graz"}'}), garbage],
              response_format=CITY, stream=False)  # fmt: skip
    rerouted(run, "b")
    assert json.loads((await run.answer()).text) == {"city": "Graz"}


async def test_comments_come_while_a_step_takes_long():
    slow = scripted("a", {"match": DRAFT, "answer": "better", "delay_s": 0.15},
                    {"answer": "draft", "delay_s": 0.15})  # fmt: skip
    pieces = await Run(chain(progress_s=0.03), [slow]).pieces()
    comments = [piece.progress for piece in pieces if piece.progress]
    assert comments.count("step 1 of 2") >= 3
    assert comments.count("step 2 of 2") >= 3


@pytest.mark.parametrize("fields", [{"n": 2}, {"prompt": "go on"}])
async def test_what_has_no_draft_is_answered_by_one(fields):
    run = Run(chain(), [scripted("a", {"error": "failed"}), scripted("b")], **fields)
    assert (await run.answer()).text == "b"
    assert run.context.path == ["a", "b"]


async def test_a_deadline_without_a_draft_is_an_error():
    run = Run(chain(), [scripted(name, {"delay_s": 30}) for name in "ab"], timeout_s=0.1)
    assert isinstance(await run.error(), ExpertTimeoutError)
    assert run.context.path == ["a"]


async def test_a_client_that_leaves_frees_the_step():
    run = Run(chain(depth=3), [improver("a", delay_s=30)])
    task = asyncio.ensure_future(run.answer())
    await eventually(lambda: len(run.calls("draft")) == 2 and run.active == 1)
    task.cancel()
    await asyncio.wait({task})
    assert run.active == 0


@pytest.mark.parametrize("depth", [0, 1, 9])
def test_wrong_depths_are_refused(depth):
    with pytest.raises(ValidationError, match="depth"):
        chain(depth=depth)


class Draftsman:
    """A router that prefers the small expert until there is a draft."""

    method = "draftsman"

    @property
    def models(self) -> list[str]:
        return ["small", "medium", "large"]

    def predict(self, queries, candidates):
        import numpy as np

        best = "medium" if "small says" in queries[0].text else "small"
        row = [0.9 if name == best else 0.5 for name in candidates]
        return Prediction(np.array([row], np.float32), [Explanation()])


ROUTES = {"chain": {"router": "table", "strategy": {"type": "chain", "depth": 3}}}


async def test_the_orchestrator_routes_each_step_by_the_requests_own_route_and_options():
    orchestrator = build(parse_config(config_content(routes=ROUTES)))
    orchestrator = Orchestrator(orchestrator.config, orchestrator.experts, {"table": Draftsman()})
    response = await client(orchestrator).post(CHAT, json=chat_body(model="chain"))
    assert response.headers["x-collegium-path"] == "small>medium>small"
    assert response.json()["model"] == "small"
    assert float(response.headers["x-collegium-cost"]) > 0
    body = chat_body(model="chain", allowed_models=["small", "large"])
    assert (await client(orchestrator).post(CHAT, json=body)).status_code == 200
    assert len(expert(orchestrator, "medium").requests) == 1


async def test_a_further_decision_has_the_same_knob_and_candidates():
    orchestrator = build(parse_config(config_content(routes=ROUTES)))
    run = Run(chain(), [])
    options = RoutingOptions(route="chain", cost_quality=0.0, allowed_models=["*a*"])
    decision = await orchestrator.decide(run.request, options=options)
    chunks = orchestrator.run(run.request, decision, run.context)
    assert run.context.reroute is not None
    further = await run.context.reroute(run.request)
    assert (further.experts, further.cost_quality) == (decision.experts, 0.0)
    assert set(further.experts) == {"small", "large"}
    await chunks.aclose()


async def test_an_expert_asked_by_name_is_not_routed_again():
    orchestrator = build(parse_config(config_content()))
    run = Run(chain(), [])
    request = run.request.model_copy(update={"model": "large"})
    chunks = orchestrator.run(request, await orchestrator.decide(request), run.context)
    assert run.context.reroute is None
    await chunks.aclose()
