"""The data files that tasks are made from; `README.md` names sources and licences."""

from __future__ import annotations

import json
from importlib.resources import files


def read_jsonl(name: str) -> list[dict[str, str]]:
    """Return the rows of one of the data files in this package."""
    lines = files(__name__).joinpath(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
