from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from evals.calibrate import find_price
from evals.calibrate_cli import calibrate_command
from evals.cascades import (
    Cells,
    calibrations_of,
    correlation_of,
    replay,
    simulated_threshold,
    tune_cascade,
    tune_cascade_routing,
)
from evals.collect import collect
from evals.collect_options import CollectOptions
from evals.tasks import get_task
from experts.config import ScriptedExpertConfig
from experts.scripted import ScriptedExpert
from orchestrator.config import parse_config
from orchestrator.policies import BudgetPolicy, UtilityPolicy
from orchestrator.strategies.cascade import CascadeStrategy
from routers.coe import CoERouter
from routers.outcomes import OutcomeTable, Prompts, TableError
from routers.testing import MODELS, example_table

NAMES = ("small", "medium", "big")
SKILL = np.array([0.5, 0.65, 0.8])
COSTS = np.array([0.1, 0.3, 1.0])


def cells(strength: float, *, seed: int = 0, n: int = 400) -> Cells:
    """Prompts of which nothing is predicted, and signals as far apart as the strength says."""
    rng = np.random.default_rng(seed)
    scores = (rng.uniform(size=(n, 3)) < SKILL).astype(float)
    quality = np.tile(SKILL, (n, 1))
    signals = strength * scores + rng.standard_normal(scores.shape)
    return Cells(NAMES, quality, np.tile(COSTS, (n, 1)), scores, signals)


def mean_score(seen: Cells, given: Any) -> float:
    return float(seen.scores[np.arange(len(given)), given].mean())


def test_calibrations_are_learned_and_say_how_much_they_are_worth():
    strong, weak = calibrations_of(cells(3.0)), calibrations_of(cells(0.0))
    assert set(strong) == set(NAMES)
    for name, skill in zip(NAMES, SKILL, strict=True):
        assert strong[name].information > 0.5
        assert weak[name].information < 0.05
        assert strong[name].base == pytest.approx(skill, abs=0.1)
        assert strong[name].chance(-1.0, skill) < 0.3
        assert strong[name].chance(4.0, skill) > 0.9


def test_calibrations_need_enough_signals():
    seen = cells(2.0)
    seen.signals[:, 0] = np.nan
    seen.signals[40:, 1] = np.nan
    assert set(calibrations_of(seen)) == {"big"}


def test_the_correlation_is_that_of_the_residuals():
    rng = np.random.default_rng(0)
    common = rng.standard_normal((4000, 1))
    scores = (common + rng.standard_normal((4000, 3)) > 0).astype(float)
    quality = np.full(scores.shape, 0.5)
    seen = Cells(NAMES, quality, quality, scores, quality)
    assert correlation_of(seen) == pytest.approx(1 / 3, abs=0.03)
    assert correlation_of(cells(1.0)) < 0.06


@pytest.mark.parametrize("bound", [0.25, 0.9])
def test_with_a_good_judge_a_cascade_beats_routing_at_the_same_cost(bound: float):
    learn, look = cells(3.0, n=150), cells(3.0, seed=1)
    policy = BudgetPolicy(type="budget", max_mean_cost=bound)
    priced, strategy = tune_cascade_routing(
        policy, learn, max_answers=3, signal="logprob", judge=None
    )
    assert replay(strategy, priced, learn).spent(learn.costs).mean() <= bound
    made = replay(strategy, priced, look)
    price = find_price(policy, NAMES, look.quality.astype(np.float32), look.costs)
    routed = policy.model_copy(update={"price": price})
    single = routed.choices(NAMES, look.quality, look.costs)
    assert made.spent(look.costs).mean() < 1.15 * bound
    assert mean_score(look, made.given) > mean_score(look, single) + 0.05


def test_without_a_signal_a_cascade_is_routing():
    learn = cells(0.0, n=100)
    learn.signals[:] = np.nan
    policy = BudgetPolicy(type="budget", max_mean_cost=0.5)
    priced, strategy = tune_cascade_routing(
        policy, learn, max_answers=3, signal="logprob", judge=None
    )
    made = replay(strategy, priced, learn)
    assert made.answers.max() == 1
    assert (made.given == priced.choices(NAMES, learn.quality, learn.costs)).all()


@pytest.mark.parametrize("bound", [0.15, 0.5, 0.9])
def test_a_plain_cascade_keeps_to_its_bound_and_replays_as_it_was_tuned(bound: float):
    learn = cells(3.0, n=150)
    strategy = tune_cascade(learn, bound=bound, max_answers=3, signal="logprob", judge=None)
    made = replay(strategy, UtilityPolicy(), learn)
    assert made.spent(learn.costs).mean() <= bound
    singles = [j for j in range(3) if COSTS[j] <= bound]
    assert mean_score(learn, made.given) >= max(learn.scores[:, j].mean() for j in singles)
    assert list(strategy.order) == [name for name in NAMES if name in strategy.order]


def test_a_replay_counts_every_call():
    seen = cells(3.0, n=50)
    always = CascadeStrategy(
        mode="cascade", order=("small", "big"), thresholds=(2.0,), max_answers=2,
        calibrations=calibrations_of(cells(3.0)),
    )  # fmt: skip
    made = replay(always, UtilityPolicy(), seen)
    assert all(asked == [0, 2] for asked in made.asked)
    assert made.spent(seen.costs).tolist() == pytest.approx([1.1] * 50)
    assert set(made.given.tolist()) == {0, 2}


