"""Several routers, weighed by what they got right on prompts they had not learnt from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from routers.base import Explanation, Query, RouterError
from routers.calibration import fit_platt, sigmoid
from routers.category_classifier import expected_calibration_error
from routers.combined import CombinedRouter, fit_member, make_member
from routers.fitted import TrainingRows
from routers.folds import stratified_folds
from routers.params import check_count, check_number
from routers.training import clearly_above

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BlendRouter"]

# Simplest first: of candidates that do equally well, the earliest is taken.
MEMBERS = (
    "coe",
    "kmeans",
    "uniroute",
    "ridge penalty=30",
    "knn k=80",
    "nexus",
)
GREEDY_ROUNDS = 20
LEAST_QUALITY = 1e-4
LEAST_SLOPE = 1e-2


class BlendRouter(CombinedRouter):
    """Chooses among routers and mixtures of them by held-out utility.

    Every member is cross-validated on the training rows. Candidates are each member alone, their
    plain mean, the mixture of least squared error, and the mixture that greedy selection finds;
    mixtures are judged on folds their weights have not seen. The simplest candidate is taken whose
    mean score is not clearly below the best one's (by more than ``tolerance`` standard errors of
    their difference). The numbers behind the choice are in the artefact's metrics.

    What is taken is then calibrated on the same held-out predictions: quality becomes the share of
    answers that were right where so much was predicted. The order of models stays.

    Args:
        members: Routers, simplest first, each as ``"METHOD KEY=VALUE ..."``. Those that need
            categories are left out if the table has none, and those that leave out models.
        folds: Number of folds.
        tolerance: Standard errors within which candidates count as equally good. More than one,
            because the best of ten candidates owes some of its lead to luck.
        random_state: Seed of the folds.

    References:
        Caruana et al., "Ensemble Selection from Libraries of Models" (ICML 2004) for the greedy
        mixture; Breiman et al., "Classification and Regression Trees" (1984) for the rule of one
        standard error; Platt, "Probabilistic Outputs for Support Vector Machines" (1999) for the
        calibration.
    """

    method = "blend"
    slope_: float
    intercept_: float
    numbers = ("slope", "intercept")

    def __init__(
        self,
        *,
        members: Sequence[str] = MEMBERS,
        folds: int = 5,
        tolerance: float = 2.0,
        random_state: int = 0,
    ) -> None:
        self.members = list(members) if isinstance(members, list | tuple) else members
        self.folds = folds
        self.tolerance = tolerance
        self.random_state = random_state

    def _check_params(self) -> None:
        if not isinstance(self.members, list) or not self.members:
            raise RouterError(
                'blend: members must be a list such as ["kmeans", "ridge penalty=30"], '
                f"not {self.members!r}"
            )
        for text in self.members:
            make_member(text)._check_params()
        check_count(self, "folds", self.folds, 2)
        check_number(self, "tolerance", self.tolerance, 0)
        check_count(self, "random_state", self.random_state, 0)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np

        fold_of = stratified_folds(np.zeros(len(rows), np.intp), self.folds, self.random_state)
        names, held_out, skipped = [], [], {}
        folds = len(np.unique(fold_of))
        total = len(self.members) * folds
        with tqdm(total=total, desc=self.method, unit="fold", delay=2, file=sys.stderr) as bar:
            for number, text in enumerate(self.members, 1):
                # A refresh would show the bar at once, whatever its delay.
                bar.set_postfix_str(text, refresh=False)
                try:
                    held_out.append(_held_out(text, rows, fold_of, bar))
                    names.append(text)
                except RouterError as error:
                    skipped[text] = str(error)
                bar.update(number * folds - bar.n)
        if not names:
            raise RouterError(f"no member can learn from this table: {'; '.join(skipped.values())}")
        predictions = np.array(held_out)
        makers = _candidates(names)
        scored = {
            name: _nested(make, predictions, rows.scores, fold_of) for name, make in makers.items()
        }
        means = {name: _mean(values) for name, values in scored.items()}
        best = max(means, key=lambda name: means[name])
        taken = next(
            name
            for name, values in scored.items()
            if not clearly_above(scored[best], values, self.tolerance)
        )
        weights = makers[taken](predictions, rows.scores)
        used = [number for number, weight in enumerate(weights) if weight > 0]
        self.members_ = [fit_member(names[number], rows, np.arange(len(rows))) for number in used]
        self.weights_ = weights[used] / weights[used].sum()
        mixed = np.tensordot(self.weights_, predictions[used], axes=1)
        slope, biases = fit_platt(_logit(mixed).reshape(-1, 1), rows.scores.reshape(-1, 1))
        # A slope of 0 would make all models alike.
        self.slope_, self.intercept_ = max(slope, LEAST_SLOPE), float(biases[0])
        cells = ~np.isnan(rows.scores)
        calibrated = self._calibrated(mixed)
        self.metrics_ = {
            "held_out_ece": expected_calibration_error(mixed[cells], rows.scores[cells]),
            "held_out_ece_calibrated": expected_calibration_error(
                calibrated[cells], rows.scores[cells]
            ),
            "chosen": taken,
            "reason": f"the simplest within {self.tolerance:g} standard errors of {best!r}",
            "held_out_score": means[taken],
            "held_out_scores": {name: round(mean, 6) for name, mean in means.items()},
            "weights": {names[number]: round(float(weights[number]), 6) for number in used},
            "skipped": skipped,
        }

    def _predict_one(self, given: Any) -> tuple[NDArray[np.floating], Explanation]:
        quality, explanation = super()._predict_one(given)
        return self._calibrated(quality), explanation

    def _calibrated(self, quality: NDArray[np.floating]) -> NDArray[np.floating]:
        return sigmoid(self.slope_ * _logit(quality) + self.intercept_)


def _logit(quality: NDArray[np.floating]) -> NDArray[np.float64]:
    import numpy as np

    safe = np.clip(quality.astype(np.float64), LEAST_QUALITY, 1 - LEAST_QUALITY)
    return np.asarray(np.log(safe / (1 - safe)))


def _held_out(
    text: str, rows: TrainingRows, fold_of: NDArray[np.intp], bar: tqdm[NoReturn]
) -> NDArray[np.float64]:
    """A member's predictions for each row by one that has not seen it, (n_rows, n_models)."""
    import numpy as np

    quality = np.full(rows.scores.shape, np.nan)
    for fold in np.unique(fold_of):
        inside = np.flatnonzero(fold_of == fold)
        learn = np.flatnonzero(fold_of != fold)
        member = fit_member(text, rows, learn if len(learn) else inside)
        columns = [rows.models.index(name) for name in member.models]
        queries = [Query(rows.texts[row]) for row in inside]
        quality[inside[:, None], columns] = member.predict(queries, member.models).quality
        bar.update()
    means = np.nanmean(rows.scores, axis=0)
    return np.where(np.isnan(quality), means, quality)


