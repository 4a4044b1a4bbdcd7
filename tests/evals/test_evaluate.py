from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from evals.decisions import decide, decisions_sha256, shared_pool
from evals.evaluate import judge
from evals.evaluate_cli import evaluate_command
from evals.html_report import as_html
from evals.metrics import Point, aiq
from evals.report import as_json, as_markdown, as_text
from routers.base import RouterError
from routers.baselines import BestSingleRouter, RandomRouter
from routers.coe import CoERouter
from routers.outcomes import OutcomeTable, Prompts
from routers.testing import MODELS, example_table


@pytest.fixture(scope="module")
def fitted():
    return {
        "coe": CoERouter(encoder="hashing").fit(example_table()),
        "best_single": BestSingleRouter().fit(example_table()),
        "random": RandomRouter().fit(example_table()),
    }


@pytest.fixture
def folders(tmp_path, fitted):
    example_table().write(tmp_path / "table")
    for name, router in fitted.items():
        router.save(tmp_path / name)
    return tmp_path


def _judged(fitted, table=None, names=("coe",), **options):
    table = table or example_table()
    made = [
        decide(name, fitted[name], table, split="test", candidates=MODELS, **options)
        for name in names
    ]
    return judge(made, table, split="test")


def _lines(evaluation):
    return {(line.kind, line.name): line for line in evaluation.lines}


def _run(*arguments):
    return CliRunner().invoke(evaluate_command, [str(argument) for argument in arguments])


def test_lines_agree_with_hand_computed_means(fitted):
    table = example_table()
    lines = _lines(_judged(fitted))
    test, train = table.scores("test"), table.scores("train")
    best = train.mean(axis=0).argmax()
    assert lines["baseline", "random"].score.mean == pytest.approx(test.mean())
    assert lines["baseline", "best single"].score.mean == pytest.approx(test[:, best].mean())
    assert lines["bound", "oracle"].score.mean == pytest.approx(test.max(axis=1).mean())
    for column, model in enumerate(MODELS):
        assert lines["model", model].score.mean == pytest.approx(test[:, column].mean())
    law = np.array(table.with_prompts_of("test").categories) == "law"
    oracle = test[law].mean(axis=0).max()
    found = lines["bound", "category oracle"].by_category["law"].mean
    assert found == pytest.approx(oracle)


def test_no_router_beats_the_oracle_and_gaps_have_their_ends(fitted):
    evaluation = _judged(fitted, names=("coe", "best_single", "random"))
    lines = _lines(evaluation)
    oracle = lines["bound", "oracle"]
    assert all(line.score.mean <= oracle.score.mean + 1e-12 for line in evaluation.lines)
    table, best = lines["baseline", "category table"], lines["bound", "category oracle"]
    assert table.score.mean <= best.score.mean
    assert oracle.gap_closed.mean == pytest.approx(1)
    assert lines["baseline", "best single"].gap_closed.mean == 0
    assert lines["bound", "category oracle"].category_gap_closed.low == pytest.approx(1)
    coe = lines["router", "coe"]
    assert coe.gap_closed.low < coe.gap_closed.mean < coe.gap_closed.high
    assert lines["router", "best_single"].versus["best single"].mean == 0
    assert lines["router", "coe"].versus["random"].low > 0
    # A router may be called like a baseline.
    assert set(lines["router", "random"].versus) == {"best single", "random", "category table"}
    assert set(lines["router", "random"].against) == {"best_single", "coe"}
    assert coe.against["random"].mean == -lines["router", "random"].against["coe"].mean
    text = as_markdown(evaluation)
    assert f"| coe | - | {coe.against['best_single'].mean:+.3f}" in text
    for figure in ("category gap", "regret", "Share of prompts", "decisions sha256"):
        assert figure in text


def test_shares_sum_to_one(fitted):
    [line, *_] = _judged(fitted).lines
    assert sum(line.shares.values()) == pytest.approx(1)


