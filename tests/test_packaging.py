"""Five generic names at the top level: each must be ours. Also run against the installed wheel."""

from __future__ import annotations

import importlib.util
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path

import pytest

PACKAGES = ["orchestrator", "routers", "experts", "deployments", "evals"]
DATA = [
    ("orchestrator", "*.yaml"),
    ("deployments", "configs/*.yaml"),
    ("evals", "data/*/prompts.parquet"),
    ("evals", "data/domains/LICENSE-*"),
    ("evals", "data/retrieval/documents/*/*.md"),
    ("evals", "tasks/data/*.jsonl"),
    ("experts", "embedded/**/*.safetensors"),
    ("experts", "embedded/library/library.yaml"),
    ("experts", "embedded/library/samples/*.jsonl"),
    ("routers", "embedded/auto/*.safetensors"),
    ("routers", "embedded/domains/*.safetensors"),
    ("routers", "embedded/*/README.md"),
    *((package, "py.typed") for package in PACKAGES),
]


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"the package {package!r} is not installed"
    assert spec.origin is not None, f"the package {package!r} has no __init__.py"
    return Path(spec.origin).parent


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_ours(package):
    found, ours = _folder(package), _folder("orchestrator").parent / package
    assert found == ours, (
        f"{package!r} is imported from {found}, not from {ours}: another distribution has taken "
        "the name; install collegium in an environment of its own"
    )


@pytest.mark.parametrize(("package", "pattern"), DATA)
def test_package_data_is_there(package, pattern):
    assert any(_folder(package).glob(pattern)), f"no {pattern} in {_folder(package)}"


def test_data_can_be_read_as_resources():
    assert files("orchestrator").joinpath("embedded.yaml").read_text(encoding="utf-8")


def test_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="collegium")
    assert command.value == "orchestrator.cli:main"
    assert version("collegium")
