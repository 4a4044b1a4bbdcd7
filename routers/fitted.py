"""What fitted routers share: training rows, the loop over queries, saving and loading.

A method says what it learns (``_learn``), what it predicts for one query (``_predict_one``), and
which of its attributes are arrays and numbers; the rest is here. The names of those attributes end
with ``_``, as scikit-learn's do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from routers.artefact import (
    Artefact,
    EncoderId,
    Manifest,
    Update,
    encoder_of,
    load_artefact,
    save_artefact,
)
from routers.base import Explanation, Measured, Prediction, Query, RouterError
from routers.encoders import Encoder, get_encoder
from routers.params import candidate_columns, check_known_params, check_text, not_fitted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.outcomes import OutcomeTable

__all__ = ["FittedRouter", "TrainingRows", "VectorRouter"]


@dataclass(frozen=True)
class TrainingRows:
    """The rows of one split, with the models that have any score there.

    Attributes:
        texts: The prompts.
        categories: Their true categories; none if the table has none.
        models: Names of the columns of ``scores``.
        scores: Shape (n_prompts, n_models), NaN for missing cells.
        cards: What ``models.json`` says of each model, in the order of ``models``.
    """

    texts: list[str]
    categories: list[str] | None
    models: list[str]
    scores: NDArray[np.float64]
    cards: list[Mapping[str, Any]]
    _encode: Callable[[Sequence[str]], NDArray[np.float32]] | None = None
    _validation: Callable[[], TrainingRows | None] = field(default=lambda: None)

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """Vectors of the texts, shape (n_prompts, width)."""
        assert self._encode is not None, "the method has no encoder"
        return self._encode(self.texts)

    @cached_property
    def validation(self) -> TrainingRows | None:
        """The rows of the split ``validation``, if they are others than these."""
        return self._validation()

    def __len__(self) -> int:
        return len(self.texts)


class FittedRouter:
    """Base of routers that learn from an outcome table.

    Subclasses store hyper-parameters in their constructor, and nothing else.

    Attributes:
        method: The name of its kind, as in the registry.
        arrays: Fitted arrays by name, each with the names of its axes. ``models``, ``categories``
            and ``width`` have the length one expects; another axis has the same length wherever
            its name occurs.
        numbers: Names of fitted numbers.
        models_: Names of the models it predicts for.
        categories_: Names of the categories it knows; none if it knows none.
        metrics_: What was measured while fitting.
        measured: What is known of the models' answers in the training rows, by model.
        updates_: What was changed since, oldest first.
    """

    method: str
    arrays: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    numbers: ClassVar[tuple[str, ...]] = ()

    models_: list[str] | None = None
    categories_: list[str] | None = None
    metrics_: dict[str, Any]
    measured: Mapping[str, Measured] = {}
    updates_: list[Update]
    loaded_from: Path | None = None
    _table_sha256: str | None = None
    _split: str | None = None

    def _check_params(self) -> None:
        """Refuse wrong hyper-parameters."""

    def _learn(self, rows: TrainingRows) -> None:
        """Set the fitted attributes; ``models_`` only if some models are left out."""
        raise NotImplementedError

    def _ready(self) -> None:
        """Called once it is fitted or loaded: derive what predictions need."""

    def _inputs(self, queries: Sequence[Query]) -> Sequence[Any]:
        """What ``_predict_one`` gets of each query."""
        return queries

    def _predict_one(self, given: Any) -> tuple[NDArray[np.floating], Explanation]:
        """Quality of all fitted models, shape (n_models,), and why."""
        raise NotImplementedError

    @property
    def models(self) -> list[str]:
        """Names of the models it was fitted on."""
        if self.models_ is None:
            raise not_fitted(self)
        return list(self.models_)

    def fit(self, table: OutcomeTable, *, split: str = "train") -> Self:
        """Learn from the rows of one split, forgetting what was learnt before.

        Raises:
            RouterError: A hyper-parameter is wrong, or the table lacks what the method needs.
        """
        self._check_params()
        self.models_, self.categories_, self.metrics_, self.updates_ = None, None, {}, []
        rows = self._rows(table, split)
        self._learn(rows)
        self.models_ = self.models_ or rows.models
        self.measured = table.measured(split, self.models_)
        self._table_sha256, self._split = table.sha256, split
        self._ready()
        return self

    def _rows(
        self, table: OutcomeTable, split: str, models: Sequence[str] | None = None
    ) -> TrainingRows:
        import numpy as np

        prompts = table.with_prompts_of(split)
        scores = table.scores(split)
        names = table.models
        kept = [
            j
            for j, name in enumerate(names)
            if (name in models if models is not None else not np.isnan(scores[:, j]).all())
        ]
        if not kept:
            raise RouterError("the outcome table has no scores in this split")
        found = [names[j] for j in kept]

        def validation() -> TrainingRows | None:
            if split in ("validation", "all") or not table.has_split("validation"):
                return None
            return self._rows(table, "validation", found)

        return TrainingRows(
            texts=prompts.texts,
            categories=prompts.categories,
            models=found,
            scores=scores[:, kept],
            cards=[table.cards.get(name, {}) for name in found],
            _encode=self._encode_all,
            _validation=validation,
        )

    def _encode_all(self, texts: Sequence[str]) -> NDArray[np.float32]:
        raise NotImplementedError

    def predict(self, queries: Sequence[Query], candidates: Sequence[str]) -> Prediction:
        """Predict for the named candidates, in their order.

        Raises:
            RouterError: It is not fitted, or a candidate is unknown to it.
        """
        import numpy as np

        columns = candidate_columns(self.models, candidates)
        quality = np.empty((len(queries), len(columns)), np.float32)
        explanations = []
        # One by one: BLAS picks its kernel, hence the order of additions, by the batch's shape.
        for number, given in enumerate(self._inputs(queries)):
            row, explanation = self._predict_one(given)
            quality[number] = row[columns]
            explanations.append(explanation)
        return Prediction(quality.clip(0.0, 1.0), explanations)

    def _check_positions(self, name: str, size: int) -> None:
        """Refuse a fitted array of positions that leave their range, as no method here makes."""
        found = getattr(self, f"{name}_")
        if ((found < 0) | (found >= size)).any():
            raise RouterError(
                f"artefact of {self.method!r}: {name!r} must lie from 0 to {size - 1}"
            )

    def _params(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def _manifest(self) -> Manifest:
        return Manifest(
            method=self.method,
            models=self.models,
            categories=self.categories_,
            table_sha256=self._table_sha256,
            split=self._split,
            updates=self.updates_,
            params=self._params(),
            state={name: float(getattr(self, f"{name}_")) for name in self.numbers},
            measured=dict(self.measured),
            metrics=self.metrics_,
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, f"{name}_") for name in self.arrays}

    def save(self, path: Path) -> None:
        """Write the fitted router as an artefact folder."""
        manifest = self._manifest()
        save_artefact(path, manifest, self._arrays())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an artefact folder that this class wrote.

        Raises:
            RouterError: The artefact is damaged.
        """
        return cls._of(load_artefact(path, method=cls.method))

    @classmethod
    def _of(cls, artefact: Artefact) -> Self:
        check_known_params(cls, artefact.manifest.params)
        router = cls(**artefact.manifest.params)
        router._restore(artefact, {})
        return router

    def _restore(self, artefact: Artefact, lengths: dict[str, int]) -> None:
        """Take over what an artefact holds; ``lengths`` of axes are completed on the way."""
        manifest = artefact.manifest
        self._check_params()
        lengths |= {"models": len(manifest.models), "categories": len(manifest.categories or ())}
        for name, axes in self.arrays.items():
            found = artefact.arrays.get(name)
            shape = (
                found.shape if found is not None and found.ndim == len(axes) else (0,) * len(axes)
            )
            for axis, length in zip(axes, shape, strict=True):
                lengths.setdefault(axis, length)
            setattr(self, f"{name}_", artefact.array(name, tuple(lengths[axis] for axis in axes)))
        for name in self.numbers:
            setattr(self, f"{name}_", artefact.state(name))
        self.metrics_, self.updates_ = dict(manifest.metrics), list(manifest.updates)
        self.measured = manifest.measured
        self.models_, self.categories_ = list(manifest.models), manifest.categories
        self._table_sha256, self._split = manifest.table_sha256, manifest.split
        self._ready()


