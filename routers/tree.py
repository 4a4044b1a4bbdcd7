"""A shallow tree of readable questions about a prompt, each leaf with the models' mean scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from tqdm import tqdm

from routers.base import Explanation, Query, RouterError
from routers.encoders.surface import SURFACE_FEATURES, surface_features
from routers.fitted import FittedRouter, TrainingRows
from routers.params import check_count, check_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TreeRouter"]


class TreeRouter(FittedRouter):
    """Splits prompts by length, code, maths, options, language and the like, then averages.

    A split stays only if, on held-out prompts, choosing the best model on each side of it scores
    better than choosing one for both. The rules are readable: ``rules()``, and ``rules`` among the
    artefact's metrics.

    Args:
        max_depth: Greatest number of questions on the way to a leaf.
        min_prompts: Least number of prompts in a leaf.
        shrinkage: Number of prompts with the model's mean score that each leaf's mean is mixed
            with.
        random_state: Seed of the held-out share.

    Attributes:
        features_: Position of the feature that each node asks for, -1 in leaves, shape (n_nodes,).
        limits_: Up to which value a prompt goes left, shape (n_nodes,).
        lefts_, rights_: Positions of the children, shape (n_nodes,).
        quality_: Mean scores at each node, shape (n_nodes, n_models).

    References:
        Abels et al., "Expertise Trees Resolve Knowledge Limitations in Collective Decision-Making"
        (arXiv:2305.01063): split only where separate models improve. Departs from it in learning
        from a table at once instead of online, and in growing the tree first (scikit-learn's CART)
        and pruning it after.
    """

    method = "tree"
    arrays: ClassVar = {
        "features": ("nodes",),
        "limits": ("nodes",),
        "lefts": ("nodes",),
        "rights": ("nodes",),
        "quality": ("nodes", "models"),
    }

    def __init__(
        self,
        *,
        max_depth: int = 4,
        min_prompts: int = 50,
        shrinkage: float = 20.0,
        random_state: int = 0,
    ) -> None:
        self.max_depth = max_depth
        self.min_prompts = min_prompts
        self.shrinkage = shrinkage
        self.random_state = random_state

    def _check_params(self) -> None:
        check_count(self, "max_depth", self.max_depth, 1)
        check_count(self, "min_prompts", self.min_prompts, 1)
        check_number(self, "shrinkage", self.shrinkage, 0)
        check_count(self, "random_state", self.random_state, 0)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np
        from sklearn.tree import DecisionTreeRegressor

        texts = tqdm(rows.texts, desc="reading", unit="text", delay=2, leave=False)
        inputs = np.array([surface_features(text) for text in texts], np.float32)
        means = np.nanmean(rows.scores, axis=0)
        filled = np.where(np.isnan(rows.scores), means, rows.scores)
        grow = np.random.default_rng(self.random_state).random(len(rows)) < 2 / 3
        if grow.all() and len(grow) > 1:
            grow[0] = False
        if not grow.any():
            grow[0] = True
        model = DecisionTreeRegressor(
            max_depth=self.max_depth,
            min_samples_leaf=min(self.min_prompts, max(1, int(grow.sum()) // 2)),
            random_state=self.random_state,
        ).fit(inputs[grow], filled[grow])
        tree = model.tree_
        self.features_ = np.asarray(tree.feature, np.int64)
        self.limits_ = np.asarray(tree.threshold, np.float64)
        self.lefts_ = np.asarray(tree.children_left, np.int64)
        self.rights_ = np.asarray(tree.children_right, np.int64)
        reached = np.asarray(model.decision_path(inputs).todense(), bool)
        self.quality_ = self._node_means(rows.scores, reached & grow[:, None])
        self._prune(rows.scores, reached & ~grow[:, None])
        self._drop_unreachable()
        reached = np.array([self._reached(row) for row in inputs])
        self.quality_ = self._node_means(rows.scores, reached)
        self.metrics_ = {
            "leaves": int((self.features_ < 0).sum()),
            "rules": self._rules(rows.models),
        }

    def _ready(self) -> None:
        """Refuse a tree that leads in circles or asks for unknown features."""
        import numpy as np

        nodes = np.arange(len(self.features_))
        inner = self.features_ >= 0
        for children in (self.lefts_, self.rights_):
            if not ((children > nodes) & (children < len(nodes)))[inner].all():
                raise RouterError("artefact of 'tree': a node's children must come after it")
        if (self.features_ >= len(SURFACE_FEATURES)).any():
            raise RouterError("artefact of 'tree': it asks for features unknown here")

    def _node_means(
        self, scores: NDArray[np.float64], reached: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        import numpy as np

        present = ~np.isnan(scores)
        filled = np.where(present, scores, 0.0)
        mean = filled.sum(axis=0) / np.maximum(present.sum(axis=0), 1)
        weight = reached.T.astype(float) @ present + self.shrinkage
        total = reached.T.astype(float) @ filled + self.shrinkage * mean
        return np.where(weight > 0, total / np.maximum(weight, 1e-12), mean)

    def _prune(self, scores: NDArray[np.float64], reached: NDArray[np.bool_]) -> None:
        """Turn nodes into leaves where their subtree decides no better on held-out prompts."""
        import numpy as np

        def gain(node: int) -> NDArray[np.float64]:
            """Score of every held-out prompt below a node, under the subtree's decisions."""
            got = np.full(len(scores), np.nan)
            inside = reached[:, node]
            leaf = scores[:, int(self.quality_[node].argmax())]
            got[inside] = leaf[inside]
            if self.features_[node] < 0:
                return got
            left, right = gain(int(self.lefts_[node])), gain(int(self.rights_[node]))
            split = np.where(reached[:, self.lefts_[node]], left, right)
            if np.nansum(split[inside]) <= np.nansum(got[inside]):
                self.features_[node] = -1
                return got
            return split

        gain(0)

    def _drop_unreachable(self) -> None:
        import numpy as np

        order, stack = [], [0]
        while stack:
            node = stack.pop()
            order.append(node)
            if self.features_[node] >= 0:
                stack += [int(self.rights_[node]), int(self.lefts_[node])]
        place = {node: number for number, node in enumerate(order)}
        inner = self.features_[order] >= 0
        self.lefts_ = np.array([place.get(int(n), -1) for n in self.lefts_[order]]) * inner
        self.rights_ = np.array([place.get(int(n), -1) for n in self.rights_[order]]) * inner
        self.limits_ = np.where(inner, self.limits_[order], 0.0)
        self.features_ = self.features_[order]

    def _path(self, inputs: Sequence[float] | NDArray[np.float32]) -> list[int]:
        path = [0]
        while (feature := int(self.features_[path[-1]])) >= 0:
            node = path[-1]
            below = inputs[feature] <= self.limits_[node]
            path.append(int(self.lefts_[node] if below else self.rights_[node]))
        return path

    def _reached(self, inputs: NDArray[np.float32]) -> NDArray[np.bool_]:
        import numpy as np

        reached = np.zeros(len(self.features_), bool)
        reached[self._path(inputs)] = True
        return reached

    def _predict_one(self, given: Query) -> tuple[NDArray[Any], Explanation]:
        import numpy as np

        # Single precision, as in training: a value at a limit must fall on the same side.
        path = self._path(np.array(surface_features(given.text), np.float32))
        questions = [
            self._question(node, child == self.lefts_[node]) for node, child in pairwise(path)
        ]
        return self.quality_[path[-1]], Explanation(detail={"rule": " and ".join(questions)})

    def _question(self, node: int, below: bool) -> str:
        name = SURFACE_FEATURES[int(self.features_[node])]
        return f"{name} {'<=' if below else '>'} {self.limits_[node]:.3g}"

    def rules(self) -> list[str]:
        """The tree as indented lines; leaves name the best model and its mean score."""
        return self._rules(self.models)

    def _rules(self, models: Sequence[str]) -> list[str]:
        lines = []

        def walk(node: int, depth: int) -> None:
            indent = "  " * depth
            if self.features_[node] < 0:
                best = int(self.quality_[node].argmax())
                lines.append(f"{indent}{models[best]} ({self.quality_[node][best]:.3f})")
                return
            for below, child in ((True, self.lefts_[node]), (False, self.rights_[node])):
                lines.append(f"{indent}if {self._question(node, below)}:")
                walk(int(child), depth + 1)

        walk(0, 0)
        return lines
