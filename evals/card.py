"""Cards: what a fitted router is, what it was made from, and how well it does, as Markdown.

Written from the manifest, an evaluation and the ``README.md`` of the outcome table, which says
where the data come from, under which licence, and what they do not tell. Has no time stamp: the
same artefact and table give the same card. Prints nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from evals.decisions import Decisions
from evals.evaluate import Evaluation
from evals.metrics import bootstrap_mean
from evals.report import LEGEND, line_rows, markdown_table, with_interval
from routers.artefact import Manifest
from routers.category_classifier import expected_calibration_error
from routers.registry import get_router_class

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["as_card"]

# Familiarity is spread evenly over [0, 1] on prompts like those of the fit.
STRANGE = 0.01
# The fenced blocks of Markdown, whose lines are no headings, or where a heading begins.
FENCE_OR_HEADING = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,})[^`\n]*$.*?(?:^ {0,3}(?P=fence)[`~]*[ \t]*$|\Z)|^(?=#+ )",
    re.DOTALL | re.MULTILINE,
)


def as_card(manifest: Manifest, decisions: Decisions, evaluation: Evaluation, about: str) -> str:
    """The card of one router.

    Args:
        manifest: Of its artefact.
        decisions: What it decided on the prompts judged on.
        evaluation: What these decisions are worth.
        about: What the outcome table's ``README.md`` says; empty if it has none.
    """
    parts = [
        f"# {decisions.name}",
        (get_router_class(manifest.method).__doc__ or "").strip().split("\n\n")[0],
        markdown_table([["", ""], *_facts(manifest)]),
        "## Metrics",
        *_metrics(manifest, decisions, evaluation),
        "## The data",
        # Its headings become those of parts of this section.
        FENCE_OR_HEADING.sub(lambda found: found[0] or "##", about.strip())
        or "The outcome table has no README.md.",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(manifest: Manifest) -> Iterator[Sequence[str]]:
    encoder = manifest.encoder
    params = {name: value for name, value in manifest.params.items() if value is not None}
    yield "method", f"`{manifest.method}`, Collegium {manifest.collegium_version}"
    yield "predicts for", ", ".join(f"`{name}`" for name in manifest.models)
    if manifest.categories:
        yield "categories", ", ".join(f"`{name}`" for name in manifest.categories)
    if encoder:
        yield "encoder", f"`{encoder.name}`, revision `{encoder.revision}`"
    yield "made by", f"`{manifest.created_with}`"
    yield "parameters", f"`{json.dumps(params, ensure_ascii=False)}`"
    yield "fitted on", f"split `{manifest.split}` of the table with hash `{manifest.table_sha256}`"
    if manifest.updates:
        yield "updated", f"{len(manifest.updates)} times since; see `manifest.json`"
    yield "hash of its arrays", f"`{manifest.arrays_sha256}`"


def _metrics(manifest: Manifest, decisions: Decisions, evaluation: Evaluation) -> Iterator[str]:
    fitted_on_it = evaluation.table_sha256 == manifest.table_sha256
    table = "the table it was fitted on" if fitted_on_it else "another table than it was fitted on"
    yield (
        f"{evaluation.n_prompts} prompts of split `{evaluation.split}` of {table}; policy "
        f"`{evaluation.policy.type}` at cost-quality {evaluation.cost_quality:g}; intervals of "
        "95 %, by bootstrap. Hash of the decisions, frozen before a score was read: "
        f"`{decisions.sha256}`."
    )
    # Without the last column: what an answer costs says nothing of the router.
    kinds = ["", *(line.kind for line in evaluation.lines)]
    rows = zip(kinds, line_rows(evaluation), strict=True)
    yield markdown_table([row[:-1] for kind, row in rows if kind != "model"])
    yield (
        f"Score: of the answers of the models chosen; {LEGEND}. Expected calibration error of the "
        "predicted quality: "
        f"{with_interval(evaluation.figures[decisions.name].calibration_error)}."
    )
    naming = _naming(decisions)
    if naming:
        yield "How well it names the category:"
        yield markdown_table([["", ""], *naming])
    if decisions.prompts.categories is not None:
        yield markdown_table(_by_category(decisions, evaluation, named=bool(naming)))
    yield from (f"Note: {note}." for note in evaluation.notes)


def _naming(decisions: Decisions) -> list[list[str]]:
    """How well it names the categories; empty if it names none of those of the table."""
    import numpy as np

    known = decisions.prompts.categories or []
    found = [explanation.category for explanation in decisions.explanations]
    if not set(known) & set(found):
        return []
    right = np.array([a == b for a, b in zip(known, found, strict=True)], np.float64)
    rows = [["names the true category", _mean(right)]]
    confidence = [explanation.confidence for explanation in decisions.explanations]
    if None not in confidence:
        error = expected_calibration_error(np.array(confidence, np.float64), right)
        rows.append(["expected calibration error of its confidence", f"{error:.3f}"])
    details = [explanation.detail for explanation in decisions.explanations]
    if all("likely" in detail for detail in details):
        held = [name in detail["likely"] for name, detail in zip(known, details, strict=True)]
        rows.append(["its `likely` categories hold the true one", _mean(held)])
        rows.append(["how many are `likely`", _mean([len(d["likely"]) for d in details])])
    if all("familiarity" in detail for detail in details):
        strange = [detail["familiarity"] < STRANGE for detail in details]
        rows.append([f"share of prompts with a `familiarity` below {STRANGE}", _mean(strange)])
    return rows


def _by_category(decisions: Decisions, evaluation: Evaluation, *, named: bool) -> list[list[str]]:
    """Scores, and what it takes each category for if it names any; the head first."""
    router = evaluation.lines[0]
    single = next(line for line in evaluation.lines if line.name == "best single")
    header = ["category", "n", "score", "best single"]
    rows = [
        [category, str(estimate.n), *map(with_interval, (estimate, single.by_category[category]))]
        for category, estimate in router.by_category.items()
    ]
    if named:
        header += ["named rightly", "else mostly taken for"]
        for row in rows:
            row += _taken_for(row[0], decisions)
    return [header, *rows]


def _taken_for(category: str, decisions: Decisions) -> list[str]:
    known = decisions.prompts.categories or []
    found = [
        str(explanation.category)
        for name, explanation in zip(known, decisions.explanations, strict=True)
        if name == category
    ]
    wrong = [name for name in found if name != category]
    most = max(sorted(set(wrong)), key=wrong.count, default="")
    return [
        _mean([name == category for name in found]),
        f"{most} ({wrong.count(most)})" if wrong else "",
    ]


def _mean(values: Sequence[float] | NDArray[np.float64]) -> str:
    import numpy as np

    return with_interval(bootstrap_mean(np.array(values, np.float64)))
