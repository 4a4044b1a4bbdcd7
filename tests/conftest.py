"""What holds for every test: no network beyond this machine, no settings from outside."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Set before anything under test is imported: libraries read these when they are.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}


def pytest_configure() -> None:
    """Clean the environment, which tests and the processes they start inherit."""
    for name in list(os.environ):
        if name.startswith(("COLLEGIUM_", "OPENAI_")):
            del os.environ[name]
    os.environ.update(_ENVIRONMENT)


class NetworkInTestError(RuntimeError):
    """A test tried to reach another machine."""

    def __init__(self, address: object) -> None:
        super().__init__(
            f"a test tried to reach {address!r}; tests may only connect to 127.0.0.0/8, ::1 and "
            "unix sockets: use a scripted expert, or a server of the test's own"
        )


def _is_here(connection: socket.socket, address: Any) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = address[0]
    try:
        return host in ("", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _guarded(original: Callable[..., Any], *, address_at: int = 0) -> Callable[..., Any]:
    def guarded(connection: socket.socket, *args: Any) -> Any:
        if not _is_here(connection, args[address_at]):
            raise NetworkInTestError(args[address_at])
        return original(connection, *args)

    return guarded


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    original = socket.socket
    with pytest.MonkeyPatch.context() as patch:
        for name, address_at in (("connect", 0), ("connect_ex", 0), ("sendto", -1)):
            guarded = _guarded(getattr(original, name), address_at=address_at)
            patch.setattr(original, name, guarded)
        yield
