from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from experts.config import ScriptedExpertConfig
from experts.errors import ExpertFailedError, InvalidRequestError
from experts.scripted import ScriptedExpert
from experts.types import (
    ChatRequest,
    Choice,
    Chunk,
    Completion,
    CompletionRequest,
    Usage,
    collect,
)
from orchestrator.config import ConfigError, parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.decision import Candidate, Decision, RequestContext
from orchestrator.errors import CostLimitError
from orchestrator.options import RoutingOptions
from orchestrator.policies import BudgetPolicy
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.cascade import CascadeStrategy, Walk
from orchestrator.strategies.confidence import (
    Calibration,
    mean_margin,
    mean_probability,
    unusable,
    without_signal,
)
from orchestrator.strategies.single import SingleStrategy
from orchestrator.strategies.supermodels import Beliefs, best_supermodel
from orchestrator.testing import StrategyCheck, StrategyRun, scripted, strategy_checks
from tests.orchestrator.support import chat_request, config_content

# What scripted experts' words have: exp(-0.25).
SCRIPTED_PROBABILITY = math.exp(-0.25)


def calibrated(**chances: float) -> dict[str, Calibration]:
    """Calibrations that take every answer of an expert for right with the same chance."""
    return {
        name: Calibration(points=((0.5, chance),), information=0.5)
        for name, chance in chances.items()
    }


def cascade(**fields: Any) -> CascadeStrategy:
    return CascadeStrategy.model_validate(fields)


def unsure(**fields: Any) -> CascadeStrategy:
    """Doubts its first answer and trusts the second."""
    return cascade(calibrations=calibrated(first=0.1, second=0.95), **fields)


def expert(name: str, *rules: dict[str, Any], **card: Any) -> ScriptedExpert:
    """A scripted expert; its answer is its name unless a rule says otherwise."""
    content = {"name": name, "engine": "scripted", "rules": [*rules, {"answer": name}], **card}
    return ScriptedExpert(ScriptedExpertConfig.model_validate(content))


class Run:
    """One request to a cascade, with predicted qualities and charges."""

    def __init__(
        self,
        strategy: CascadeStrategy,
        experts: Sequence[ScriptedExpert],
        *,
        quality: Sequence[float],
        charges: Sequence[float] | None = None,
        timeout_s: float = 5.0,
        max_cost_usd: float | None = None,
        width: int | None = None,
        **request: Any,
    ) -> None:
        self.experts = {one.card.name: one for one in experts}
        self.context = RequestContext(time.monotonic() + timeout_s, max_cost_usd)
        charges = charges or [0.0] * len(quality)
        candidates = [
            Candidate(name, q, 0.0, q - charge)
            for name, q, charge in zip(self.experts, quality, charges, strict=True)
        ]
        candidates.sort(key=lambda one: -(one.utility or 0.0))
        self.decision = Decision(
            experts=tuple(one.expert for one in candidates),
            candidates=tuple(candidates),
            width=width,
            route="auto",
            strategy="cascade",
            cost_quality=1.0,
        )
        content = {"messages": [{"role": "user", "content": "hello"}], **request}
        self.request = ChatRequest.model_validate(content)
        self.chunks = strategy.run(self.request, self.decision, self.experts, self.context)

    async def answer(self) -> Completion:
        return await collect(self.chunks)

    @property
    def purposes(self) -> list[tuple[str, str]]:
        return [(call.expert, call.purpose) for call in self.context.calls]


# The battery.

STRATEGIES = {
    "uncalibrated": CascadeStrategy(),
    "never a second": CascadeStrategy(max_answers=1),
    "threshold": cascade(
        mode="cascade", calibrations=calibrated(first=0.99), thresholds=[0.9], order=["first"]
    ),
    "unsure": unsure(),
}


async def check_the_path_is_known_with_the_first_chunk(strategy: Strategy) -> None:
    run = StrategyRun(strategy, [scripted("first", answer="a b c"), scripted("second")])
    await anext(run.chunks)
    path = list(run.context.path)
    await run.answer()
    assert run.context.path == path == ["first", "second"]


