"""Routers made of routers: what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import ValidationError

from routers.artefact import Artefact, Manifest
from routers.base import Explanation, Query, RouterError
from routers.fitted import FittedRouter, TrainingRows
from routers.outcomes import OutcomeTable, Prompts
from routers.params import check_known_params, parse_settings
from routers.registry import get_router_class, registered_routers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CombinedRouter", "fit_member", "make_member", "table_of"]


class CombinedRouter(FittedRouter):
    """Base of routers that predict the weighted mean of their members' predictions.

    Attributes:
        members_: Fitted routers for the same models.
        weights_: Their weights, sum 1, shape (n_members,).
    """

    arrays: ClassVar = {"weights": ("members",)}

    members_: list[FittedRouter]
    weights_: NDArray[np.float64]

    def _inputs(self, queries: Sequence[Query]) -> Sequence[Any]:
        return list(zip(*(member._inputs(queries) for member in self.members_), strict=True))

    def _predict_one(self, given: Any) -> tuple[NDArray[np.floating], Explanation]:
        import numpy as np

        quality = np.zeros(len(self.models))
        explained = None
        for member, weight, inputs in zip(self.members_, self.weights_, given, strict=True):
            row, explanation = member._predict_one(inputs)
            quality += weight * row.clip(0.0, 1.0)
            if explained is None or (explained.category is None and explanation.category):
                explained = explanation
        return quality, explained or Explanation()

    def _manifest(self) -> Manifest:
        manifest = super()._manifest()
        members = [member._manifest().model_dump() for member in self.members_]
        return manifest.model_copy(update={"state": {**manifest.state, "members": members}})

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays = super()._arrays()
        for number, member in enumerate(self.members_):
            arrays |= {f"{number}.{name}": array for name, array in member._arrays().items()}
        return arrays

    def _restore(self, artefact: Artefact, lengths: dict[str, int]) -> None:
        self.members_ = []
        members = artefact.manifest.state.get("members")
        if not isinstance(members, list) or not members:
            raise RouterError(f"artefact {artefact.path}: state 'members' is missing")
        for number, fields in enumerate(members):
            prefix = f"{number}."
            try:
                manifest = Manifest.model_validate(fields)
            except ValidationError as exc:
                raise RouterError(
                    f"artefact {artefact.path}: state 'members': {exc.errors()[0]['msg']}"
                ) from exc
            if manifest.method not in registered_routers():
                raise RouterError(
                    f"artefact {artefact.path}: unknown router {manifest.method!r} in it"
                )
            arrays = {
                name.removeprefix(prefix): array
                for name, array in artefact.arrays.items()
                if name.startswith(prefix)
            }
            member = cast(type[FittedRouter], get_router_class(manifest.method))
            self.members_.append(member._of(Artefact(artefact.path, manifest, arrays)))
        super()._restore(artefact, {**lengths, "members": len(members)})


def fit_member(text: str, rows: TrainingRows, chosen: NDArray[np.intp]) -> FittedRouter:
    """A router fitted on the chosen rows, from ``"METHOD KEY=VALUE ..."``.

    Raises:
        RouterError: The method or a setting is unknown, or it leaves out a model with scores there.
    """
    import numpy as np

    member = make_member(text).fit(table_of(rows, chosen))
    scored = ~np.isnan(rows.scores[chosen]).all(axis=0)
    left_out = [
        rows.models[j] for j in np.flatnonzero(scored) if rows.models[j] not in member.models
    ]
    if left_out:
        raise RouterError(
            f"{text!r} leaves out {', '.join(map(repr, left_out))}; members must know all models"
        )
    return member


def make_member(text: str) -> FittedRouter:
    """An unfitted router from ``"METHOD KEY=VALUE ..."``.

    Raises:
        RouterError: The method or a setting is unknown.
    """
    method, *settings = text.split() or [""]
    found = get_router_class(method)
    params = parse_settings(settings)
    check_known_params(found, params)
    router = found(**params)
    if not isinstance(router, FittedRouter):
        raise RouterError(f"{method!r} cannot be a member: it must derive from FittedRouter")
    return router


def table_of(rows: TrainingRows, chosen: NDArray[np.intp]) -> OutcomeTable:
    """Some training rows as a table of one split, for members to learn from."""
    pick = rows.categories
    prompts = Prompts(
        ids=[str(row) for row in chosen],
        texts=[rows.texts[row] for row in chosen],
        categories=None if pick is None else [pick[row] for row in chosen],
        splits=["train"] * len(chosen),
    )
    return OutcomeTable(
        prompts,
        models=rows.models,
        numbers={"score": rows.scores[chosen]},
        cards=dict(zip(rows.models, rows.cards, strict=True)),
    )
