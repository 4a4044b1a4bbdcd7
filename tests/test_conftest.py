"""The guard against network use guards."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from tests.conftest import NetworkInTestError


def test_another_machine_cannot_be_reached():
    with socket.socket() as connection, pytest.raises(NetworkInTestError, match=r"192\.0\.2\.1"):
        connection.connect(("192.0.2.1", 80))


def test_another_machine_cannot_be_written_to():
    with (
        socket.socket(type=socket.SOCK_DGRAM) as connection,
        pytest.raises(NetworkInTestError, match=r"192\.0\.2\.1"),
    ):
        connection.sendto(b"x", ("192.0.2.1", 53))


async def test_async_clients_are_guarded_too():
    with pytest.raises(NetworkInTestError):
        await asyncio.open_connection("192.0.2.1", 80)


def test_loopback_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_settings_from_outside_are_gone():
    assert not [name for name in os.environ if name.startswith(("COLLEGIUM_", "OPENAI_"))]
