from __future__ import annotations

import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routers.outcomes import OutcomeTable, Prompts, TableError

PROMPTS = {
    "prompt_id": ["a", "b", "c"],
    "text": ["one", "two", "three"],
    "category": ["x", "y", "x"],
    "split": ["train", "test", "test"],
}
OUTCOMES: dict[str, list[object]] = {
    "prompt_id": ["a", "a", "b", "c"],
    "model": ["m", "n", "m", "n"],
    "score": [1.0, 0.5, 0.0, 0.25],
    "input_tokens": [10, 20, 30, 40],
    "output_tokens": [1, 2, 3, 4],
}
CARDS = {
    "n": {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 10.0},
    "m": {"active_params_b": 7.2, "surplus": "ignored"},
}


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, PROMPTS, OUTCOMES)
    (tmp_path / "models.json").write_text(json.dumps(CARDS))
    return tmp_path


def _write(folder, prompts=None, outcomes=None):
    if prompts is not None:
        pq.write_table(pa.table(prompts), folder / "prompts.parquet")
    if outcomes is not None:
        pq.write_table(pa.table(outcomes), folder / "outcomes.parquet")


def test_scores_are_a_matrix_with_nan_for_missing_rows(folder):
    table = OutcomeTable.load(folder)
    assert table.models == ["n", "m"]
    assert np.array_equal(
        table.scores("all"), [[0.5, 1.0], [np.nan, 0.0], [0.25, np.nan]], equal_nan=True
    )
    assert np.array_equal(table.scores("test", ["m"]), [[0.0], [np.nan]], equal_nan=True)


def test_costs_come_from_tokens_and_prices(folder):
    costs = OutcomeTable.load(folder).costs_usd("all", ["n", "m"])
    assert costs[0, 0] == pytest.approx((20 * 1 + 2 * 10) / 1e6)
    assert np.isnan(costs[:, 1]).all()


def test_stated_costs_win_over_computed_ones(folder):
    _write(folder, outcomes={**OUTCOMES, "cost_usd": [None, 0.5, None, None]})
    costs = OutcomeTable.load(folder).costs_usd("all", ["n"])
    assert costs[0, 0] == 0.5
    assert costs[2, 0] == pytest.approx((40 * 1 + 4 * 10) / 1e6)


def test_prompts_can_be_read_without_outcomes(folder):
    (folder / "outcomes.parquet").unlink()
    table = OutcomeTable.load(folder)
    assert table.with_prompts_of("test").texts == ["two", "three"]
    assert not table.has_outcomes
    with pytest.raises(TableError, match=r"outcomes\.parquet is missing"):
        table.scores("test")


def test_write_and_load_keep_contents_and_hash(folder, tmp_path):
    table = OutcomeTable.load(folder)
    table.write(tmp_path / "copy")
    copy = OutcomeTable.load(tmp_path / "copy")
    assert copy.sha256 == table.sha256
    assert copy.prompts == table.prompts
    assert np.array_equal(copy.scores("all"), table.scores("all"), equal_nan=True)


def test_hash_ignores_the_order_of_rows_of_outcomes_but_sees_scores(folder):
    before = OutcomeTable.load(folder).sha256
    _write(folder, outcomes={name: column[::-1] for name, column in OUTCOMES.items()})
    assert OutcomeTable.load(folder).sha256 == before
    _write(folder, outcomes={**OUTCOMES, "score": [1.0, 0.5, 0.1, 0.25]})
    assert OutcomeTable.load(folder).sha256 != before


def test_writing_over_a_table_leaves_no_old_cards(folder, tmp_path):
    bare = OutcomeTable(Prompts(["a"], ["t"]), models=["m"], numbers={"score": np.ones((1, 1))})
    bare.write(folder)
    assert OutcomeTable.load(folder).cards == {}


def test_table_without_splits_uses_all_prompts_for_any_split(folder):
    _write(folder, prompts={name: PROMPTS[name] for name in ("prompt_id", "text")})
    table = OutcomeTable.load(folder)
    assert len(table.rows("test")) == len(table.rows("train")) == 3
    assert not table.has_split("train")