def test_a_simulated_threshold_is_the_best_of_all():
    rng = np.random.default_rng(3)
    chances = rng.choice(np.linspace(0.05, 0.95, 10), 300)
    weak = (rng.uniform(size=300) < chances).astype(float)
    strong = (rng.uniform(size=300) < 0.7).astype(float)
    for charge in (0.0, 0.1, 0.5, 0.99):
        found = simulated_threshold((chances, weak), strong, charge=charge)
        worth = {t: np.where(chances < t, strong - charge, weak).mean() for t in
                 [0.0, found, 1.0, *np.unique(chances)]}  # fmt: skip
        assert worth[found] == pytest.approx(max(worth.values()))


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascades")
    table = example_table(per_split=90)
    scores = table.scores("all")
    noise = np.random.default_rng(0).uniform(0, 0.5, scores.shape)
    prices = dict(zip(MODELS, (1.0, 4.0, 9.0), strict=True))
    judged = OutcomeTable(
        table.prompts,
        models=MODELS,
        numbers={"score": scores, "confidence": 0.5 * scores + noise},
        cards={name: {"total_params_b": size} for name, size in prices.items()},
    )
    judged.write(folder / "table")
    table.write(folder / "silent")
    CoERouter(encoder="hashing", soft=True).fit(judged).save(folder / "coe")
    return folder


def run(folder: Path, *settings: str, table: str = "table") -> Any:
    pairs = [word for setting in settings for word in ("--set", setting)]
    arguments = ["cascade", str(folder / "coe"), "--table", str(folder / table), *pairs]
    return CliRunner().invoke(calibrate_command, arguments)


@pytest.mark.parametrize("mode", ["cascade_routing", "cascade"])
def test_the_command_prints_what_a_route_takes(folder: Path, mode: str):
    done = run(folder, "max_mean_cost=4", f"mode={mode}")
    assert done.exit_code == 0, done.output
    route = yaml.safe_load(done.stdout)
    assert set(route) == {"policy", "strategy"}
    assert route["policy"]["cost"] == "active_params_b"
    config = parse_config({
        "experts": [{"name": name, "engine": "scripted"} for name in MODELS],
        "routers": {"coe": {"type": "artefact", "path": str(folder / "coe")}},
        "routes": {"auto": {"router": "coe", **route}},
    })  # fmt: skip
    strategy = config.routes["auto"].strategy
    assert isinstance(strategy, CascadeStrategy)
    assert strategy.mode == mode
    assert "score" in done.stderr


def test_the_command_finds_a_threshold_with_stand_ins(folder: Path):
    done = run(folder, "mode=cascade", 'order=["lawyer", "unseen"]', "charge=0.05",
               'stand_ins=["cook", "generalist"]')  # fmt: skip
    assert done.exit_code == 0, done.output
    strategy = yaml.safe_load(done.stdout)["strategy"]
    assert strategy["order"] == ["lawyer", "unseen"]
    assert set(strategy["calibrations"]) == {"lawyer"}
    assert 0 < strategy["thresholds"][0] < 1


@pytest.mark.parametrize(
    ("settings", "table", "said"),
    [
        ((), "table", "set max_mean_cost"),
        (("max_mean_cost=0.5",), "table", "keeps to a mean cost"),
        (("max_mean_cost=4",), "silent", "'collegium collect --confidence'"),
        (("mode=cascade", "charge=0.1"), "table", "'order', 'stand_ins' and 'charge' together"),
        (("max_mean_cost=4", "depth=2"), "table", "depth"),
    ],
)
def test_the_command_says_what_is_missing(folder: Path, settings: Any, table: str, said: str):
    done = run(folder, *settings, table=table)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


# The column.


def expert(name: str, **fields: Any) -> ScriptedExpert:
    content = {"name": name, "engine": "scripted", "rules": [{"answer": "42"}], **fields}
    return ScriptedExpert(ScriptedExpertConfig.model_validate(content))


def test_collecting_records_token_probabilities_of_experts_that_give_them(tmp_path: Path):
    experts = {"open": expert("open"), "closed": expert("closed", capabilities=["chat"])}
    task = get_task("maths")
    options = CollectOptions(splits=("validation",), limit=2, confidence=True)
    asyncio.run(collect(experts, [task], tmp_path, options))
    found = OutcomeTable.load(tmp_path).confidences("all")
    assert found[:, 0] == pytest.approx([np.exp(-0.25)] * 2)
    assert np.isnan(found[:, 1]).all()
    again = OutcomeTable.load(tmp_path).restricted_to(["open"])
    again.write(tmp_path / "again")
    assert OutcomeTable.load(tmp_path / "again").confidences("all").tolist() == [[found[0, 0]]] * 2


def test_without_the_option_there_is_no_column(tmp_path: Path):
    options = CollectOptions(splits=("validation",), limit=1)
    asyncio.run(collect({"open": expert("open")}, [get_task("maths")], tmp_path, options))
    assert np.isnan(OutcomeTable.load(tmp_path).confidences("all")).all()


def test_a_confidence_is_a_share(tmp_path: Path):
    numbers = {"score": np.ones((1, 1)), "confidence": np.full((1, 1), 1.5)}
    with pytest.raises(TableError, match=r"'confidence' has values outside \[0, 1\]"):
        OutcomeTable(Prompts(["a"], ["text"]), models=["m"], numbers=numbers)
    made = OutcomeTable(Prompts(["a"], ["text"]), models=["m"], numbers={
        "score": np.ones((1, 1)), "cost_usd": np.full((1, 1), 1.5)})  # fmt: skip
    made.write(tmp_path)
    import pyarrow.parquet as pq

    file = tmp_path / "outcomes.parquet"
    rows = pq.read_table(file)
    pq.write_table(rows.rename_columns(["prompt_id", "model", "score", "confidence"]), file)
    with pytest.raises(TableError, match="outside"):
        OutcomeTable.load(tmp_path).confidences("all")
