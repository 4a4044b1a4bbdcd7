"""A base model mixes its adapters: which, how much of each, and when it answers alone."""

from __future__ import annotations

from typing import Any

import pytest

from experts.types import ChatRequest, Mixture
from orchestrator.config import ConfigError, parse_config
from orchestrator.decision import Candidate, Decision
from orchestrator.memory.decisions import DecisionRecord
from orchestrator.strategies.mix import MixStrategy
from tests.orchestrator.composing import Run, scripted
from tests.orchestrator.support import CHAT, build, chat_body, client, config_content, expert

ADAPTERS, MERGING = "x-collegium-adapters", "x-collegium-merging"


def run_of(*names: str, width: int | None = None, **settings: Any) -> Run:
    """A run with experts that are predicted to be right with .9, .8 and so on."""
    strategy = MixStrategy(type="mix", base="base", **settings)
    experts = [scripted(name) for name in names]
    outside = [] if "base" in names else [scripted("base")]
    return Run(strategy, experts, outside=outside, width=width)


async def fields_of(run: Run) -> dict[str, Any]:
    """What the base was asked beyond the question; nobody else is asked."""
    assert (await run.answer()).text == "base"
    assert run.context.path == ["base"]
    (request,) = run.chats("base")
    assert request.model_extra is not None
    return request.model_extra


async def test_shares_are_those_of_the_log_odds_of_the_best():
    run = run_of("a", "b", "c", "d")
    # Odds of 9, 4 and 7/3, of 46/3 together.
    fields = await fields_of(run)
    assert fields["adapters"] == pytest.approx({"a": 0.587, "b": 0.261, "c": 0.152})
    assert fields["adapter_merging"] == "outputs"
    assert run.context.mixture == Mixture(fields["adapters"], "outputs")


async def test_shares_may_be_equal_and_parameters_merged():
    run = run_of("a", "b", "c", weights="uniform", merging="parameters", top_k=2)
    assert await fields_of(run) == {
        "adapters": {"a": 0.5, "b": 0.5},
        "adapter_merging": "parameters",
    }


async def test_the_request_says_how_many():
    assert [*(await fields_of(run_of("a", "b", "c", width=1)))["adapters"]] == ["a"]


async def test_small_shares_are_left_out():
    shares = (await fields_of(run_of("a", "b", "c", min_share=0.2)))["adapters"]
    assert shares == pytest.approx({"a": 0.692, "b": 0.308})
    assert (await fields_of(run_of("a", "b", min_share=0.99)))["adapters"] == {"a": 1.0}


def decided(**qualities: float) -> Decision:
    """A decision with these predicted qualities."""
    candidates = tuple(Candidate(name, quality=quality) for name, quality in qualities.items())
    return Decision(experts=tuple(qualities), candidates=candidates)


def test_nearly_equal_predictions_give_the_same_shares():
    """So that of merged parameters the same adapter comes out, which memory has."""
    strategy = MixStrategy(type="mix", base="base", merging="parameters", min_share=0)
    shares = strategy.shares(decided(a=0.9, b=0.8, c=0.7))
    assert strategy.shares(decided(a=0.90002, b=0.79998, c=0.70001)) == shares
    assert strategy.shares(decided(a=0.91, b=0.8, c=0.7)) != shares
    assert sum(shares.values()) == pytest.approx(1)
    # Odds of 9, 1 and 1/4999: the last has nothing left after rounding.
    assert strategy.shares(decided(a=0.9, b=0.5, c=0.0002)) == {"a": 0.9, "b": 0.1}
    thirds = strategy.shares(decided(a=0.5, b=0.5, c=0.5))
    assert thirds == pytest.approx(dict.fromkeys("abc", 1 / 3))


async def test_the_base_answers_alone_where_it_is_best_and_is_no_adapter_elsewhere():
    assert (await fields_of(run_of("base", "a", "b")))["adapters"] == {}
    assert [*(await fields_of(run_of("a", "base", "b")))["adapters"]] == ["a", "b"]


async def test_a_token_router_may_share_out_what_is_not_the_bases():
    for names, asked in ((("a", "base"), "arrow"), (("base", "a"), "base")):
        strategy = MixStrategy(type="mix", base="base", token_router="arrow")
        outside = [scripted(name) for name in ("arrow", "base") if name not in names]
        run = Run(strategy, [scripted(name) for name in names], outside=outside)
        assert (await run.answer()).text == asked
        assert run.context.path == [asked]
        expected = Mixture({}, "outputs") if asked == "base" else None
        assert run.context.mixture == expected


