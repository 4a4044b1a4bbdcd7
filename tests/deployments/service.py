"""Starts the real service as users do, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Service:
    """A running ``collegium serve``."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **options)

    def async_client(self, **options: Any) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
        return httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits, **options)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Processes of a deployment's replicas, all started by this service."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        name = f"ray::ServeReplica:collegium:{deployment}"
        return [child for child in children if _command(child).startswith(name)]

    def pss_gib(self) -> float:
        """Memory of the service's processes, shared pages counted once, in GiB."""
        parent = psutil.Process(self.process.pid)
        family = [parent, *parent.children(recursive=True)]
        return sum(_pss(process) for process in family) / 2**30


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


@contextmanager
def running(config: dict[str, Any] | None, folder: Path, *options: str) -> Iterator[Service]:
    """Serve a config (none: the embedded one) until the block ends, then Ctrl-C."""
    port, log = free_port(), folder / "serve.log"
    command = [sys.executable, "-m", "orchestrator.cli", "serve", "--port", str(port),
               "--dashboard-port", str(free_port()), *options]  # fmt: skip
    if config is not None:
        file = folder / "config.yaml"
        file.write_text(json.dumps(config))  # JSON is YAML
        command += ["--config", str(file)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True, env=os.environ
        )
    service = Service(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_ready(service)
        yield service
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        _, left = psutil.wait_procs(family, timeout=20)
        for child in left:
            child.kill()
        assert not left, f"Ctrl-C left processes behind: {[_command(child) for child in left]}"


def _wait_until_ready(service: Service, timeout_s: float = 280) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if b"Collegium listens on" in service.log.read_bytes():
            return
        if service.process.poll() is not None:
            break
        time.sleep(0.2)
    raise AssertionError(f"the service did not start:\n{service.log.read_text()[-3000:]}")
