from __future__ import annotations

import json

import pytest
import yaml
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.http.app import create_app
from orchestrator.options import RoutingOptions
from tests.orchestrator.support import build, config_content, config_with_rules, running_server


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config_content()))
    return str(file)


def decided(config_file, *options: str):
    return CliRunner().invoke(main, ["route", "hello", "--config", config_file, *options])


def test_every_routing_option_is_one_of_the_command():
    for command in ("ask", "route"):
        text = CliRunner().invoke(main, [command, "--help"]).output
        for name in RoutingOptions.model_fields:
            assert "--" + name.replace("_", "-") in text


def test_options_change_the_decision(config_file):
    assert decided(config_file).output == "large\n"
    assert decided(config_file, "--cost-quality", "0").output == "small\n"
    assert decided(config_file, "--allowed-models", "m*, s*").output == "medium\n"
    assert decided(config_file, "--route", "auto-cheap").output == "small\n"
    shown = json.loads(decided(config_file, "--top-k", "2", "--json").output)
    assert shown["width"] == 2


def test_a_wrong_option_is_named(config_file):
    for option, value in (("--cost-quality", "2"), ("--priority", "urgent"), ("--top-k", "x")):
        done = decided(config_file, option, value)
        assert done.exit_code == 2
        assert option in done.output
        assert repr(value) in done.output


def test_an_empty_pool_says_what_emptied_it(config_file):
    done = decided(config_file, "--allowed-models", "gpt*")
    assert done.exit_code == 2
    assert "allowed_models does not name it" in done.output


def test_ask_sends_its_options_and_shows_who_answered():
    app = create_app(build(config_with_rules({})))
    with running_server(app) as url:
        command = ["ask", "hello", "--url", url, "--max-cost", "0.0006"]
        done = CliRunner().invoke(main, command)
        refused = CliRunner().invoke(main, [*command, "--max-cost", "0"])
    assert done.stdout == "medium says hello to you\n"
    assert "model medium" in done.stderr
    assert refused.exit_code == 1
    assert "more than max_cost" in refused.stderr
