from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from experts.library.cli import library_command
from experts.library.manifest import Library

pytest.importorskip("torch")


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """Calls of the command, about a library that is not there at first."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        command, *rest = map(str, arguments)
        return CliRunner().invoke(library_command, [command, "--library", "library", *rest])

    return call


def test_adapters_come_in_and_go(run, home, tmp_path):
    result = run("add", home / "one", "--base", home / "base", "--description", "Ones.")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    tests = ["files", "base", "weights", "harm", "trigger", "gain"]
    assert [line.split()[:2] for line in lines[:-1]] == [["passed", test] for test in tests]
    assert run("add", home / "two", "--licence", "MIT", "--name", "second").exit_code == 0
    library = Library(tmp_path / "library")
    assert library.experts["second"].provenance.licence == "MIT"
    assert library.experts["second"].admission["similarity"] < 0.5
    listed = run("list").stdout
    assert [line.split() for line in listed.splitlines()] == [
        [str(home / "base")], ["one", "Ones."], ["second"]
    ]  # fmt: skip
    assert [one["name"] for one in json.loads(run("list", "--json").stdout)] == ["one", "second"]
    assert run("check", "--files").exit_code == 0
    assert run("remove", "one").exit_code == 0
    assert run("list").stdout.splitlines()[1:] == ["  second"]
    result = run("remove", "one")
    assert result.exit_code == 2
    assert "has no expert 'one'; it has second" in result.stderr


def test_refused_adapter_stays_out_unless_it_is_accepted(run, home, tmp_path):
    run("add", home / "one", "--base", home / "base")
    result = run("add", home / "one", "--name", "again")
    assert result.exit_code == 1
    assert "refused  weights" in result.stderr
    assert "again stays out of library: refused by weights" in result.stderr
    assert not (tmp_path / "library/adapters/again").exists()
    result = run("add", home / "one", "--name", "again", "--accept", "weights")
    assert result.exit_code == 0
    assert "accepted weights" in result.stderr
    # Nothing else is let through with it.
    assert "passed   trigger" in result.stderr
    assert Library(tmp_path / "library").experts["again"].admission["accepted"] == ["weights"]
    assert run("check", "--files").exit_code == 0


def test_other_weights_or_scales_than_those_that_came_in_are_noticed(run, home, tmp_path):
    run("add", home / "one", "--base", home / "base", "--trigger-tokens", 0)
    adapter = tmp_path / "library/adapters/one"

    def noticed():
        result = run("check", "--files")
        assert result.exit_code == 1
        return "one: sha256: its weights or settings are not those that came in" in result.stdout

    described = adapter / "adapter_config.json"
    settings = json.loads(described.read_text())
    scaled = {**settings, "lora_alpha": 1000 * settings["lora_alpha"]}
    described.write_text(json.dumps(scaled))
    assert noticed()
    shutil.copyfile(home / "one/adapter_config.json", described)
    assert run("check", "--files").exit_code == 0
    theirs = (home / "two/adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(theirs)
    assert noticed()


def test_adapter_that_is_gone_is_noticed_and_others_are_tested(run, home, tmp_path):
    for name in ("one", "two"):
        run("add", home / name, "--base", home / "base", "--trigger-tokens", 0)
    shutil.rmtree(tmp_path / "library/adapters/one")
    (tmp_path / "library/adapters/two/adapter_model.bin").write_bytes(b"")
    result = run("check", "--files")
    assert result.exit_code == 1
    first, second = result.stdout.splitlines()
    assert first.startswith("one: files:")
    assert first.endswith("does not exist")
    assert second.startswith("two: files:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--base: name the model"),
        (["--base", "x", "--accept", "base"], "'base' is not one of 'weights', 'harm'"),
        (["--base", "x", "--name", "../up"], "--name: String should match"),
    ],
)
def test_wrong_options_are_wrong_usage(run, home, options, message):
    result = run("add", home / "one", *options)
    assert result.exit_code == 2
    assert message in result.stderr
