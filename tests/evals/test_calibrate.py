from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from evals.calibrate import calibrate, find_threshold
from evals.calibrate_cli import calibrate_command
from evals.decisions import decide
from evals.evaluate_cli import evaluate_command
from evals.policy_files import make_policy, read_policy
from orchestrator.policies import BudgetPolicy, ThresholdPolicy
from routers.base import RouterError
from routers.coe import CoERouter
from routers.outcomes import OutcomeTable
from routers.testing import MODELS, example_table

PRICES = dict(zip(MODELS, (1.0, 4.0, 9.0), strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    table = example_table()
    table.cards = {m: {"total_params_b": p} for m, p in PRICES.items()}
    table.write(folder / "table")
    CoERouter(encoder="hashing", soft=True).fit(table).save(folder / "coe")
    return folder


def _run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def _calibrated(folders, kind, *settings):
    out = folders / f"{kind}.yaml"
    pairs = [word for setting in settings for word in ("--set", setting)]
    done = _run(calibrate_command, kind, folders / "coe", "--table", folders / "table",
                "--split", "validation", "--out", out, *pairs)  # fmt: skip
    assert done.exit_code == 0, done.output
    return out


def _decided(folders, policy_file, split="validation", **options):
    table = OutcomeTable.load(folders / "table")
    router = CoERouter.load(folders / "coe")
    policy = read_policy(policy_file)
    return decide("coe", router, table, split=split, candidates=MODELS, policy=policy, **options)


def _mean_params(made):
    return float(np.mean([PRICES[model] for model in made.models]))


@pytest.mark.parametrize("bound", [2.0, 3.0, 5.0])
def test_a_budget_is_kept_and_used(folders, bound):
    out = _calibrated(folders, "budget", f"max_mean_cost={bound}", "cost=active_params_b")
    made = _decided(folders, out)
    assert _mean_params(made) <= bound + 1e-9
    policy = read_policy(out)
    assert isinstance(policy, BudgetPolicy)
    if policy.price:
        cheaper = policy.model_copy(update={"price": policy.price * 0.999})
        table = OutcomeTable.load(folders / "table")
        looser = decide("coe", CoERouter.load(folders / "coe"), table, split="validation",
                        candidates=MODELS, policy=cheaper)  # fmt: skip
        assert _mean_params(looser) > bound


def test_a_looser_budget_never_scores_a_lower_predicted_quality(folders):
    qualities = []
    for bound in (1.5, 2.5, 4.0, 9.0):
        made = _decided(
            folders, _calibrated(folders, "budget", f"max_mean_cost={bound}",
                                 "cost=active_params_b")
        )  # fmt: skip
        qualities.append(made.quality[np.arange(len(made.choice)), made.choice].mean())
    assert qualities == sorted(qualities)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_the_strong_expert_gets_at_most_its_share(folders, share):
    out = _calibrated(
        folders, "threshold", f"weak={MODELS[1]}", f"strong={MODELS[0]}", f"strong_share={share}"
    )
    made = _decided(folders, out)
    assert set(made.models) <= {MODELS[0], MODELS[1]}
    found = made.models.count(MODELS[0]) / len(made.models)
    assert found <= share
    gap = made.quality[:, 0] - made.quality[:, 1]
    # All above the threshold go to the strong one; more would only go by splitting a tie.
    others = gap[[model != MODELS[0] for model in made.models]]
    tied = np.isclose(gap, others.max()).mean() if len(others) else 0.0
    assert found + tied >= share


def test_top_p_covers_what_it_promises(folders):
    out = _calibrated(folders, "top_p", "coverage=0.9", "max_experts=3")
    made = _decided(folders, out)
    scores = OutcomeTable.load(folders / "table").scores("validation", MODELS)
    asked = made.asked or [[int(j)] for j in made.choice]
    best = [scores[row, models].max() for row, models in enumerate(asked)]
    assert np.mean(best) >= 0.9
    assert max(map(len, asked)) <= 3


def test_a_threshold_no_gap_exceeds_can_be_read_again():
    policy = ThresholdPolicy(type="threshold", weak="a", strong="b", strong_share=0.2)
    found = find_threshold(policy, np.array([1.0, 1.0, 0.0]))
    assert found > 1
    assert make_policy({**policy.model_dump(), "threshold": found}, name="x").uncalibrated is None


def test_evaluate_takes_the_policy_that_calibrate_wrote(folders):
    out = _calibrated(folders, "top_p", "coverage=0.9", "max_experts=3")
    done = _run(evaluate_command, folders / "coe", "--table", folders / "table", "--policy", out,
                "--json", "-")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["policy"]["type"] == "top_p"
    figures = report["figures"]["coe"]
    assert 1 <= figures["experts_asked"] <= 3


def test_the_written_policy_is_a_routes_policy(folders):
    out = _calibrated(folders, "budget", "max_mean_cost=3", "cost=active_params_b")
    content = yaml.safe_load(out.read_text())
    assert content["policy"]["type"] == "budget"
    assert set(content["policy"]) == {"type", "max_mean_cost", "cost", "price"}


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("budget", [], "set max_mean_cost"),
        ("budget", ["max_mean_cost=0.5", "cost=latency_s"], "nobody knows it of 'cook'"),
        ("budget", ["max_mean_cost=0.5", "cost=active_params_b"], "no choice keeps to a mean cost"),
        ("threshold", [f"weak={MODELS[0]}", f"strong={MODELS[1]}"], "set strong_share"),
        ("threshold", ["weak=a", "strong=b", "strong_share=0.5"], "names 'a'"),
        ("top_p", ["coverage=0.999999", "max_experts=1"], "raise max_experts"),
        ("top_p", ["coverage=2"], "coverage: "),
    ],
)
def test_goals_that_cannot_be_met_are_refused(folders, kind, settings, said):
    pairs = [word for setting in settings for word in ("--set", setting)]
    done = _run(calibrate_command, kind, folders / "coe", "--table", folders / "table", *pairs)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_a_policy_file_that_is_none_is_refused(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("policy: {type: lottery}")
    with pytest.raises(RouterError, match="lottery"):
        read_policy(file)


def test_a_threshold_needs_both_experts(folders):
    table = OutcomeTable.load(folders / "table")
    table.cards = {m: {"latency_s": float(n + 1)} for n, m in enumerate(MODELS)}
    policy = make_policy(
        {"type": "threshold", "weak": MODELS[0], "strong": MODELS[2], "strong_share": 0.3,
         "max_latency_s": 2.0}, name="policy",
    )  # fmt: skip
    router = CoERouter.load(folders / "coe")
    with pytest.raises(RouterError, match=f"leaves only '{MODELS[0]}'"):
        calibrate(policy, router, table, split="validation", candidates=MODELS)
