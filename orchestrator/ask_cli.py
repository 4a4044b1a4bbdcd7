"""``collegium ask`` and ``collegium route``: one question, answered or only decided on."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import click
import httpx
from pydantic import ValidationError

from orchestrator.config import load_config
from orchestrator.decision import Decision
from orchestrator.errors import RequestError
from orchestrator.http.requests import PREFIX, option_header
from orchestrator.options import RoutingOptions

__all__ = ["ask_command", "route_command"]


def _routing_options(command: Callable[..., None]) -> Callable[..., None]:
    """All routing options of a request as options of a command."""
    for name, field in reversed(RoutingOptions.model_fields.items()):
        text = " ".join((field.description or "").replace("``", "").split())
        listed = " Several are separated by commas." if name == "allowed_models" else ""
        flag = "--" + name.replace("_", "-")
        command = click.option(flag, name, metavar="VALUE", help=text + listed)(command)
    return command


def _checked(given: Mapping[str, str | None]) -> dict[str, str]:
    """The routing options that were given; a wrong one is the user's error."""
    texts = {name: value for name, value in given.items() if value is not None}
    try:
        RoutingOptions.from_texts(texts)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = str(problem["loc"][0])
        raise click.BadParameter(
            f"{problem['msg']}, got {texts[name]!r}", param_hint="--" + name.replace("_", "-")
        ) from None
    return texts


@click.command("ask")
@click.argument("text")
@click.option("--model", default="auto", show_default=True, help="An expert or a route.")
@click.option(
    "--url",
    envvar="COLLEGIUM_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    show_envvar=True,
    help="Where the service listens.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer in tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True,
              help="Randomness of the answer.")  # fmt: skip
@_routing_options
@click.option("--json", "as_json", is_flag=True, help="Print the whole response as JSON.")
def ask_command(
    text: str,
    model: str,
    url: str,
    max_tokens: int | None,
    temperature: float,
    as_json: bool,
    **routing: str | None,
) -> None:
    """Ask a running service TEXT; the answer goes to stdout, the decision to stderr.

    A service that asks for a key takes it from COLLEGIUM_API_KEY.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": temperature,
        "stream": not as_json,
    }
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    headers = {option_header(name): value for name, value in _checked(routing).items()}
    if key := os.environ.get("COLLEGIUM_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    try:
        _ask(url.rstrip("/") + "/v1/chat/completions", body, headers, as_json)
    except httpx.ConnectError:
        raise click.UsageError(
            f"nothing answers at {url}; start the service with 'collegium serve', or give --url"
        ) from None
    except httpx.HTTPError as error:
        raise click.ClickException(f"{url}: {type(error).__name__}: {error}") from error


def _ask(url: str, body: dict[str, Any], headers: dict[str, str], as_json: bool) -> None:
    timeout = httpx.Timeout(300.0, connect=5.0)
    with httpx.stream("POST", url, json=body, headers=headers, timeout=timeout) as response:
        _show_headers(response.headers)
        if response.status_code != 200:
            response.read()
            raise click.ClickException(_error_message(response))
        if as_json:
            click.echo(response.read().decode())
            return
        for line in response.iter_lines():
            if line.startswith(": "):
                click.secho(line[2:], dim=True, err=True)
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                click.echo()
                raise click.ClickException(event["error"]["message"])
            for choice in event["choices"]:
                click.echo(choice["delta"].get("content") or "", nl=False)
        click.echo()


def _show_headers(headers: httpx.Headers) -> None:
    facts = {n.removeprefix(PREFIX): v for n, v in headers.items() if n.startswith(PREFIX)}
    shown = ("model", "route", "category", "confidence", "path", "cost", "overhead-ms",
             "decision-id")  # fmt: skip
    line = " · ".join(f"{name} {facts[name]}" for name in shown if name in facts)
    if line:
        click.secho(line, fg="cyan", err=True)


def _error_message(response: httpx.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code}: {response.text[:200]}"


@click.command("route")
@click.argument("text")
@click.option("--config", "file", type=click.Path(dir_okay=False),
              help="Config file; the embedded experts' by default.")  # fmt: skip
@click.option("--model", default="auto", show_default=True, help="An expert or a route.")
@_routing_options
@click.option("--explain", is_flag=True, help="Quality, cost and utility of every candidate.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole decision as JSON.")
def route_command(
    text: str,
    file: str | None,
    model: str,
    explain: bool,
    as_json: bool,
    **routing: str | None,
) -> None:
    """Decide who would answer TEXT, here and now: no service is needed."""
    from experts.types import ChatRequest, Message
    from orchestrator.core import Orchestrator, load_routers

    options = RoutingOptions.from_texts(_checked(routing))
    config = load_config(file)
    orchestrator = Orchestrator(config, {}, load_routers(config))
    request = ChatRequest(model=model, messages=[Message(role="user", content=text)])
    try:
        decision = asyncio.run(orchestrator.decide(request, options=options))
    except RequestError as error:
        raise click.UsageError(error.message) from None
    if as_json:
        click.echo(json.dumps(asdict(decision), indent=2))
        return
    click.echo(decision.experts[0])
    if explain:
        for line in _explanation(decision):
            click.echo(line)


def _explanation(decision: Decision) -> list[str]:
    lines = [f"route {decision.route or '-'} · policy {decision.policy}"]
    if decision.category is not None:
        unsure = ", too low: general category used" if decision.fallback else ""
        confidence = (
            "" if decision.confidence is None else f" · confidence {decision.confidence:.3f}"
        )
        lines.append(f"category {decision.category}{confidence}{unsure}")
    lines.append(f"{'expert':<24}{'quality':>9}{'cost in USD':>13}{'utility':>9}")
    for candidate in decision.candidates:
        quality = "-" if candidate.quality is None else f"{candidate.quality:.3f}"
        utility = "-" if candidate.utility is None else f"{candidate.utility:.3f}"
        lines.append(f"{candidate.expert:<24}{quality:>9}{candidate.cost_usd:>13.6f}{utility:>9}")
    lines += [f"{expert:<24}excluded: {why}" for expert, why in decision.excluded.items()]
    return lines