def test_cost_quality_zero_takes_the_cheapest(fitted):
    table = example_table()
    table.cards = {
        m: {"input_usd_per_mtok": p} for m, p in zip(MODELS, (3.0, 1.0, 2.0), strict=True)
    }
    decisions = decide(
        "coe", fitted["coe"], table, split="test", candidates=MODELS, cost_quality=0.0
    )
    assert set(decisions.models) == {"generalist"}
    evaluation = judge([decisions], table, split="test")
    assert evaluation.cost_unit == "expected USD"
    lines = _lines(evaluation)
    cost = lines["router", "coe"].cost
    assert cost == pytest.approx(lines["model", "generalist"].cost)
    assert cost.high < lines["model", "lawyer"].cost.low


def test_measured_costs_are_averaged(fitted):
    table = example_table()
    cells = np.tile([1.0, 2.0, 3.0], (len(table.prompts), 1))
    numbers = {"score": table.scores("all"), "cost_usd": cells}
    priced = OutcomeTable(table.prompts, models=MODELS, numbers=numbers)
    evaluation = _judged(fitted, priced)
    assert evaluation.cost_unit == "USD"
    assert _lines(evaluation)["model", "lawyer"].cost.mean == 3.0


def test_missing_scores_are_left_out_and_noted(fitted):
    table = example_table()
    scores = table.scores("all")
    scores[table.rows("test")[:30], 0] = np.nan
    evaluation = _judged(
        fitted, OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})
    )
    assert _lines(evaluation)["model", "cook"].score.n == 30
    assert evaluation.notes[0].startswith("30 of 180 scores are missing")


def test_models_outside_the_comparison_are_named(fitted):
    table = example_table()
    decisions = decide("mine", fitted["coe"], table, split="test", candidates=MODELS[1:])
    assert (
        judge([decisions], table, split="test")
        .notes[0]
        .startswith(f"left out, also by the baselines and the oracle: {MODELS[0]!r};")
    )
    assert not _judged(fitted).notes


def test_hash_is_of_the_lines_prompt_and_model():
    expected = hashlib.sha256(b"p1,a\np2,b\n").hexdigest()
    assert decisions_sha256(["p1", "p2"], ["a", "b"]) == expected


def test_decisions_and_their_hash_do_not_depend_on_scores(fitted):
    table = example_table()
    flipped = OutcomeTable(
        table.prompts,
        models=MODELS,
        numbers={"score": 1 - table.scores("all")},
        cards=table.cards,
    )
    evaluations = [_judged(fitted, t) for t in (table, flipped)]
    assert evaluations[0].decisions == evaluations[1].decisions
    assert evaluations[0].table_sha256 != evaluations[1].table_sha256


def test_pool_is_what_routers_and_table_share(fitted):
    table = example_table().restricted_to(["lawyer", "cook"])
    assert shared_pool(fitted, table) == ["cook", "lawyer"]
    assert shared_pool(fitted, table, ["lawyer"]) == ["lawyer"]
    with pytest.raises(RouterError, match="unknown model 'generalist'; known to all"):
        shared_pool(fitted, table, ["generalist"])


def test_command_prints_a_table_and_writes_every_file(folders):
    names = ("json", "quality", "decisions", "html")
    files = {name: folders / "new" / f"out.{name}" for name in names}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    result = _run(folders / "coe", "--table", folders / "table", *options)
    assert result.exit_code == 0, result.output
    assert re.search(r"^coe +60 ", result.stdout, re.MULTILINE)
    report = json.loads(files["json"].read_text())
    decisions = pq.read_table(files["decisions"]).to_pydict()
    digest = decisions_sha256(decisions["prompt_id"], decisions["model"])
    assert report["decisions_sha256"] == {"coe": digest}
    assert digest in result.stdout
    quality = pq.read_table(files["quality"])
    assert quality.column_names == ["prompt_id", "model", "quality"]
    assert quality.num_rows == 180
    assert digest in files["html"].read_text()