def _candidates(names: Sequence[str]) -> dict[str, Any]:
    """Weights as functions of held-out predictions and scores, simplest first."""
    import numpy as np

    def alone(number: int) -> Any:
        return lambda predictions, scores: np.eye(len(names))[number]

    candidates: dict[str, Any] = {name: alone(number) for number, name in enumerate(names)}
    if len(names) > 1:
        candidates["mean of all"] = lambda predictions, scores: np.full(len(names), 1 / len(names))
        candidates["least squares"] = _least_squares
        candidates["greedy"] = _greedy
    return candidates


def _least_squares(
    predictions: NDArray[np.float64], scores: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights of least squared error, none negative, sum 1."""
    import numpy as np
    from scipy.optimize import nnls

    present = ~np.isnan(scores)
    weights, _ = nnls(predictions[:, present].T, scores[present])
    return weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1 / len(weights))


def _greedy(predictions: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights by adding, again and again, the member that helps the decisions most."""
    import numpy as np

    counts = np.zeros(len(predictions))
    total = np.zeros(scores.shape)
    best_counts, best = np.ones(len(predictions)), -1.0
    for _ in range(GREEDY_ROUNDS):
        reached = [_mean(_got(total + one, scores)) for one in predictions]
        number = int(np.argmax(reached))
        counts = counts + np.eye(len(predictions))[number]
        total = total + predictions[number]
        if reached[number] > best + 1e-12:
            best, best_counts = reached[number], counts
    return np.asarray(best_counts / best_counts.sum())


def _got(quality: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The score of each row's predicted best model; NaN where it was not run."""
    import numpy as np

    return np.asarray(scores[np.arange(len(scores)), quality.argmax(axis=1)])


def _mean(values: NDArray[np.float64]) -> float:
    """Mean score; -1, less than any, where nothing that was chosen was run."""
    import numpy as np

    return float(np.nanmean(values)) if not np.isnan(values).all() else -1.0


def _nested(
    make: Any,
    predictions: NDArray[np.float64],
    scores: NDArray[np.float64],
    fold_of: NDArray[np.intp],
) -> NDArray[np.float64]:
    """Scores of the decisions with weights from the other folds."""
    import numpy as np

    got = np.full(len(scores), np.nan)
    for fold in np.unique(fold_of):
        inside = fold_of == fold
        weights = make(predictions[:, ~inside], scores[~inside])
        mixed = np.tensordot(weights, predictions[:, inside], axes=1)
        got[inside] = _got(mixed, scores[inside])
    return got
