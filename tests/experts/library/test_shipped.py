"""The library that Collegium ships with: what it lists is there, whole, and no copy."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from evals.tasks import get_task
from experts.finetune_data import read_pairs
from experts.library.cli import library_command
from experts.library.manifest import Library
from experts.paths import resolve_path

FOLDER = resolve_path("package:experts/embedded/library")


def test_files_weights_and_shapes_pass():
    result = CliRunner().invoke(library_command, ["check", "--files", "--library", str(FOLDER)])
    assert result.exit_code == 0, result.output
    assert "10 experts, 0 with a failed test" in result.output


def test_samples_are_of_the_task_that_routers_learn_from():
    """And of none that adapters were trained on, or that anything is measured on."""
    library = Library(FOLDER)
    for name, expert in library.experts.items():
        assert expert.samples is not None
        asked = {pair.prompt for pair in read_pairs(library.path(expert.samples))[0]}
        assert len(asked) == 60
        assert asked <= {sample.text for sample in get_task(name).samples("train")}