async def check_the_best_answer_is_given(strategy: Strategy) -> None:
    run = StrategyRun(strategy, [scripted("first"), scripted("second")])
    assert (await run.answer()).text == "second"
    assert run.context.expert == "second"


async def check_an_error_midway_leaves_the_other_answer(strategy: Strategy) -> None:
    """Nothing of a judged answer has left, so another one may take its place."""
    broken = scripted("first", answer="a b c", error="failed", error_after_chunks=1)
    run = StrategyRun(strategy, [broken, scripted("second")])
    assert (await run.answer()).text == "second"


async def check_the_client_that_leaves_frees_the_judged(strategy: Strategy) -> None:
    run = StrategyRun(strategy, [scripted("first"), scripted("second", answer="a b c",
                                                             chunk_delay_s=30)])  # fmt: skip
    await anext(run.chunks)
    assert run.experts["second"].active == 1
    await run.chunks.aclose()
    assert run.experts["second"].active == 0


# A cascade that doubts "first" asks two and streams the second.
REPLACED: Mapping[str, StrategyCheck] = {
    "check_first_expert_answers": check_the_best_answer_is_given,
    "check_path_is_known_with_first_chunk": check_the_path_is_known_with_the_first_chunk,
    "check_nothing_follows_an_error_after_the_first_chunk":
        check_an_error_midway_leaves_the_other_answer,
    "check_closing_frees_the_expert": check_the_client_that_leaves_frees_the_judged,
}  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("check", strategy_checks(), ids=lambda check: check.__name__)
async def test_the_battery(name: str, check: StrategyCheck):
    if name == "unsure":
        check = REPLACED.get(check.__name__, check)
    await check(STRATEGIES[name])


# Supermodels.


def brute_force(
    beliefs: Beliefs, charges: np.ndarray, unasked: Sequence[int], best: float | None, at_most: int
) -> dict[tuple[int, ...], float]:
    """tau of every set, by many random draws of what estimates may become."""
    rng = np.random.default_rng(7)
    known = beliefs.information
    covariance = beliefs.covariance * np.outer(known, known)
    np.fill_diagonal(covariance, known * np.diag(beliefs.covariance))
    drawn = rng.multivariate_normal(beliefs.quality, covariance, 200_000, method="eigh")
    taus: dict[tuple[int, ...], float] = {(): -np.inf if best is None else best}
    for size in range(1, at_most + 1):
        for some in itertools.combinations(unasked, size):
            highest = drawn[:, some].max(axis=1)
            if best is not None:
                highest = np.maximum(highest, best)
            taus[some] = float(highest.mean() - charges[list(some)].sum())
    return taus


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("experts", [3, 4])
def test_the_best_supermodel_is_that_of_trying_everything(experts: int, seed: int):
    rng = np.random.default_rng(seed)
    beliefs = Beliefs(
        rng.uniform(0.3, 0.8, experts), rng.choice([0.0, 0.2, 0.6], experts), rng.uniform(0, 0.6)
    )
    charges = rng.uniform(0.0, 0.12, experts)
    asked = int(rng.integers(0, 2))
    best = None
    if asked:
        beliefs.observe(0, float(rng.uniform(0.1, 0.9)))
        best = float(beliefs.quality[0])
    unasked = range(asked, experts)
    taus = brute_force(beliefs, charges, unasked, best, 3)
    found = tuple(best_supermodel(beliefs, charges, unasked, best=best, at_most=3))
    # 128 points are as good as it gets up to half a point of quality.
    assert taus[found] >= max(taus.values()) - 0.005


def test_without_information_a_second_expert_is_never_worth_it():
    beliefs = Beliefs([0.6, 0.6, 0.5], [0.0, 0.0, 0.0], 0.3)
    charges = np.zeros(3)
    assert best_supermodel(beliefs, charges, [0, 1, 2], best=None, at_most=3) == [0]
    assert best_supermodel(beliefs, charges, [1, 2], best=0.6, at_most=2) == []


