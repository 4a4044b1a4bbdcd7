"""Policies as YAML files: what stands under a route's ``policy`` in the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from orchestrator.config import validation_lines
from orchestrator.policies import Policy, PolicyConfig
from routers.base import RouterError

__all__ = ["make_policy", "policy_yaml", "read_policy"]

_ADAPTER: TypeAdapter[Policy] = TypeAdapter(PolicyConfig)


def make_policy(fields: Any, *, name: str) -> Policy:
    """A policy from its fields.

    Args:
        fields: A mapping with ``type``.
        name: What to call the source in messages.

    Raises:
        RouterError: The fields are not a policy's.
    """
    try:
        return _ADAPTER.validate_python(fields)
    except ValidationError as error:
        raise RouterError(
            "; ".join(f"{name}: {line}" for line in validation_lines(error))
        ) from None


def read_policy(path: Path) -> Policy:
    """A policy from a YAML file, which holds its fields, or them under ``policy``.

    Raises:
        RouterError: The file cannot be read, or is no policy.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RouterError(f"{path}: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and set(content) == {"policy"}:
        content = content["policy"]
    return make_policy(content, name=str(path))


def policy_yaml(policy: Policy) -> str:
    """The policy as it stands in a config, without what is left at its default."""
    fields = {"type": policy.type, **policy.model_dump(exclude_defaults=True)}
    return yaml.safe_dump({"policy": fields}, sort_keys=False)
