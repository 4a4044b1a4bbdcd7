"""Ray and Serve on this machine: what ``collegium serve`` starts, and stops again."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deployments.haproxy import write_stand_in
from orchestrator.config import CollegiumConfig

__all__ = ["ServeFailedError", "environment", "preflight", "running_service"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeFailedError(Exception):
    """The service did not come up. The message says why, in one line."""


def preflight(config: CollegiumConfig) -> None:
    """Find out in a second what would otherwise fail in a replica a minute later.

    Raises:
        ConfigError: A port is taken, weights are missing, a variable is unset, memory is short.
    """
    from deployments.preflight import check_memory, check_port, check_weights
    from orchestrator.settings import api_keys

    check_port("server.port", config.server.host, config.server.port)
    check_port("ray.dashboard_port", "127.0.0.1", config.ray.dashboard_port)
    api_keys(config.server.api_keys_env)
    check_weights(config)
    check_memory(config)


def environment(config: CollegiumConfig) -> dict[str, str]:
    """Environment variables that Ray must find before it is imported."""
    env = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own ports are open to the network whatever one asks for; its token guards them.
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        # Ray lets its workers yield to every other process; here they are the service.
        "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0"),
        # Ray lets HAProxies on other machines notice for half a minute; here there are none.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(config.ray.ha_proxy)),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": str(int(config.ray.throughput_mode)),
    }
    if config.ray.ha_proxy:
        env["RAY_SERVE_HAPROXY_NBTHREAD"] = str(min(4, os.cpu_count() or 1))
        # Ray would parse a log line per request in Python; /metrics counts requests already.
        env["RAY_SERVE_HAPROXY_METRICS_ENABLED"] = "0"
        env["RAY_SERVE_HAPROXY_STATS_PORT"] = str(_free_port())
        env["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(_free_port())
        folder = _runtime_folder()
        # One Serve instance per machine is Ray's assumption; two services must not share files.
        env["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] = str(folder / "haproxy.cfg")
        env["RAY_SERVE_HAPROXY_SOCKET_PATH"] = str(folder / "admin.sock")
        env["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] = str(folder / "state")
        env["RAY_SERVE_HAPROXY_SERVER_STATE_FILE"] = str(folder / "state" / "server-state")
        stand_in = write_stand_in(folder, loopback=config.server.host in LOOPBACK)
        env["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(stand_in)
    return env


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _runtime_folder() -> Path:
    # Short, because paths of Unix sockets may have 107 characters at most.
    return Path(tempfile.mkdtemp(prefix="collegium-"))


@contextmanager
def running_service(
    config: CollegiumConfig,
    *,
    say: Callable[[str], None] = lambda line: None,
    timeout_s: float = 900.0,
) -> Iterator[None]:
    """Start Ray and the service, yield when it answers, stop all of it at the end.

    Args:
        config: What to serve.
        say: Takes lines about the progress.
        timeout_s: Seconds to wait until every deployment runs.

    Raises:
        ConfigError: Something is wrong that can be told beforehand.
        ServeFailedError: A deployment failed to start.
    """
    preflight(config)
    env = environment(config)
    os.environ.update(env)
    # Imported only now: Ray reads its environment at import.
    import ray
    from ray import serve

    from deployments.builders import APPLICATION, build

    # What Serve says of itself at its start is Ray's affair; trouble is not.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    say("starting Ray")
    try:
        ray.init(
            address="local",
            include_dashboard=config.ray.dashboard,
            dashboard_host="127.0.0.1",
            dashboard_port=config.ray.dashboard_port,
            object_store_memory=config.ray.object_store_mib << 20,
            log_to_driver=False,
            logging_level="warning",
        )
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.server.host, "port": config.server.port},
            logging_config={"log_level": "WARNING"},
        )
        target = serve.RunTarget(target=build(config), name=APPLICATION, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        _wait(serve, APPLICATION, say, timeout_s)
        yield
    finally:
        say("stopping")
        # Without a Ray of our own, Serve would look for another's, wait for it, and stop its apps.
        if ray.is_initialized():
            with suppress(Exception):
                serve.shutdown()
            ray.shutdown()
        if "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC" in env:
            folder = Path(env["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
            shutil.rmtree(folder, ignore_errors=True)


def _wait(serve: Any, name: str, say: Callable[[str], None], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    seen: dict[str, str] = {}
    while time.monotonic() < deadline:
        application = serve.status().applications.get(name)
        for deployment, state in (application.deployments if application else {}).items():
            if seen.get(deployment) != state.status:
                seen[deployment] = state.status
                say(f"{deployment}: {state.status.lower().replace('_', ' ')}")
        status = application.status if application else "NOT_STARTED"
        if status == "RUNNING":
            return
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServeFailedError(_reason(application))
        time.sleep(0.25)
    waiting = ", ".join(name for name, status in seen.items() if status != "HEALTHY")
    raise ServeFailedError(f"not ready within {timeout_s:g} s; still waiting for {waiting or name}")


def _reason(application: Any) -> str:
    """The line of a traceback that says what happened: the last one with an exception's name."""
    messages = [d.message for d in application.deployments.values() if d.status != "HEALTHY"]
    text = "\n".join(message for message in [*messages, application.message] if message)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.partition(":")[0] and ": " in line]
    return (named or lines or ["the reason is in Ray's logs under /tmp/ray/session_latest"])[-1]