class VectorRouter(FittedRouter):
    """Base of routers that predict from a text's vector.

    Args:
        encoder: An encoder's name (see ``routers.encoders.get_encoder``) or an encoder.
    """

    encoder: str | Encoder

    def _check_params(self) -> None:
        if not isinstance(self.encoder, Encoder):
            check_text(self, "encoder", self.encoder)

    def _encoder(self) -> Encoder:
        return get_encoder(self.encoder) if isinstance(self.encoder, str) else self.encoder

    def _encode_all(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encoder().encode(texts)

    def _inputs(self, queries: Sequence[Query]) -> Sequence[Any]:
        return list(self._encode_all([query.text for query in queries]))

    def _params(self) -> dict[str, Any]:
        return {**super()._params(), "encoder": self._encoder().name}

    def _manifest(self) -> Manifest:
        encoder = self._encoder()
        bound = EncoderId(name=encoder.name, revision=encoder.revision)
        return super()._manifest().model_copy(update={"encoder": bound})

    @classmethod
    def load(cls, path: Path, *, encoder: Encoder | None = None) -> Self:
        """Read an artefact folder that this class wrote.

        Args:
            path: The folder.
            encoder: The encoder to use; by default the one the artefact names.

        Raises:
            RouterError: The artefact is damaged, or bound to another encoder.
        """
        return cls._of(load_artefact(path, method=cls.method), encoder)

    @classmethod
    def _of(cls, artefact: Artefact, encoder: Encoder | None = None) -> Self:
        check_known_params(cls, artefact.manifest.params)
        found = encoder_of(artefact, encoder)
        router = cls(**{**artefact.manifest.params, "encoder": found})
        router._restore(artefact, {"width": found.width})
        return router