async def test_text_completions_are_mixed_too():
    strategy = MixStrategy(type="mix", base="base")
    run = Run(strategy, [scripted("a")], outside=[scripted("base")], prompt="hello")
    await run.answer()
    (request,) = run.experts["base"].requests
    assert request.model_extra == {"adapters": {"a": 1.0}, "adapter_merging": "outputs"}


def content_of() -> dict[str, Any]:
    """Scripted experts stand in: small is the base, medium and large its adapters."""
    strategy = {"type": "mix", "base": "small"}
    return config_content(routes={"auto": {"router": "table", "strategy": strategy}})


@pytest.mark.parametrize("stream", [True, False])
async def test_headers_and_the_record_name_the_adapters(stream: bool):
    orchestrator = build(parse_config(content_of()))
    http = client(orchestrator)
    response = await http.post(CHAT, json=chat_body(stream=stream))
    assert response.headers[ADAPTERS] == "large=0.7940,medium=0.2060"
    assert response.headers[MERGING] == "outputs"
    assert response.headers["x-collegium-model"] == "small"
    assert response.headers["x-collegium-strategy"] == "mix"
    (request,) = expert(orchestrator, "small").requests
    assert isinstance(request, ChatRequest)
    id = response.headers["x-collegium-decision-id"]
    found = await http.get(f"/v1/decisions/{id}")
    record = DecisionRecord.model_validate_json(found.content)
    assert record.adapters == pytest.approx({"large": 0.794, "medium": 0.206})
    assert record.merging == "outputs"
    assert record.peers is None


@pytest.mark.parametrize("stream", [True, False])
async def test_headers_and_the_record_name_what_a_request_mixes_itself(stream: bool):
    http = client(build(parse_config(content_of())))

    async def ask(**fields: Any) -> Any:
        return await http.post(CHAT, json=chat_body(model="small", stream=stream, **fields))

    mixed = await ask(adapters={"large": 0.75, "medium": -1}, adapter_merging="parameters")
    assert mixed.headers[ADAPTERS] == "large=0.7500,medium=-1.0000"
    assert mixed.headers[MERGING] == "parameters"
    found = await http.get(f"/v1/decisions/{mixed.headers['x-collegium-decision-id']}")
    assert found.json()["adapters"] == {"large": 0.75, "medium": -1.0}
    assert found.json()["merging"] == "parameters"
    assert (await ask(adapters={"large": 1})).headers[MERGING] == "outputs"
    assert (await ask(adapters={})).headers[ADAPTERS] == "none"
    plain = await ask()
    assert plain.status_code == 200
    assert not {ADAPTERS, MERGING} & plain.headers.keys()
    for fields in ({"adapters": ["large"]}, {"adapters": {"large": 9}}, {"adapters": {"large": ""}},
                   {"adapters": {}, "adapter_merging": "sum"}):  # fmt: skip
        refused = await ask(**fields)
        assert (refused.status_code, ADAPTERS in refused.headers) == (400, False)


TRANSFORMERS = {
    "name": "smol", "engine": "transformers", "model": "m",
    "adapters": [{"name": "maths", "path": "p"}],
    "token_routers": [{"name": "arrow", "method": "arrow"}],
}  # fmt: skip


def test_only_a_base_and_its_adapters_can_be_mixed():
    content = content_of()
    content["experts"].append(TRANSFORMERS)
    route = content["routes"]["auto"]
    route["strategy"]["base"] = "smol"
    content["routers"]["table"]["quality"] |= {"maths": 0.5, "smol": 0.4, "arrow": 0.3}
    route["experts"] = ["maths", "smol"]
    parse_config(content)
    route["experts"] = ["maths", "arrow"]
    with pytest.raises(ConfigError, match="to be its adapters, which 'arrow' are not"):
        parse_config(content)
    route["experts"] = ["maths"]
    route["strategy"]["token_router"] = "arrow"
    parse_config(content)
    route["strategy"]["token_router"] = "maths"
    with pytest.raises(ConfigError, match="'maths', which is no token router of 'smol'; it has 'a"):
        parse_config(content)
    del route["strategy"]["token_router"]
    route["strategy"]["base"] = "maths"
    with pytest.raises(ConfigError, match="needs 'maths' to be a model"):
        parse_config(content)
    route["strategy"]["base"] = "nobody"
    with pytest.raises(ConfigError, match="names the unknown expert 'nobody'"):
        parse_config(content)
