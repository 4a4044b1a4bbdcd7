"""``collegium serve`` and ``collegium doctor``."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

import click

from orchestrator.config import CollegiumConfig, load_config, parse_config

__all__ = ["doctor_command", "serve_command", "with_engine"]


@click.command("serve")
@click.option("--config", "file", type=click.Path(dir_okay=False),
              help="Config file; the embedded experts' by default.")  # fmt: skip
@click.option("--host", help="Address to listen on, instead of the config's.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port, instead of the config's.")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "transformers"]),
    help="Put local models on this engine, on the CPU, instead of the config's.",
)
@click.option("--dashboard-port", type=click.IntRange(1, 65535),
              help="Port of Ray's dashboard, instead of the config's.")  # fmt: skip
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=1),
    default=900,
    show_default=True,
    help="Seconds to wait for the experts to load.",
)
def serve_command(
    file: str | None,
    host: str | None,
    port: int | None,
    engine: str | None,
    dashboard_port: int | None,
    timeout_s: float,
) -> None:
    """Run the service on this machine until Ctrl-C.

    On a Ray cluster, give the same file to 'serve deploy' instead.
    """
    from deployments.local import ServeFailedError, running_service

    config = _overridden(load_config(file), host, port, engine, dashboard_port)
    started = time.monotonic()

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - started:6.1f} s] {line}", err=True)

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _interrupt(stop))
    try:
        with running_service(config, say=say, timeout_s=timeout_s):
            say("ready")
            _greet(config)
            stop.wait()
    except ServeFailedError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(130)


def _interrupt(stop: threading.Event) -> None:
    # While starting up nobody waits for the event yet, so the main thread must be interrupted.
    if stop.is_set():
        return
    stop.set()
    raise KeyboardInterrupt


def _overridden(
    config: CollegiumConfig,
    host: str | None,
    port: int | None,
    engine: str | None,
    dashboard_port: int | None,
) -> CollegiumConfig:
    server = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    ray = {"dashboard_port": dashboard_port} if dashboard_port else {}
    config = config.model_copy(
        update={
            "server": config.server.model_copy(update=server),
            "ray": config.ray.model_copy(update=ray),
        }
    )
    return with_engine(config, engine) if engine else config


def with_engine(config: CollegiumConfig, engine: str) -> CollegiumConfig:
    """The same experts with every local model on one engine, on the CPU."""
    data = config.model_dump(mode="json", by_alias=True)
    for entry in data["experts"]:
        if entry["engine"] in ("vllm", "transformers") and entry["engine"] != engine:
            for key in (
                "engine_kwargs",
                "llm_config",
                "device",
                "dtype",
                "max_batch_size",
                "threads",
            ):
                entry.pop(key, None)
            entry["engine"] = engine
        if entry["engine"] == engine:
            entry["device"] = "cpu"
    return parse_config(data)


def _greet(config: CollegiumConfig) -> None:
    url = f"http://{config.server.host}:{config.server.port}"
    lines = [
        "",
        f"Collegium listens on {url}",
        f"  experts    {', '.join(config.cards())}",
        f"  routes     {', '.join(config.routes) or 'none'}",
        f'  ask        collegium ask "What is 17 + 25?"{_url_option(url)}',
        f"  curl       curl {url}/v1/chat/completions -H 'content-type: application/json' \\",
        '               -d \'{"messages": [{"role": "user", "content": "What is 17 + 25?"}]}\'',
        f"  API page   {url}/docs",
    ]
    if config.ray.dashboard:
        url = f"http://127.0.0.1:{config.ray.dashboard_port}"
        lines.append(f"  dashboard  {url}  (it asks for the token of 'ray get-auth-token')")
    lines += ["  stop       Ctrl-C", ""]
    click.echo("\n".join(lines))
    sys.stdout.flush()


def _url_option(url: str) -> str:
    return "" if url == "http://127.0.0.1:8000" else f" --url {url}"


@click.command("doctor")
@click.option("--config", "file", type=click.Path(dir_okay=False),
              help="Config file; the embedded experts' by default.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor_command(file: str | None, as_json: bool) -> None:
    """Check Python, packages, memory, ports, weights and the config; exit 1 if one is wrong."""
    import json

    from deployments.doctor import findings

    rows: list[dict[str, Any]] = findings(file)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        for row in rows:
            mark = click.style("ok  " if row["ok"] else "BAD ", fg="green" if row["ok"] else "red")
            click.echo(f"{mark} {row['what']:<12} {row['found']}")
    if not all(row["ok"] for row in rows):
        sys.exit(1)
