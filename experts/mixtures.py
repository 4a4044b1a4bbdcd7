"""Which adapters a request has a model mix: its fields ``adapters`` and ``adapter_merging``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from experts.base import AnyRequest
from experts.errors import InvalidRequestError
from experts.types import Merging, Mixture

__all__ = ["mixture_of"]

MAX_SHARE = 8.0
"""Larger shares of an adapter only break its model."""


def mixture_of(request: AnyRequest) -> Mixture | None:
    """What a request asks to mix; none if it does not.

    Raises:
        InvalidRequestError: A field is malformed.
    """
    extra = request.model_extra or {}
    shares, merging = extra.get("adapters"), extra.get("adapter_merging")
    if shares is None:
        return None
    if not isinstance(shares, Mapping) or not all(map(_is_share, shares.values())):
        raise InvalidRequestError(
            f"adapters must map names to shares from -{MAX_SHARE:g} to {MAX_SHARE:g}", "adapters"
        )
    if merging not in (None, *get_args(Merging)):
        raise InvalidRequestError(
            f"adapter_merging must be one of {', '.join(get_args(Merging))}, got {merging!r}",
            "adapter_merging",
        )
    return Mixture({a: float(share) for a, share in shares.items()}, merging or "outputs")


def _is_share(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -MAX_SHARE <= value <= MAX_SHARE