def test_more_is_asked_the_less_it_costs_and_the_more_is_known():
    sizes = {}
    for charge, information in itertools.product((0.0, 0.1, 0.3), (0.0, 0.5)):
        beliefs = Beliefs([0.5, 0.5, 0.5], [information] * 3, 0.2)
        made = best_supermodel(beliefs, np.full(3, charge), [0, 1, 2], best=None, at_most=3)
        sizes[charge, information] = len(made)
    assert sizes == {(0.0, 0.0): 1, (0.1, 0.0): 1, (0.3, 0.0): 1,
                     (0.0, 0.5): 3, (0.1, 0.5): 2, (0.3, 0.5): 1}  # fmt: skip


def test_an_unsure_answer_makes_one_expect_less_of_others_by_the_correlation():
    beliefs = Beliefs([0.5, 0.5], [0.4, 0.4], 0.5)
    beliefs.observe(0, 0.1)
    assert beliefs.quality.tolist() == pytest.approx([0.1, 0.5 + 0.5 * (0.1 - 0.5)])
    assert beliefs.covariance[1, 1] == pytest.approx(0.25 * (1 - 0.4 * 0.5**2))
    apart = Beliefs([0.5, 0.5], [0.4, 0.4], 0.0)
    apart.observe(0, 0.1)
    assert apart.quality.tolist() == pytest.approx([0.1, 0.5])


