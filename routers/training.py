"""What fitting needs and serving does not: score tables, extra texts."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routers.base import RouterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "clearly_above",
    "overall_means",
    "read_labelled_texts",
    "read_texts",
    "shrunken_means",
    "texts_facts",
]


def shrunken_means(
    scores: NDArray[np.float64], labels: NDArray[np.intp], n_groups: int, shrinkage: float
) -> NDArray[np.float64]:
    """Mean scores by group, shrunken towards each model's mean; the last row is that mean.

    Args:
        scores: Shape (n_prompts, n_models), NaN for missing cells. A model without any score has
            the mean 0.
        labels: Group of each prompt; may go on with those of texts without scores.
        n_groups: Number of groups.
        shrinkage: Weight of the model's mean, in prompts.

    Returns:
        Shape (n_groups + 1, n_models).
    """
    import numpy as np

    present = ~np.isnan(scores)
    filled = np.where(present, scores, 0.0)
    means = filled.sum(axis=0) / np.maximum(present.sum(axis=0), 1)
    members = np.zeros((len(scores), n_groups))
    members[np.arange(len(scores)), labels[: len(scores)]] = 1.0
    count, total = members.T @ present, members.T @ filled
    shrunken = (total + shrinkage * means) / np.maximum(count + shrinkage, 1e-12)
    return np.vstack([np.where(count > 0, shrunken, means), means])


def overall_means(
    scores: NDArray[np.float64], categories: Sequence[str] | None
) -> NDArray[np.float64]:
    """Each model's mean score, as far as can be told as if it had been asked every prompt.

    Where cells are missing by category, as after ``collect --active``, the mean of those that exist
    flatters a specialist. So a model that lacks cells gets the mean over categories, weighed by
    their numbers of prompts. In a category where it has no cell it is given the lowest mean of any
    model there, so that nobody gains by not being asked. Categories without any score do not count.

    Args:
        scores: Shape (n_prompts, n_models), NaN for missing cells.
        categories: True category of each prompt; none gives the means of the cells that exist.

    Returns:
        Shape (n_models,), 0 for models without any score.
    """
    import numpy as np

    present = ~np.isnan(scores)
    filled = np.where(present, scores, 0.0)
    counts = present.sum(axis=0)
    plain = filled.sum(axis=0) / np.maximum(counts, 1)
    partly = (counts > 0) & (counts < len(scores))
    if categories is None or not partly.any():
        return np.asarray(plain)
    labels = np.unique(np.array(categories), return_inverse=True)[1]
    members = (labels[:, None] == np.arange(labels.max() + 1)).astype(np.float64)
    cells = members.T @ present
    means = np.where(cells > 0, members.T @ filled / np.maximum(cells, 1), np.inf)
    lowest = means.min(axis=1)
    scored = np.isfinite(lowest)
    means = np.where(cells > 0, means, lowest[:, None])[scored]
    weighed = np.average(means, axis=0, weights=members.sum(axis=0)[scored])
    return np.where(partly, weighed, plain)


def clearly_above(
    values: NDArray[np.float64], others: NDArray[np.float64], tolerance: float = 1.0
) -> bool:
    """Whether scores of the same prompts differ by more than so many standard errors.

    Prompts with a missing score (NaN) do not count.
    """
    import numpy as np

    difference = values - others
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2:
        return False
    error = float(difference.std(ddof=1)) / len(difference) ** 0.5
    return bool(difference.mean() > tolerance * error)


def read_texts(path: str) -> list[str]:
    """Texts of a JSON-lines file of objects with ``text``."""
    try:
        # Not splitlines: JSON texts may hold U+2028 and its like, which it takes for line ends.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise RouterError(f"general_texts: cannot read {path}: {exc}") from exc
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise RouterError(f"general_texts: {path}, line {number}: no object with a text 'text'")
        texts.append(text)
    return texts


def read_labelled_texts(path: str) -> tuple[list[str], list[str]]:
    """Texts and their categories from a CSV file with the columns ``text`` and ``category``."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if "text" not in columns or "category" not in columns:
                raise RouterError(
                    f"categories: {path} needs the columns 'text' and 'category' in its first "
                    f"line; it has {', '.join(map(repr, columns)) or 'none'}"
                )
            rows = [(reader.line_num, row["text"], row["category"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise RouterError(
            f"categories: cannot read {path}: {exc}; give 'table', 'domains', 'clusters', a "
            "CSV file or an artefact's folder"
        ) from exc
    for line, text, category in rows:
        if not text or not category:
            raise RouterError(f"categories: {path}, line {line}: text or category is empty")
    if not rows:
        raise RouterError(f"categories: {path} has no rows")
    return [text for _, text, _ in rows], [category for _, _, category in rows]


def texts_facts(texts: Sequence[str]) -> dict[str, Any]:
    """Number and hash of further texts, for the manifest; nothing if there are none."""
    if not texts:
        return {}
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return {"general_texts": len(texts), "general_texts_sha256": digest}
