"""A shipped Serve config on a Ray cluster, as its operator would deploy it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from deployments.local import environment
from orchestrator.config import parse_config
from tests.deployments.service import ROOT, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BIN = Path(sys.executable).parent


@contextmanager
def _running(
    command: list[str], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process until the block ends, and everything it has started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, env=env, start_new_session=True
        )
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        _, left = psutil.wait_procs(children, timeout=30)
        for child in left:
            child.kill()


def _wait_for(log: Path, text: bytes, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while text not in log.read_bytes():
        alive = process.poll() is None and time.monotonic() < deadline
        assert alive, log.read_text()[-3000:]
        time.sleep(0.2)


def _with_upstream(content: dict[str, Any], upstream: str, port: int) -> dict[str, Any]:
    content["http_options"]["port"] = port
    for expert in content["applications"][0]["args"]["experts"]:
        expert["base_url"] = upstream
    return content


def test_remote_apis_on_a_token_guarded_cluster(tmp_path):
    upstream_port, port, dashboard_port = free_port(), free_port(), free_port()
    shipped = ROOT / "deployments" / "configs" / "remote-apis.yaml"
    content = _with_upstream(
        yaml.safe_load(shipped.read_text()), f"http://127.0.0.1:{upstream_port}/v1", port
    )
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(content))
    env = {
        **os.environ,
        **environment(parse_config(content["applications"][0]["args"])),
        # This cluster ends with the test; nobody waits for its last requests.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OPENAI_API_KEY": "key-of-large",
        "OTHER_API_KEY": "key-of-small",
    }
    head = [str(BIN / "ray"), "start", "--head", "--block", "--port", str(free_port()),
            "--dashboard-port", str(dashboard_port), "--ray-client-server-port", str(free_port()),
            "--num-cpus", "2", "--object-store-memory", str(100 << 20),
            "--disable-usage-stats"]  # fmt: skip
    upstream = [sys.executable, "-m", "benchmarks.upstream", str(upstream_port)]
    log = tmp_path / "head.log"
    with (
        _running(upstream, tmp_path / "upstream.log", dict(os.environ)),
        _running(head, log, env) as ray_head,
    ):
        _wait_for(log, b"Ray runtime started", ray_head)
        dashboard = f"http://127.0.0.1:{dashboard_port}"
        deploy = [str(BIN / "serve"), "deploy", "--address", dashboard, str(file)]
        refused = subprocess.run(
            deploy, env={**env, "RAY_AUTH_TOKEN": "wrong"}, capture_output=True, timeout=60
        )
        assert refused.returncode != 0
        subprocess.run(deploy, env=env, check=True, capture_output=True, timeout=60)
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for route, knob, model in (("auto", 1, "large"), ("auto-cheap", None, "small")):
            answer = client.chat.completions.create(
                model=route,
                messages=[{"role": "user", "content": "hello"}],
                extra_body={"cost_quality": knob},
            )
            assert answer.model == model
            assert (answer.choices[0].message.content or "").startswith("word word")


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError("the deployed application does not get ready")