@pytest.mark.parametrize("seed", range(20))
def test_beliefs_stay_beliefs(seed: int):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 16))
    beliefs = Beliefs(rng.uniform(0, 1, n), rng.uniform(0, 0.99, n), rng.uniform(0, 0.99))
    for place in rng.permutation(n)[: n // 2]:
        beliefs.observe(int(place), float(rng.uniform()))
        assert ((beliefs.quality >= 0) & (beliefs.quality <= 1)).all()
        assert np.linalg.eigvalsh(beliefs.covariance).min() > -1e-9
    unasked = list(range(n))
    made = best_supermodel(beliefs, rng.uniform(0, 0.2, n), unasked, best=None, at_most=4)
    assert 1 <= len(made) <= 3


def test_deciding_takes_less_than_a_millisecond_for_nine_experts():
    rng = np.random.default_rng(0)
    quality, charges = rng.uniform(0.2, 0.8, 9), rng.uniform(0, 0.05, 9)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        beliefs = Beliefs(quality, [0.3] * 9, 0.3)
        best_supermodel(beliefs, charges, range(9), best=None, at_most=3)
        times.append(time.perf_counter() - started)
    assert min(times) < 1e-3


# Special cases.


@pytest.mark.parametrize("seed", range(30))
def test_one_answer_at_most_is_routing(seed: int):
    rng = np.random.default_rng(seed)
    names = [f"e{j}" for j in range(5)]
    quality, costs = rng.uniform(0, 1, (1, 5)), rng.uniform(0, 1, (1, 5))
    policy = BudgetPolicy(type="budget", price=float(rng.uniform(0, 1)))
    knob = float(rng.uniform(0.2, 1.0))
    utilities = policy.utilities(names, quality, costs, cost_quality=knob)
    chosen = names[policy.choices(names, quality, costs, cost_quality=knob)[0]]
    ranked = np.argsort(-utilities[0])
    decision = Decision(
        experts=tuple(names[j] for j in ranked),
        candidates=tuple(Candidate(names[j], quality[0, j], costs[0, j], utilities[0, j])
                         for j in ranked),
        cost_quality=knob,
    )  # fmt: skip
    strategy = cascade(max_answers=1, calibrations=calibrated(e0=0.1, e3=0.9))
    walk = strategy.walk(decision, {name: expert(name) for name in names})
    place = walk.next(walk.open)
    assert place is not None
    assert walk.names[place] == chosen
    assert walk.settled(place, [other for other in walk.open if other != place])


@pytest.mark.parametrize("thresholds", [(0.0,), (0.5,), (0.9, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("chances", list(itertools.product((0.2, 0.6), repeat=2)))
def test_the_mode_cascade_is_a_plain_cascade(thresholds: Sequence[float], chances: Sequence[float]):
    """Against the rule in a few lines: go on while the answer is below its threshold."""
    expected = ["a"]
    for stage, name in enumerate("bc"):
        if max(chances[: stage + 1]) >= thresholds[min(stage, len(thresholds) - 1)]:
            break
        expected.append(name)
    strategy = cascade(
        mode="cascade", thresholds=thresholds, calibrations=calibrated(a=chances[0], b=chances[1])
    )
    walk = Walk(strategy, "cba", [0.9, 0.7, 0.5], [0.3, 0.2, 0.1], [3, 2, 1], able="abc", at_most=3)
    asked = []
    while (place := walk.next(walk.open)) is not None:
        asked.append(walk.names[place])
        walk.answer(place, walk.chance(place, 0.5) if walk.judged(place) else None)
    assert asked == expected


def test_a_width_from_the_request_replaces_the_number_of_answers():
    walk = CascadeStrategy().walk(
        Decision(("a", "b"), width=2), {"a": expert("a"), "b": expert("b")}
    )
    assert walk._left == 2


# Answering.


async def test_an_answer_in_doubt_is_followed_by_another():
    run = Run(unsure(), [expert("first"), expert("second")], quality=[0.7, 0.6])
    assert (await run.answer()).text == "second"
    assert run.purposes == [("first", "answer"), ("second", "answer")]
    sure = cascade(calibrations=calibrated(first=0.99, second=0.95))
    run = Run(sure, [expert("first"), expert("second")], quality=[0.7, 0.6], charges=[0.0, 0.1])
    assert (await run.answer()).text == "first"
    assert run.context.path == ["first"]


@pytest.mark.parametrize("stream", [True, False])
async def test_the_best_answer_is_given_though_another_came_last(stream: bool):
    doubts = cascade(calibrations=calibrated(a=0.5, b=0.1, c=0.2), max_answers=4)
    experts = [expert("a", answer_rule("one two")), expert("b"), expert("c"), expert("d")]
    run = Run(doubts, experts, quality=[0.5, 0.5, 0.5, 0.05], charges=[0.01, 0.02, 0.02, 0.5],
              stream=stream)  # fmt: skip
    answer = await run.answer()
    assert answer.text == "one two"
    assert run.context.path == ["a", "b", "c"]
    assert run.context.expert == "a"
    assert answer.usage == run.context.usage
    assert answer.usage.completion_tokens == 4


def answer_rule(text: str, **rule: Any) -> dict[str, Any]:
    return {"answer": text, **rule}


async def test_the_last_expert_is_streamed_with_the_usage_of_all():
    run = Run(unsure(), [expert("first"), expert("second", answer_rule("a b c"))],
              quality=[0.7, 0.6], stream=True)  # fmt: skip
    chunks = [chunk async for chunk in run.chunks]
    assert [chunk.text for chunk in chunks if chunk.text] == ["a", " b", " c"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    assert not run.experts["second"].requests[0].logprobs


@pytest.mark.parametrize(("charge", "path"), [(0.9, ["first"]), (0.05, ["first", "second"])])
async def test_an_answer_is_streamed_if_no_signal_would_make_another_worth_it(
    charge: float, path: list[str]
):
    strategy = cascade(calibrations={"first": STEPS, "second": STEPS})
    experts = [expert("first", answer_rule("a b")), expert("second", answer_rule("c d"))]
    run = Run(strategy, experts, quality=[0.6, 0.6], charges=[0.0, charge], stream=True)
    chunks = [chunk async for chunk in run.chunks]
    # A judged answer comes in one piece; the scripted signal is the better one.
    assert [chunk.text for chunk in chunks if chunk.text] == (
        ["a", " b"] if len(path) == 1 else ["a b"]
    )
    assert bool(experts[0].requests[0].logprobs) == (len(path) == 2)


async def test_the_knob_and_a_margin_count_as_charges():
    """A candidate's quality less its utility is what asking costs."""
    route = {
        "router": "table",
        "policy": {"type": "budget", "price": 0.0},
        "strategy": {"type": "cascade", "calibrations": {
            name: {"points": [[0.5, 0.5]], "information": 0.5}
            for name in ("small", "medium", "large")}},
    }  # fmt: skip
    config = parse_config(config_content(routes={"auto": route}))
    experts = {name: expert(name) for name in config.cards()}
    orchestrator = Orchestrator(config, experts, load_routers(config))
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hello"}]})
    paths = {}
    for knob in (0.0, 0.5, 1.0):
        context = RequestContext(time.monotonic() + 5)
        decision = await orchestrator.decide(request, options=RoutingOptions(cost_quality=knob))
        await collect(orchestrator.run(request, decision, context))
        paths[knob] = context.path
    await orchestrator.aclose()
    assert paths[0.0] == ["small"]
    assert len(paths[1.0]) == 3
    assert len(paths[0.5]) < 3


# Limits.


async def test_nobody_is_asked_beyond_max_cost():
    dear = {"output_usd_per_mtok": 10.0}
    experts = [expert("first", **dear), expert("second", **dear)]
    one = 256 * 10e-6
    run = Run(unsure(), experts, quality=[0.7, 0.6], max_cost_usd=1.5 * one)
    assert (await run.answer()).text == "second" or run.context.path == ["first"]
    # What the first was expected to cost is free again once it said less.
    assert run.context.cost_usd <= 1.5 * one
    wordy = [expert("first", answer_rule("word " * 200), **dear), expert("second", **dear)]
    run = Run(unsure(), wordy, quality=[0.7, 0.6], max_cost_usd=1.5 * one)
    assert (await run.answer()).text.startswith("word")
    assert run.context.path == ["first"]


async def test_an_expert_that_must_be_the_last_is_streamed_and_not_judged():
    dear = {"output_usd_per_mtok": 10.0}
    experts = [expert("first", **dear), expert("second", **dear)]
    run = Run(unsure(), experts, quality=[0.7, 0.6], max_cost_usd=1.5 * 256 * 10e-6, stream=True)
    assert (await anext(run.chunks)).text == "first"
    await run.chunks.aclose()
    assert not run.experts["first"].requests[0].logprobs


async def test_a_request_that_affords_nobody_says_so():
    experts = [expert("first", output_usd_per_mtok=10.0)]
    run = Run(unsure(), experts, quality=[0.7], max_cost_usd=1e-6)
    with pytest.raises(CostLimitError):
        await run.answer()


async def test_no_further_expert_is_asked_if_its_latency_does_not_fit():
    experts = [expert("first"), expert("second", latency_s=30.0)]
    run = Run(unsure(), experts, quality=[0.7, 0.6])
    assert (await run.answer()).text == "first"
    run = Run(unsure(), experts, quality=[0.7, 0.6], timeout_s=60)
    assert (await run.answer()).text == "second"


async def test_an_answer_is_given_though_the_next_expert_takes_all_the_time():
    experts = [expert("first"), expert("second", {"answer": "late", "delay_s": 30})]
    run = Run(unsure(), experts, quality=[0.7, 0.6], timeout_s=0.2)
    assert (await run.answer()).text == "first"
    assert run.context.expert == "first"
    assert run.context.path == ["first", "second"]


# Failures.


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("error", ["unavailable", "failed", "auth", "overloaded"])
async def test_a_failed_expert_counts_as_bad_and_the_cascade_goes_on(error: str, stream: bool):
    experts = [expert("a", {"error": error}), expert("b", {"error": error}), expert("c")]
    run = Run(CascadeStrategy(max_answers=1), experts, quality=[0.9, 0.8, 0.1], stream=stream)
    assert (await run.answer()).text == "c"
    assert run.context.path == ["a", "b", "c"]


async def test_an_earlier_answer_is_given_if_the_next_fails():
    run = Run(unsure(), [expert("first"), expert("second", {"error": "failed"})],
              quality=[0.7, 0.6])  # fmt: skip
    assert (await run.answer()).text == "first"
    assert run.context.answered_by == "first"


async def test_a_streamed_answer_that_breaks_off_is_an_error():
    broken = expert("second", {"answer": "a b c", "error": "failed", "error_after_chunks": 1})
    run = Run(unsure(), [expert("first"), broken], quality=[0.7, 0.6], stream=True)
    assert (await anext(run.chunks)).text == "a"
    with pytest.raises(ExpertFailedError):
        await run.answer()


async def test_a_request_that_only_a_later_expert_minds_is_answered():
    run = Run(unsure(), [expert("first"), expert("second", {"error": "invalid"})],
              quality=[0.7, 0.6])  # fmt: skip
    assert (await run.answer()).text == "first"
    assert run.context.path == ["first", "second"]


async def test_a_request_that_the_first_expert_minds_is_refused():
    run = Run(unsure(), [expert("first", {"error": "invalid"}), expert("second")],
              quality=[0.7, 0.6])  # fmt: skip
    with pytest.raises(InvalidRequestError):
        await run.answer()
    assert run.context.path == ["first"]


# Signals.


def test_calibrations_interpolate():
    made = Calibration(points=((0.2, 0.1), (0.6, 0.5), (0.8, 0.5)), information=0.3)
    signals = (0.0, 0.2, 0.4, 0.7, 1.0)
    assert [made.chance(s, 0.9) for s in signals] == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.5])


def test_with_a_base_the_expectation_counts_too():
    made = Calibration(points=((0.5, 0.6),), information=0.3, base=0.6)
    assert made.chance(0.5, 0.3) == pytest.approx(0.3)  # a signal that tells nothing
    assert made.chance(0.5, 0.6) == pytest.approx(0.6)
    rising = Calibration(points=((0.0, 0.2), (1.0, 0.9)), information=0.3, base=0.5)
    assert rising.chance(1.0, 0.5) == pytest.approx(0.9)
    assert rising.chance(1.0, 0.8) == pytest.approx(36 / 37)  # odds 9 times 4


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([[0.5, 0.2], [0.4, 0.3]], "rising signals"),
        ([[0.4, 0.5], [0.5, 0.3]], "chances that do not fall"),
        ([[0.4, 1.5]], "chances must lie in"),
    ],
)
def test_calibrations_are_monotone(points: Any, said: str):
    with pytest.raises(ValidationError, match=said):
        Calibration(points=points, information=0.1)


def test_signals_of_tokens():
    tokens = [
        {"logprob": math.log(p), "top_logprobs": [{"logprob": math.log(x)} for x in top]}
        for p, top in [(0.9, (0.9, 0.1)), (0.4, (0.5, 0.4))]
    ]
    assert mean_probability({"content": tokens}) == pytest.approx((0.9 * 0.4) ** 0.5)
    assert mean_margin({"content": tokens}) == pytest.approx((0.8 + 0.1) / 2)
    assert mean_probability(None) is None
    assert mean_margin({"content": []}) is None


@pytest.mark.parametrize(("signal", "value"), [("logprob", SCRIPTED_PROBABILITY),
                                               ("margin", SCRIPTED_PROBABILITY)])  # fmt: skip
async def test_log_probabilities_are_asked_for_and_kept_from_the_client(signal: str, value: float):
    """The chance jumps at the value, so who answers tells that it was found."""
    for shift, text in ((-0.01, "first"), (0.01, "second")):
        points = [[value + shift - 0.001, 0.01], [value + shift + 0.001, 0.99]]
        strategy = cascade(
            signal=signal, calibrations={"first": {"points": points, "information": 0.5}}
        )
        run = Run(strategy, [expert("first"), expert("second")], quality=[0.5, 0.4])
        answer = await run.answer()
        assert answer.text == text
        assert answer.choices[0].logprobs is None
        assert run.experts["first"].requests[0].logprobs


async def test_a_client_gets_the_log_probabilities_it_asked_for():
    run = Run(unsure(signal="margin"), [expert("first"), expert("second", {"error": "failed"})],
              quality=[0.7, 0.6], logprobs=True)  # fmt: skip
    logprobs = (await run.answer()).choices[0].logprobs
    assert logprobs is not None
    assert [token["top_logprobs"] for token in logprobs["content"]] == [[]]


def test_taking_log_probabilities_away_takes_nothing_else():
    choice = Choice("text", [{"id": "1"}], "stop", {"content": []}, sources=[{"id": "a"}])
    request = chat_request()
    (left,) = without_signal(Completion([choice], Usage()), request).choices
    assert left == replace(choice, logprobs=None)


async def test_experts_without_log_probabilities_are_taken_at_their_prediction():
    silent = expert("first", capabilities=["chat"])
    run = Run(unsure(), [silent, expert("second")], quality=[0.7, 0.6], charges=[0.0, 0.2],
              stream=True)  # fmt: skip
    assert (await anext(run.chunks)).text == "first"
    await run.chunks.aclose()
    assert not silent.requests[0].logprobs


STEPS: dict[str, Any] = {"points": [[0.4, 0.05], [0.6, 0.95]], "information": 0.5}


@pytest.mark.parametrize(("says", "text"), [("No.", "second"), ("Yes", "first"), ("Hm", "first")])
async def test_an_expert_verifies_its_own_answer(says: str, text: str):
    first = expert("first", {"match": "Is the answer right", "answer": says})
    strategy = cascade(signal="verify", calibrations={"first": STEPS})
    run = Run(strategy, [first, expert("second")], quality=[0.5, 0.4], charges=[0.0, 0.1])
    assert (await run.answer()).text == text
    assert run.purposes[:2] == [("first", "answer"), ("first", "verify")]
    asked = first.requests[1]
    assert isinstance(asked, ChatRequest)
    assert "hello" in asked.messages[0].text
    assert "first" in asked.messages[0].text


async def test_verifying_takes_the_probability_of_a_yes_where_it_is_known():
    class Wavering(ScriptedExpert):
        async def stream(self, request: Any, *, timeout_s: float) -> Any:
            async for chunk in super().stream(request, timeout_s=timeout_s):
                if chunk.text == "No":
                    top = [{"token": "No", "logprob": math.log(0.4)},
                           {"token": " yes", "logprob": math.log(0.6)}]  # fmt: skip
                    chunk.logprobs = {"content": [{**top[0], "top_logprobs": top}]}
                yield chunk

    rules = [{"match": "Is the answer right", "answer": "No"}, {"answer": "first"}]
    first = Wavering(ScriptedExpertConfig.model_validate(
        {"name": "first", "engine": "scripted", "rules": rules}))  # fmt: skip
    strategy = cascade(signal="verify", calibrations={
        "first": {"points": [[0.59, 0.05], [0.6, 0.95]], "information": 0.5}})  # fmt: skip
    run = Run(strategy, [first, expert("second")], quality=[0.5, 0.4], charges=[0.0, 0.1])
    assert (await run.answer()).text == "first"


@pytest.mark.parametrize(
    ("says", "text"), [("Grade: 2", "second"), ("9 out of 10", "first"), ("?", "first")]
)
async def test_a_judge_rates_answers(says: str, text: str):
    judge = expert("judge", {"answer": says})
    strategy = cascade(signal="judge", judge="judge", calibrations={"first": STEPS})
    run = Run(strategy, [expert("first"), expert("second")], quality=[0.5, 0.4], charges=[0.0, 0.1])
    run.experts["judge"] = judge
    assert (await run.answer()).text == text
    assert run.purposes[:2] == [("first", "answer"), ("judge", "judge")]
    assert run.context.expert == text


async def test_a_judge_that_fails_leaves_the_prediction():
    strategy = cascade(signal="judge", judge="judge", calibrations={"first": STEPS})
    run = Run(strategy, [expert("first"), expert("second")], quality=[0.5, 0.4], charges=[0.0, 0.1])
    run.experts["judge"] = expert("judge", {"error": "failed"})
    assert (await run.answer()).text == "first"
    assert run.context.path == ["first", "judge"]


# Tools, JSON, several answers, text completions.

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}