def test_dictionary_encoded_columns_are_read(folder):
    encoded = pa.table(OUTCOMES)
    column = encoded["model"].dictionary_encode()
    pq.write_table(encoded.set_column(1, "model", column), folder / "outcomes.parquet")
    assert OutcomeTable.load(folder).models == ["n", "m"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "prompts.parquet: column 'text' is missing; it has 'prompt_id'"),
        ({"prompt_id": ["a", "b", "a"]}, "column 'prompt_id', row 2: 'a' is already in row 0"),
        ({"prompt_id": [1, 2, 3]}, "column 'prompt_id' must be text, not int64"),
        ({"text": ["one", None, "x"]}, "column 'text', row 1: empty"),
        ({"split": ["train", "dev", "test"]}, "column 'split', row 1: 'dev' is none of 'train'"),
    ],
)
def test_bad_prompts_are_refused_in_one_line(folder, change, message):
    columns = {name: column for name, column in {**PROMPTS, **change}.items() if column}
    _write(folder, prompts=columns)
    with pytest.raises(TableError) as caught:
        OutcomeTable.load(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": None}, "outcomes.parquet: column 'score' is missing"),
        ({"score": [1.0, 0.5, 1.5, 0.0]}, "column 'score', row 2: 1.5 is outside [0, 1]"),
        ({"score": [1.0, None, 0.5, 0.0]}, "column 'score', row 1: nan is outside [0, 1]"),
        ({"score": ["1", "1", "1", "1"]}, "column 'score' must be numbers, not string"),
        ({"prompt_id": ["a", "a", "z", "c"]}, "row 2: 'z' is not in prompts.parquet"),
        ({"model": ["m", "m", "m", "n"]}, "row 1: prompt 'a' already has an outcome of 'm'"),
        ({"input_tokens": [1, 2, 3, -4]}, "column 'input_tokens', row 3: -4 is outside [0, inf)"),
    ],
)
def test_bad_outcomes_are_refused_in_one_line(folder, change, message):
    columns = {name: column for name, column in {**OUTCOMES, **change}.items() if column}
    _write(folder, outcomes=columns)
    with pytest.raises(TableError) as caught:
        OutcomeTable.load(folder).scores("all")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "models.json cannot be read as JSON"),
        ("[]", "models.json must be an object of models, not list"),
        ('{"m": 3}', "models.json: 'm' must be an object, not int"),
        ('{"m": {"input_usd_per_mtok": -1}}', "models.json: 'm': input_usd_per_mtok: Input should"),
    ],
)
def test_bad_cards_are_refused(folder, text, message):
    (folder / "models.json").write_text(text)
    with pytest.raises(TableError) as caught:
        OutcomeTable.load(folder)
    assert message in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(TableError, match="not a folder"):
        OutcomeTable.load(tmp_path / "nowhere")
    with pytest.raises(TableError, match=r"prompts.parquet is missing"):
        OutcomeTable.load(tmp_path)
    (tmp_path / "prompts.parquet").write_text("no parquet")
    with pytest.raises(TableError, match=r"prompts.parquet cannot be read as parquet"):
        OutcomeTable.load(tmp_path)


def test_unknown_splits_and_models_name_the_known_ones(folder):
    table = OutcomeTable.load(folder)
    with pytest.raises(TableError, match="no prompts of split 'validation'; it has 'test', 'tra"):
        table.rows("validation")
    with pytest.raises(TableError, match="unknown split 'dev'; known: 'train'"):
        table.rows("dev")
    with pytest.raises(TableError, match="no model 'o'; it has 'n', 'm'"):
        table.scores("all", ["o"])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"score": np.full((3, 2), 2.0)}, "outside"),
        ({"score": np.ones((2, 2))}, "shape"),
        ({"cost_usd": np.ones((3, 2))}, "must be 'score'"),
    ],
)
def test_tables_in_memory_are_checked_too(numbers, message):
    with pytest.raises(TableError, match=message):
        OutcomeTable(Prompts(["a", "b", "c"], ["t"] * 3), models=["m", "n"], numbers=numbers)


def test_two_hundred_thousand_rows_load_fast(tmp_path):
    ids = [f"p{i}" for i in range(10_000)]
    scores = np.random.default_rng(0).random((10_000, 20))
    models = [f"m{j}" for j in range(20)]
    OutcomeTable(Prompts(ids, ids), models=models, numbers={"score": scores}).write(tmp_path)
    started = time.perf_counter()
    loaded = OutcomeTable.load(tmp_path).scores("all")
    assert time.perf_counter() - started < 5
    assert np.array_equal(loaded, scores)


def test_rows_get_new_splits_and_keep_all_their_numbers(folder):
    table = OutcomeTable.load(folder)
    made = table.resplit({"train": np.array([2, 1]), "test": np.array([0])})
    assert made.prompts.ids == ["c", "b", "a"]
    assert made.prompts.splits == ["train", "train", "test"]
    assert np.array_equal(made.scores("train"), table.scores("all")[[2, 1]], equal_nan=True)
    assert np.array_equal(made.costs_usd("test"), table.costs_usd("all")[[0]], equal_nan=True)
    assert made.cards == table.cards
