"""The page is whole, safe to open, and says what the evaluation says."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from evals.decisions import decide
from evals.evaluate import judge
from evals.html_report import as_html
from evals.svg import Plot, _ticks
from routers.baselines import BestSingleRouter
from routers.kmeans import KMeansRouter
from routers.outcomes import OutcomeTable, Prompts
from routers.testing import MODELS, example_table


def _page(table=None):
    table = table or example_table()
    cards = {m: {"active_params_b": size} for m, size in zip(MODELS, (1.0, 8.0, 4.0), strict=True)}
    sized = OutcomeTable(
        table.prompts, models=MODELS, numbers={"score": table.scores("all")}, cards=cards
    )
    routers = {"k": KMeansRouter(encoder="hashing"), "best": BestSingleRouter()}
    made = [
        decide(name, router.fit(sized), sized, split="test", candidates=MODELS)
        for name, router in routers.items()
    ]
    return as_html(judge(made, sized, split="test"))


def test_every_picture_is_well_formed_and_loads_nothing():
    page = _page()
    pictures = page.split("<svg")[1:]
    assert len(pictures) == 3
    for picture in pictures:
        ElementTree.fromstring("<svg" + picture.partition("</svg>")[0] + "</svg>")
    assert "<script" not in page
    assert "src=" not in page
    assert "http" not in page


@pytest.mark.parametrize(
    "part", ["Cost and quality", "Calibration", "Whom k asks", "Worst decisions of k"]
)
def test_parts(part):
    assert part in _page()


def test_prompts_are_shown_as_text_whatever_they_hold():
    table = example_table()
    texts = ["<script>alert(1)</script> " + "x" * 900 for _ in table.prompts.texts]
    prompts = Prompts(table.prompts.ids, texts, table.prompts.categories, table.prompts.splits)
    scores = table.scores("all")
    scores[:, 0] = 1 - scores[:, 2]
    page = _page(OutcomeTable(prompts, models=MODELS, numbers={"score": scores}))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "x" * 500 not in page


def test_a_plot_needs_no_spread():
    plot = Plot("t", "x", "y", [2.0], [0.5])
    plot.dot(2.0, 0.5, "#000", "a & b")
    plot.level(float("nan"), "nothing")
    assert "a &amp; b" in plot.figure([])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.1, 0.13), (-3.0, 5e4), (7.0, 7.0)])
def test_ticks_are_round_and_span_the_values(low, high):
    ticks = _ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 9
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_a_plot_can_be_a_file_of_its_own():
    plot = Plot("Cost & quality", "x", "y", [0.0, 2.0], [0.0, 1.0])
    plot.line([(0.0, 0.0), (2.0, 1.0)], "#000000", ["a", "b"])
    page = ElementTree.fromstring(plot.document([("knn < coe", "#000000")]))
    said = [node.text for node in page.iter("{http://www.w3.org/2000/svg}text")]
    assert "Cost & quality" in said
    assert "■ knn < coe" in said


def test_names_of_dots_in_one_place_stand_apart():
    plot = Plot("Title", "x", "y", [0.0, 1.0], [0.0, 1.0])
    for name in ("first", "second", "third", "fourth"):
        plot.dot(0.5, 0.5, "#000", name)
    names = re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(start|end)">(\w{5,})<', plot.document([])
    )
    assert {name for *_, name in names} == {"first", "second", "third", "fourth"}
    for side in ("start", "end"):
        heights = sorted(float(y) for _, y, anchor, _ in names if anchor == side)
        assert all(after - before >= 12 for before, after in pairwise(heights))
