from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from routers.cli import train_command
from routers.coe import CoERouter
from routers.params import parse_settings
from routers.registry import ROUTERS, load_router
from routers.testing import example_table


@pytest.fixture
def table(tmp_path):
    example_table().write(tmp_path / "table")
    return str(tmp_path / "table")


def _run(*arguments):
    return CliRunner().invoke(train_command, arguments)


def test_help_lists_every_method():
    output = _run("--help").output
    assert all(name in output for name in ROUTERS)


def test_train_writes_an_artefact_and_prints_where(table, tmp_path):
    out = str(tmp_path / "coe")
    result = _run("coe", "--table", table, "--out", out, "--set", "encoder=hashing", "--set", "C=2")
    assert result.exit_code == 0, result.output
    assert "wrote" in result.stdout
    assert "held_out_accuracy" in result.stdout
    router = load_router(out)
    assert isinstance(router, CoERouter)
    assert router.C == 2


def test_json_prints_the_manifest(table, tmp_path):
    result = _run("best_single", "--table", table, "--out", str(tmp_path / "b"), "--json")
    assert json.loads(result.stdout)["method"] == "best_single"


def test_models_restrict_what_is_learnt(table, tmp_path):
    out = str(tmp_path / "b")
    _run("best_single", "--table", table, "--out", out, "--models", "lawyer, cook")
    assert load_router(out).models == ["lawyer", "cook"]


def test_a_class_of_ones_own_can_be_trained(table, tmp_path):
    method = "routers.baselines:RandomRouter"
    result = _run(method, "--table", table, "--out", str(tmp_path / "r"))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["knnn"], "unknown method 'knnn'; known: 'adapter', 'bert', 'best_single', "),
        (["coe", "--out", "x"], "Missing option '--table'"),
        (["coe", "--table", "TABLE", "--out", "OUT", "--set", "D=1"], "unknown parameter 'D'"),
        (["coe", "--table", "TABLE", "--out", "OUT", "--set", "C"], "must be KEY=VALUE, not 'C'"),
        (["coe", "--table", "TABLE", "--out", "OUT", "--set", "C=0"], "The 'C' parameter of"),
        (["coe", "--table", "TABLE", "--out", "OUT", "--split", "dev"], "unknown split 'dev'"),
        (["coe", "--table", "TABLE", "--out", "OUT", "--models", "x"], "no model 'x'"),
        (["coe", "--table", "/nowhere", "--out", "OUT"], "does not exist"),
        (["nowhere:X", "--table", "TABLE", "--out", "OUT"], "cannot import router 'nowhere:X'"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(table, tmp_path, arguments, message):
    places = {"TABLE": table, "OUT": str(tmp_path / "out")}
    result = _run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_settings_given_twice_are_refused(table, tmp_path):
    arguments = ["--table", table, "--out", str(tmp_path / "o"), "--set", "C=1", "--set", "C=2"]
    assert "'C' is given twice" in _run("coe", *arguments).stderr


def test_settings_are_json_where_they_can_be():
    settings = ["a=1", "b=true", "c=text", "d=x=y", "e=null"]
    assert parse_settings(settings) == {"a": 1, "b": True, "c": "text", "d": "x=y", "e": None}


def test_a_place_that_cannot_be_written_is_refused_before_training(table, tmp_path):
    (tmp_path / "notes").write_text("mine")
    # Training would refuse the table, as it says nothing of the models' sizes.
    arguments = ("--table", table, "--set", "encoder=hashing", "--set", "max_total_params_b=1")
    result = _run("coe", *arguments, "--out", str(tmp_path / "notes"))
    assert result.exit_code == 2
    assert "choose another --out" in result.output