def test_decisions_follow_from_the_written_qualities(folders):
    quality, decisions = folders / "q.parquet", folders / "d.parquet"
    _run(folders / "coe", "--table", folders / "table", "--quality", quality,
         "--decisions", decisions)  # fmt: skip
    best: dict[str, tuple[str, float]] = {}
    for row in pq.read_table(quality).to_pylist():
        if row["quality"] > best.get(row["prompt_id"], ("", -1.0))[1]:
            best[row["prompt_id"]] = (row["model"], row["quality"])
    chosen = {row["prompt_id"]: row["model"] for row in pq.read_table(decisions).to_pylist()}
    assert chosen == {prompt: model for prompt, (model, _) in best.items()}


def test_decisions_need_no_outcomes(folders):
    with_outcomes, without = folders / "a.parquet", folders / "b.parquet"
    table = folders / "table"
    _run(folders / "coe", "--table", table, "--decisions", with_outcomes)
    (table / "outcomes.parquet").unlink()
    result = _run(folders / "coe", "--table", table, "--decisions", without)
    assert result.exit_code == 0, result.output
    assert "nothing to score" in result.stderr
    assert with_outcomes.read_bytes() == without.read_bytes()


def test_decisions_are_hashed_before_scores_are_read(folders):
    (folders / "table" / "outcomes.parquet").unlink()
    result = _run(folders / "coe", "--table", folders / "table")
    assert result.exit_code == 2
    assert "decisions sha256" in result.stderr
    assert "outcomes.parquet is missing" in result.stderr


