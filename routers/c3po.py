"""C3PO's neighbours for whole models: any router, mixed with what worked on the nearest prompts."""

from __future__ import annotations

from routers.combined import CombinedRouter, fit_member, table_of
from routers.encoders import DEFAULT_ENCODER
from routers.fitted import TrainingRows
from routers.knn import KNNRouter
from routers.params import check_count, check_number, check_text

__all__ = ["C3PORouter"]

# From this score on a prompt counts as solved.
SOLVED = 0.5


class C3PORouter(CombinedRouter):
    """Predicts ``prior * base + (1 - prior) * neighbours``.

    The neighbours are the nearest training prompts that some model solved.

    Args:
        base: Any router, as ``"METHOD KEY=VALUE ..."``.
        encoder: Name of the encoder that finds neighbours.
        k: Number of neighbours.
        prior: Weight of the base router.

    References:
        Li et al., "C3PO" (arXiv:2504.07964): routing weights within a mixture-of-experts model,
        mixed with those of solved neighbours. Departs from it in mixing predicted quality of whole
        models, in weighing neighbours alike, and in shrinking their mean by one prompt towards that
        of all solved ones. Where a model has no score on solved prompts, the base decides alone.
    """

    method = "c3po"

    def __init__(
        self,
        *,
        base: str = "kmeans",
        encoder: str = DEFAULT_ENCODER,
        k: int = 3,
        prior: float = 0.8,
    ) -> None:
        self.base = base
        self.encoder = encoder
        self.k = k
        self.prior = prior

    def _check_params(self) -> None:
        check_text(self, "base", self.base)
        check_text(self, "encoder", self.encoder)
        check_count(self, "k", self.k, 1)
        check_number(self, "prior", self.prior, 0, 1)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np

        everything = np.arange(len(rows))
        base = fit_member(self.base, rows, everything)
        solved = np.flatnonzero(np.nan_to_num(rows.scores).max(axis=1) >= SOLVED)
        neighbours = KNNRouter(encoder=self.encoder, k=self.k, shrinkage=1.0).fit(
            table_of(rows, solved if len(solved) else everything)
        )
        kept = [name for name in rows.models if name in neighbours.models]
        self.members_ = [base, neighbours] if kept == rows.models else [base]
        weights = [self.prior, 1 - self.prior] if len(self.members_) == 2 else [1.0]
        self.weights_ = np.array(weights)