async def test_a_tool_call_is_shown_to_the_judge_and_given_whole():
    first = expert("first", {"tool_call": {"name": "weather", "arguments": {"city": "Bern"}}})
    strategy = cascade(signal="judge", judge="judge", calibrations={"first": STEPS})
    run = Run(strategy, [first, expert("second")], quality=[0.5, 0.4], charges=[0.0, 0.1],
              tools=[TOOL])  # fmt: skip
    run.experts["judge"] = expert("judge", {"answer": "Grade: 10"})
    choice = (await run.answer()).choices[0]
    assert json.loads(choice.tool_calls[0]["function"]["arguments"]) == {"city": "Bern"}
    assert choice.finish_reason == "tool_calls"
    asked = run.experts["judge"].requests[0]
    assert isinstance(asked, ChatRequest)
    assert "Bern" in asked.messages[0].text


async def test_an_answer_that_is_no_json_is_worth_nothing():
    sure = cascade(calibrations=calibrated(first=0.99, second=0.5))
    for text, by in (('{"a": 1}', "first"), ('{"a":', "second")):
        experts = [expert("first", answer_rule(text)), expert("second", answer_rule("{}"))]
        run = Run(sure, experts, quality=[0.7, 0.6], charges=[0.0, 0.1],
                  response_format={"type": "json_object"})  # fmt: skip
        await run.answer()
        assert run.context.expert == by