def test_several_artefacts_share_one_report(folders):
    result = _run(folders / "coe", folders / "random", "--table", folders / "table", "--json", "-")
    report = json.loads(result.stdout)
    kinds = [line["name"] for line in report["lines"] if line["kind"] == "router"]
    assert kinds == ["coe", "random"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "no artefact at"),
        (["coe", "--split", "dev"], "unknown split 'dev'"),
        (["coe", "--cost-quality", "2"], "is not in the range 0<=x<=1"),
        (["coe", "--models", "plumber"], "unknown model 'plumber'"),
        (["coe", "random", "--decisions", "x"], "take one ARTEFACT at a time"),
        (["coe", "coe"], "is given twice"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(folders, arguments, message):
    names = ("none", "coe", "random")
    places = [folders / part if part in names else part for part in arguments]
    result = _run(*places, "--table", folders / "table")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_table_without_splits_is_judged_whole_with_a_note(fitted):
    table = example_table()
    bare = OutcomeTable(
        Prompts(table.prompts.ids, table.prompts.texts),
        models=MODELS,
        numbers={"score": table.scores("all")},
    )
    evaluation = _judged(fitted, bare)
    assert evaluation.n_prompts == 180
    assert "in hindsight" in " ".join(evaluation.notes)
    assert "By category" not in as_html(evaluation)
    assert "by category" not in as_text(evaluation)


def test_page_is_self_contained_and_escaped(fitted):
    table = example_table()
    evil = "<script>alert(1)</script>"
    prompts = Prompts(
        table.prompts.ids,
        table.prompts.texts,
        [evil if name == "law" else name for name in table.prompts.categories or ()],
        table.prompts.splits,
    )
    evaluation = _judged(
        fitted, OutcomeTable(prompts, models=MODELS, numbers={"score": table.scores("all")})
    )
    page = as_html(evaluation)
    assert "<svg" in page
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=|url\(|https?://|@import", page)


def test_json_has_no_nan(fitted):
    json.dumps(as_json(_judged(fitted)), allow_nan=False)


def test_figures_of_routers_have_their_ends(fitted):
    evaluation = _judged(fitted, names=("coe", "random"))
    coe, random = evaluation.figures["coe"], evaluation.figures["random"]
    oracle = _lines(evaluation)["bound", "oracle"].score.mean
    got = _lines(evaluation)["router", "coe"].score.mean
    assert coe.regret.mean == pytest.approx(oracle - got)
    assert coe.recall.mean > random.recall.mean
    assert coe.recall_3.mean == 1.0  # of three models
    assert coe.calibration_error < random.calibration_error
    assert coe.curve[1.0].score == pytest.approx(got)


def test_curves_need_costs(fitted):
    table = example_table()
    cards = {
        model: {"active_params_b": size} for model, size in zip(MODELS, (1, 8, 4), strict=True)
    }
    sized = OutcomeTable(
        table.prompts, models=MODELS, numbers={"score": table.scores("all")}, cards=cards
    )
    found = _judged(fitted, sized).figures["coe"]
    costs = [point.cost for point in found.curve.values()]
    assert costs == sorted(costs), "more quality never costs less"
    assert costs[0] == 1.0
    assert 0 <= found.pareto_distance.mean < 0.5
    assert 0 < found.aiq.low < found.aiq.mean < found.aiq.high < 1
    free = OutcomeTable(table.prompts, models=MODELS, numbers={"score": table.scores("all")})
    assert not _judged(fitted, free).figures["coe"].aiq.n
    assert as_json(_judged(fitted, free))["figures"]["coe"]["aiq"]["mean"] is None


def test_free_models_cost_what_policies_weigh(fitted):
    table = example_table()
    cards = {m: {"input_usd_per_mtok": 0.0, "output_usd_per_mtok": 0.0, "active_params_b": size}
             for m, size in zip(MODELS, (1, 8, 4), strict=True)}  # fmt: skip
    tokens = np.ones(table.scores("all").shape)
    numbers = {"score": table.scores("all"), "input_tokens": tokens, "output_tokens": tokens}
    free = OutcomeTable(table.prompts, models=MODELS, numbers=numbers, cards=cards)
    assert _judged(fitted, free).cost_unit == "active params (B)"


def test_a_model_without_scores_or_all_without_success_spoil_nothing(fitted):
    table = example_table()
    cards = {m: {"active_params_b": size} for m, size in zip(MODELS, (1, 8, 4), strict=True)}
    test = table.rows("test")
    for models, score in ((slice(1), np.nan), (slice(3), 0.0)):
        scores = table.scores("all")
        scores[test, models] = score
        found = _judged(
            fitted,
            OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores}, cards=cards),
        )
        assert not found.figures["coe"].perf_gain.n
        assert as_text(found)
        assert as_html(found)
        assert all(not line.gap_closed.mean > 1 for line in found.lines)
    scores[test] = table.scores("test")
    scores[test[::2], 0] = np.nan
    partly = _judged(fitted, OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores}))
    assert all(not line.gap_closed.mean > 1 + 1e-12 for line in partly.lines)


def test_wasting_money_gains_no_area(fitted):
    table = example_table()
    table.cards = {m: {"active_params_b": size} for m, size in zip(MODELS, (1, 8, 4), strict=True)}
    evaluation = _judged(fitted, table, names=("coe", "best_single"))
    dearest = max(line.cost.mean for line in evaluation.lines if line.kind == "model")
    for found in evaluation.figures.values():
        curve = list(found.curve.values())
        assert found.aiq.mean == pytest.approx(aiq([*curve, Point(dearest, 0.0)]))
        assert found.aiq.low < found.aiq.mean < found.aiq.high


def test_two_models_get_the_metrics_of_strong_and_weak(fitted):
    table = example_table()
    pair = ["cook", "lawyer"]
    made = [decide("coe", fitted["coe"], table, split="test", candidates=pair)]
    found = judge(made, table, split="test").figures["coe"]
    assert found.apgr.mean > 0.5
    assert found.apgr.low < found.apgr.mean < found.apgr.high
    assert 0 < found.cpt_50.mean <= found.cpt_80.mean <= 1
    assert found.pgr.mean > 1, "the weak one is right where the strong one is not"
    assert not _judged(fitted).figures["coe"].apgr.n
