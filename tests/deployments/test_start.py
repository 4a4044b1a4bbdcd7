"""What is wrong is said in one line before anything starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

from deployments.haproxy import write_stand_in
from deployments.preflight import check_memory, check_port, check_weights
from orchestrator.cli import main
from orchestrator.config import ConfigError, parse_config

SCRIPTED = {"name": "a", "engine": "scripted"}


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def _invoke(tmp_path, config, *arguments):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    return CliRunner().invoke(main, ["serve", "--config", str(file), *arguments])


def test_a_taken_port_is_one_line(tmp_path, taken_port):
    result = _invoke(tmp_path, {"experts": [SCRIPTED]}, "--port", str(taken_port))
    assert result.exit_code == 2
    assert f"port {taken_port} on 127.0.0.1 is taken" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_missing_weights_are_one_line(tmp_path):
    entry = {"name": "a", "engine": "transformers", "model": "/nowhere/model"}
    result = _invoke(tmp_path, {"experts": [entry]}, "--port", "8999")
    assert result.exit_code == 2
    assert "expert 'a': '/nowhere/model' does not exist" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_too_little_memory_is_said(tmp_path):
    huge = {"name": "a", "engine": "transformers", "model": "some/model", "total_params_b": 90000}
    with pytest.raises(ConfigError, match="GiB of memory"):
        check_memory(parse_config({"experts": [huge]}))


def test_a_missing_key_variable_is_said(tmp_path):
    config = {"experts": [SCRIPTED], "server": {"api_keys_env": "COLLEGIUM_TEST_KEYS"}}
    result = _invoke(tmp_path, config, "--port", "8999")
    assert result.exit_code == 2
    assert "COLLEGIUM_TEST_KEYS" in result.output


def test_hub_names_are_not_looked_up():
    check_weights(parse_config({"experts": [{**SCRIPTED, "engine": "vllm", "model": "org/name"}]}))


def test_a_free_port_is_fine():
    check_port("server.port", "127.0.0.1", 0)


def test_haproxy_stand_in_keeps_listeners_on_loopback(tmp_path):
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "global\ndefaults\n  mode http\n  option splice-request\n  timeout client 1s\n"
        "  timeout connect 1s\n  timeout server 1s\nlisten stats\n  bind *:18404\n  stats enable\n"
    )
    script = write_stand_in(tmp_path, loopback=True)
    subprocess.run([script, "-c", "-f", config], check=True, capture_output=True)
    text = config.read_text()
    assert "bind 127.0.0.1:18404" in text
    assert "splice-request" not in text


def test_doctor_finds_what_is_wrong(tmp_path, taken_port):
    file = tmp_path / "config.yaml"
    entry = {"name": "a", "engine": "transformers", "model": "/nowhere/model"}
    file.write_text(json.dumps({"experts": [entry], "server": {"port": taken_port}}))
    result = CliRunner().invoke(main, ["doctor", "--config", str(file), "--json"])
    wrong = {row["what"] for row in json.loads(result.output) if not row["ok"]}
    assert result.exit_code == 1
    assert {"weights", "port"} <= wrong


def test_importing_deployments_does_not_import_vllm():
    code = "import sys, deployments.builders; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