@pytest.mark.parametrize("text", ["[" * 600 + "]" * 600, "[" * 100_000 + "]" * 100_000])
@pytest.mark.parametrize("shape", ["text", "json_object"])
async def test_json_of_any_depth_fails_nobody(text: str, shape: str):
    experts = [expert("first", answer_rule(text)), expert("second", answer_rule("{}"))]
    run = Run(unsure(), experts, quality=[0.7, 0.6], response_format={"type": shape})
    assert (await run.answer()).text == "{}"


def test_what_is_surely_wrong():
    def found(text: str, calls: list[Any] | None = None, **fields: Any) -> bool:
        content = {"messages": [{"role": "user", "content": "hello"}], **fields}
        completion = collected(text, calls or [])
        return unusable(ChatRequest.model_validate(content), completion)

    assert found("  ")
    assert not found("", [{"id": "1"}])
    assert found("no call", tools=[TOOL], tool_choice="required")
    assert not found("plain text")
    for text in ("[1", "[" * 100_000):
        assert found(text, response_format={"type": "json_object"})


def collected(text: str, calls: list[Any]) -> Completion:
    return Completion([Choice(text, calls)], Usage())


async def test_several_answers_and_text_completions_fall_back():
    run = Run(unsure(), [expert("first", {"error": "failed"}), expert("second")],
              quality=[0.7, 0.6], n=2)  # fmt: skip
    assert [choice.text for choice in (await run.answer()).choices] == ["second", "second"]
    assert run.context.path == ["first", "second"]
    context = RequestContext(time.monotonic() + 5)
    experts = {name: expert(name) for name in ("first", "second")}
    chunks = unsure().run(
        CompletionRequest(prompt="hello"), Decision(("first", "second")), experts, context
    )
    assert (await collect(chunks)).text == "first"
    assert context.path == ["first"]


# Config.


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"signal": "judge"}, "'judge' names"),
        ({"judge": "small"}, "'judge' names"),
        ({"mode": "cascade"}, "'thresholds'"),
        ({"thresholds": [0.5]}, "'thresholds'"),
        ({"order": ["small"]}, "'thresholds'"),
        ({"calibrations": {"nobody": STEPS}}, "unknown expert 'nobody'"),
        ({"mode": "cascade", "thresholds": [0.5], "order": ["x"]}, "unknown expert 'x'"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict[str, Any], said: str):
    routes = {"auto": {"router": "table", "strategy": {"type": "cascade", **fields}}}
    with pytest.raises(ConfigError, match=said):
        parse_config(config_content(routes=routes))


async def test_single_and_an_uncalibrated_cascade_give_the_same():
    for strategy in (SingleStrategy(), CascadeStrategy()):
        run = StrategyRun(strategy, [scripted("a", answer="x y"), scripted("b")])
        chunks: list[Chunk] = [chunk async for chunk in run.chunks]
        assert [chunk.text for chunk in chunks] == ["x", " y", ""]
