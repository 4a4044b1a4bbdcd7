"""A contextual bandit that learns how far each expert is from its predicted quality.

It knows experts by name and queries by their features; nothing of requests, routes or feedback.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Adjustment", "LinUCB", "features_of"]

# Between two factorisations the penalty fades along with the observations; by so much at most.
LEAST_FADING = 0.9
# Rank-one updates between two factorisations at most, so that rounding errors do not pile up.
MAX_UPDATES = 512
SEED = 0


def features_of(vector: NDArray[np.floating], dimensions: int) -> NDArray[np.float16]:
    """What the bandit knows of a query: its vector in fewer dimensions, and a constant 1.

    Half precision, because features wait for feedback in memory; whoever decides and whoever learns
    must see the same.

    Args:
        vector: Of the query, length 1.
        dimensions: How many to keep; as many as the vector has or more keeps all.

    Returns:
        Shape (dimensions + 1,).

    References:
        Achlioptas, "Database-friendly random projections" (Journal of Computer and System Sciences
        66, 2003): signs alone keep distances.
    """
    import numpy as np

    kept = vector
    if dimensions < len(vector):
        kept = vector @ _signs(len(vector), dimensions)
    return np.append(kept, 1.0).astype(np.float16)


@functools.lru_cache(maxsize=8)
def _signs(width: int, dimensions: int) -> NDArray[np.float64]:
    """A projection that is the same on every machine and with every version of NumPy."""
    import numpy as np

    bits = random.Random(SEED).getrandbits(width * dimensions)
    packed = np.frombuffer(bits.to_bytes((width * dimensions + 7) // 8, "little"), np.uint8)
    ones = np.unpackbits(packed, count=width * dimensions).reshape(width, dimensions)
    return np.asarray((2.0 * ones - 1.0) / dimensions**0.5)


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What feedback makes of predicted quality.

    Attributes:
        quality: Predicted and learnt together, in [0, 1], shape (n_candidates,).
        uncertainty: Standard deviation of what was learnt, in that of one observation, same shape.
            Optimism adds some of it to quality.
    """

    quality: NDArray[np.float64]
    uncertainty: NDArray[np.float64]


class LinUCB:
    """Ridge regression per expert from a query's features to reward less predicted quality.

    Without an observation it changes nothing, bit for bit. Observations of any expert let all
    older ones count less (``forgetting``), so that an expert nobody asked for long becomes
    uncertain again and is found out if it has improved; the penalty is not forgotten, so that
    quality falls back to the prediction instead of to noise.

    An update costs O(n_features²), by Sherman and Morrison's formula, and every so many updates an
    exact factorisation of all experts' matrices. Not safe for threads: the event loop owns it.

    Args:
        experts: Names.
        n_features: Length of features.
        forgetting: What an observation counts one observation later, in (0, 1]; 1 never forgets.
        penalty: How many observations the prediction counts for.

    Attributes:
        observations: How many it has learnt from, weights added up, before anything was forgotten.

    References:
        Li et al., "A Contextual-Bandit Approach to Personalized News Article Recommendation"
        (arXiv:1003.0146), disjoint LinUCB. Russac et al., "Weighted Linear Bandits for
        Non-Stationary Environments" (arXiv:1909.09146) for geometric weights. Departs from them in
        learning the residual of a prediction, and in the uncertainty, which is that of plain LinUCB
        at the discounted matrix.
    """

    def __init__(
        self,
        experts: Sequence[str],
        n_features: int,
        *,
        forgetting: float,
        penalty: float,
    ) -> None:
        import numpy as np

        self.experts = list(experts)
        self.n_features = n_features
        self.forgetting = forgetting
        self.penalty = penalty
        self.observations = 0.0
        # Sums of outer products of features, and of features times rewards less predictions.
        self._grams = np.zeros((len(self.experts), n_features, n_features))
        self._moments = np.zeros((len(self.experts), n_features))
        # Sums are kept divided by this, so that forgetting costs one multiplication.
        self._fading = 1.0
        self._factorise()

    def include(self, experts: Sequence[str]) -> None:
        """Know these experts too; of others nothing is forgotten."""
        import numpy as np

        new = [name for name in experts if name not in self._positions]
        if new:
            self.experts += new
            square = np.zeros((len(new), self.n_features, self.n_features))
            self._grams = np.concatenate([self._grams, square])
            self._moments = np.concatenate([self._moments, square[:, 0]])
            self._factorise()

    def adjust(
        self,
        features: NDArray[np.floating],
        quality: NDArray[np.floating],
        candidates: Sequence[str],
    ) -> Adjustment:
        """Correct predicted quality by what was learnt. Changes nothing.

        Args:
            features: Of the query, shape (n_features,).
            quality: Predicted, shape (n_candidates,).
            candidates: Their names.

        Raises:
            KeyError: A candidate is none of the experts.
        """
        import numpy as np

        places = [self._positions[name] for name in candidates]
        inputs = features.astype(np.float64)
        learnt = (self._weights[places] * inputs).sum(axis=1)
        spread = (inputs @ self._inverses[places] @ inputs) / self._fading
        return Adjustment(np.clip(quality + learnt, 0.0, 1.0), np.sqrt(np.maximum(spread, 0.0)))

    def update(
        self,
        features: NDArray[np.floating],
        expert: str,
        reward: float,
        prior: float,
        *,
        weight: float = 1.0,
    ) -> None:
        """Learn from one answer.

        Args:
            features: Of the query, as given to ``adjust``.
            expert: Who answered.
            reward: How good the answer was. Preferences make rewards outside [0, 1].
            prior: The expert's predicted quality, as given to ``adjust``.
            weight: How many observations it counts for.

        Raises:
            KeyError: The expert is unknown.
            ValueError: A number is not finite, the weight not above 0, or the shape wrong.
        """
        import numpy as np

        place, inputs = self._positions[expert], features.astype(np.float64)
        known = np.isfinite(reward) and np.isfinite(prior) and np.isfinite(inputs).all()
        if not known or not 0 < weight < np.inf or inputs.shape != (self.n_features,):
            raise ValueError(
                f"cannot learn from reward {reward}, prior {prior}, weight {weight} and features "
                f"of shape {inputs.shape}"
            )
        self._fading *= self.forgetting**weight
        share = weight / self._fading
        self.observations += weight
        self._grams[place] += share * np.outer(inputs, inputs)
        self._moments[place] += share * (reward - prior) * inputs
        self._updates += 1
        if self._fading < LEAST_FADING or self._updates >= MAX_UPDATES:
            self._factorise()
            return
        inverse = self._inverses[place]
        towards = inverse @ inputs
        inverse -= np.outer(towards, towards) * (share / (1.0 + share * (inputs @ towards)))
        self._weights[place] = inverse @ self._moments[place]

    def _factorise(self) -> None:
        """Compute exactly what updates keep up to date."""
        import numpy as np

        self._grams *= self._fading
        self._moments *= self._fading
        self._fading, self._updates = 1.0, 0
        self._positions = {name: place for place, name in enumerate(self.experts)}
        self._inverses = np.linalg.inv(self._grams + self.penalty * np.eye(self.n_features))
        self._weights = np.einsum("eij,ej->ei", self._inverses, self._moments)
