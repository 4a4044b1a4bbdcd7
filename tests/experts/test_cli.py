from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from experts.cli import train_adapter_command
from experts.finetune_config import AdapterTrainingConfig


def run(folder: Path, *options: str, data: str = "") -> Result:
    (folder / "data.jsonl").write_text(data)
    arguments = ["--data", str(folder / "data.jsonl"), "--base", str(folder / "no-model")]
    return CliRunner().invoke(
        train_adapter_command, [*arguments, "--out", str(folder / "out"), *options]
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "--set takes KEY=VALUE, not 'steps'"),
        ("steps=-1", "--set steps: Input should be greater than or equal to 1"),
        ("steps=many", "--set steps: Input should be a valid integer"),
        ("speed=3", "--set speed: Extra inputs are not permitted"),
        ("steps=[", "--set steps: '[' is not a YAML value"),
    ],
)
def test_wrong_setting_is_wrong_usage(tmp_path: Path, setting: str, message: str) -> None:
    result = run(tmp_path, "--set", setting)
    assert result.exit_code == 2
    assert message in result.stderr


def test_wrong_data_is_wrong_usage(tmp_path: Path) -> None:
    result = run(tmp_path, data="nonsense")
    assert result.exit_code == 2
    assert "line 1 of" in result.stderr


def test_missing_base_is_wrong_usage(tmp_path: Path) -> None:
    result = run(tmp_path, data=json.dumps({"prompt": "a", "answer": "b"}))
    assert result.exit_code == 2
    assert "no-model" in result.stderr
    assert not (tmp_path / "out").exists()


def test_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    result = run(tmp_path, "--set", "learning_rate=5e-4", data="nonsense")
    assert "learning_rate" not in result.stderr


def test_help_names_every_setting() -> None:
    text = CliRunner().invoke(train_adapter_command, ["--help"]).stdout
    settings = set(AdapterTrainingConfig.model_fields) - {"data", "base"}
    assert all(name in text for name in settings)
