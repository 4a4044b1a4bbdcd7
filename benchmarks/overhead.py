"""What Collegium adds to a request, beside a bare Ray Serve hop and the LiteLLM proxy, in one run.

    make bench          (or: python -m benchmarks.overhead [--litellm VENV] [--rounds 3])

All systems run at the same time on this machine and forward to the same scripted upstream; they
are loaded one after the other, in rounds, so that a machine whose speed drifts slows all alike.
Compare rows and ratios; absolute times belong to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import measure
from benchmarks.pages import command_line, write
from orchestrator.config import CollegiumConfig, parse_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
CONCURRENCIES = (1, 8, 32)
TABLE_HEAD = (
    "| system | c | p50 ms | p99 ms | first chunk p50 ms | requests/s | added p50 ms | errors |"
)
# What a process is called in the table of CPU times, by a part of its command line.
PROCESSES = {
    "me": "load generator",
    "benchmarks.upstream": "upstream",
    "haproxy": "HAProxy",
    "ServeReplica:collegium:ingress": "ingress",
}
OTHERS = "rest of Ray"
CPU_NOTE = (
    "Plain requests, concurrency 8. Where all cores are busy, the p50 is about the sum over the "
    "processes, divided by the cores, times 8."
)
EXPERTS = ("general", "maths", "intents", "docstrings", "extract")


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], ready_url: str, **kwargs: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a session of its own, as from another terminal, until the block ends."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd=ROOT, **kwargs
        )
        try:
            for _ in range(240):
                if child.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{command[0]} ended early:\n{log.read().decode()[-2000:]}")
                try:
                    urllib.request.urlopen(ready_url, timeout=2).read()
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                sys.exit(f"{command[0]} did not become ready")
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait(timeout=60)


def collegium_config(upstream_port: int, port: int, dashboard_port: int) -> CollegiumConfig:
    """Collegium before the upstream, with the shipped router choosing among five experts."""
    upstream = f"http://127.0.0.1:{upstream_port}/v1"
    entries: list[dict[str, Any]] = [
        {"name": name, "engine": "openai", "base_url": upstream, "model": "upstream"}
        for name in EXPERTS
    ]
    entries.append({**entries[0], "name": "hop", "deployment": {"max_ongoing_requests": 128}})
    entries.append({"name": "scripted", "engine": "scripted"})
    return parse_config(
        {
            "experts": entries,
            "routers": {"coe": {"type": "artefact", "path": "package:routers/embedded/auto"}},
            "routes": {"auto": {"router": "coe", "experts": list(EXPERTS)}},
            "server": {"port": port},
            "ray": {"dashboard_port": dashboard_port},
        }
    )


def bare_application(upstream_port: int) -> Any:
    """The least a Ray Serve user would write: a FastAPI ingress and one deployment behind it."""
    from ray import serve

    from benchmarks.bare_serve import BareIngress, Forwarder

    forwarder = serve.deployment(
        Forwarder,
        name="bare-forwarder",
        max_ongoing_requests=128,
        ray_actor_options={"num_cpus": 0},
    ).bind(f"http://127.0.0.1:{upstream_port}/v1/chat/completions")
    ingress = serve.deployment(
        serve.ingress()(BareIngress),
        name="bare-ingress",
        max_ongoing_requests=512,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(forwarder)


@contextmanager
def litellm(venv: Path, upstream_port: int) -> Iterator[str]:
    """The LiteLLM proxy before the upstream."""
    port = free_port()
    config = {
        "model_list": [
            {
                "model_name": "upstream",
                "litellm_params": {
                    "model": "openai/upstream",
                    "api_base": f"http://127.0.0.1:{upstream_port}/v1",
                    "api_key": "none",
                },
            }
        ],
        "litellm_settings": {"telemetry": False},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(config))
        command = [str(venv / "bin" / "litellm"), "--config", str(file), "--port", str(port),
                   "--host", "127.0.0.1", "--telemetry", "False"]  # fmt: skip
        env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR",
               "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}  # fmt: skip
        with process(command, f"http://127.0.0.1:{port}/health/liveliness", env=env):
            yield f"http://127.0.0.1:{port}/v1/chat/completions"


def prompts(count: int) -> list[str]:
    """Different questions of the shipped tasks, so that no cache answers for the encoder."""
    from evals.tasks import get_task, task_names

    texts = [s.text for name in task_names() for s in get_task(name).samples("test")]
    random.Random(0).shuffle(texts)
    return [f"{texts[i % len(texts)]} ({i})" for i in range(count)]


async def run_rounds(
    systems: dict[str, tuple[str, str]], rounds: int, requests: dict[int, int]
) -> dict[str, list[dict[str, float]]]:
    """Load each system in turn.

    Args:
        systems: Name to (URL, model).
        rounds: How many times.
        requests: Concurrency to the number of requests per round.

    Returns:
        ``"system/mode/concurrency"`` to one row per round.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    serial = 0
    for number in range(rounds + 1):
        for mode in ("plain", "stream"):
            for concurrency, count in requests.items():
                for name, (url, model) in systems.items():
                    many = max(concurrency, count // 8) if number == 0 else count
                    texts = prompts(many)
                    bodies = [_body(model, f"{text} {serial}", mode) for text in texts]
                    serial += 1
                    sample = await measure(url, bodies, concurrency=concurrency)
                    if number:  # the first round warms up
                        rows.setdefault(f"{name}/{mode}/{concurrency}", []).append(sample.row())
        print(f"round {number} of {rounds} done", file=sys.stderr)
    return rows


def _body(model: str, text: str, mode: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
    if mode == "stream":
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def medians(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The median over rounds of each figure."""
    return {
        key: {name: statistics.median(row[name] for row in many) for name in many[0]}
        for key, many in rows.items()
    }


def cpu_per_request(
    systems: dict[str, tuple[str, str]], requests: int = 600, concurrency: int = 8
) -> dict[str, dict[str, float]]:
    """CPU time in ms that each process spends on one plain request, by system and process."""
    result = {}
    for name in ("collegium, fixed expert", "collegium, routed"):
        url, model = systems[name]
        bodies = [_body(model, f"{text} cpu {name}", "plain") for text in prompts(requests)]
        me = psutil.Process()
        before = {process: _cpu_s(process) for process in [me, *me.children(recursive=True)]}
        asyncio.run(measure(url, bodies, concurrency=concurrency))
        spent: dict[str, float] = dict.fromkeys([*dict.fromkeys(PROCESSES.values()), OTHERS], 0.0)
        for process, earlier in before.items():
            with suppress(psutil.NoSuchProcess):
                spent[_role(process, me)] += (_cpu_s(process) - earlier) / requests * 1000
        result[name] = spent
    return result


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _role(process: psutil.Process, me: psutil.Process) -> str:
    if process == me:
        return PROCESSES["me"]
    command = " ".join(process.cmdline())
    return next((role for part, role in PROCESSES.items() if part in command), OTHERS)


def embedding_ms(count: int = 200) -> float:
    """Median time of one prediction of the shipped router alone, in ms."""
    from routers.base import Query
    from routers.registry import load_router

    router = load_router(ROOT / "routers" / "embedded" / "auto")
    times = []
    for text in prompts(count):
        started = time.perf_counter()
        router.predict([Query(text + " alone")], list(EXPERTS))
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def report(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    figures, systems = result["figures"], result["systems"]
    lines = [
        "# Overhead",
        "",
        f"`{result['command']}`, {result['machine']}, {result['rounds']} rounds, medians over "
        "rounds. Upstream: answers at once, or streams 50 chunks. Compare rows, not absolutes.",
    ]
    for mode in ("plain", "stream"):
        lines += ["", f"## {mode}", "", TABLE_HEAD, "|---" + "|--:" * 7 + "|"]
        for concurrency in CONCURRENCIES:
            base = figures[f"upstream/{mode}/{concurrency}"]["p50_ms"]
            for name in systems:
                row = figures[f"{name}/{mode}/{concurrency}"]
                lines.append(
                    f"| {name} | {concurrency} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} | "
                    f"{row['first_chunk_p50_ms']:.1f} | {row['requests_per_s']:.0f} | "
                    f"{row['p50_ms'] - base:.1f} | {row['errors']:.0f} |"
                )
    lines += ["", "## CPU time per request", "", CPU_NOTE, ""]
    lines += ["| process | fixed expert, ms | routed, ms |", "|---|--:|--:|"]
    fixed, routed = result["cpu_ms_per_request"].values()
    lines += [f"| {role} | {fixed[role]:.2f} | {routed[role]:.2f} |" for role in fixed]
    if "LiteLLM" in systems:
        lines += ["", "## Ratios to LiteLLM", "", *_ratio_table(figures, systems)]
    lines += ["", "## Goals", ""]
    lines += [f"- {line}" for line in result["ratios"]]
    return "\n".join(lines) + "\n"


def _ratio_table(figures: dict[str, dict[str, float]], systems: list[str]) -> list[str]:
    columns = {"p50_ms": "p50", "p99_ms": "p99", "first_chunk_p50_ms": "first chunk p50",
               "requests_per_s": "requests/s"}  # fmt: skip
    head = " | ".join(columns.values())
    lines = [f"| system | mode | c | {head} |", "|---|---|" + "--:|" * (1 + len(columns))]
    for name in systems:
        if name in ("upstream", "LiteLLM"):
            continue
        for mode in ("plain", "stream"):
            for concurrency in CONCURRENCIES:
                ours = figures[f"{name}/{mode}/{concurrency}"]
                other = figures[f"LiteLLM/{mode}/{concurrency}"]
                cells = " | ".join(f"{ours[key] / other[key]:.2f}" for key in columns)
                lines.append(f"| {name} | {mode} | {concurrency} | {cells} |")
    return lines


def ratios(figures: dict[str, dict[str, float]], embedding: float) -> list[str]:
    """The ratios that the goals are about."""

    def added(system: str, concurrency: int) -> float:
        base = figures[f"upstream/plain/{concurrency}"]["p50_ms"]
        return figures[f"{system}/plain/{concurrency}"]["p50_ms"] - base

    lines = [f"one prediction of the router alone, single thread: {embedding:.2f} ms"]
    for concurrency in CONCURRENCIES:
        ours = added("collegium, routed", concurrency)
        bare = added("bare Ray Serve, one hop", concurrency)
        lines.append(f"concurrency {concurrency}: Collegium routed adds {ours:.1f} ms")
        if f"LiteLLM/plain/{concurrency}" in figures:
            other = added("LiteLLM", concurrency)
            lines[-1] += f", {ours / other:.2f} x LiteLLM's {other:.1f} ms (goal at c=8: 0.25)"
        # While a core embeds one query the others wait: each of them pays for its share.
        cores = min(os.cpu_count() or 1, concurrency)
        allowed = bare + embedding * concurrency / cores
        lines[-1] += (
            f"; {ours / allowed:.2f} x (bare hop {bare:.1f} ms + embedding) (goal at c=8: 1.5)"
        )
    return lines


def main() -> None:
    """Run the benchmark and write ``docs/results/overhead.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--litellm", type=Path, help="virtual environment with the LiteLLM proxy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=400, help="per round at concurrency 8")
    arguments = parser.parse_args()
    from deployments.local import running_service

    upstream_port, port, dashboard_port = free_port(), free_port(), free_port()
    upstream = f"http://127.0.0.1:{upstream_port}/v1/chat/completions"
    with ExitStack() as stack:
        stack.enter_context(
            process([sys.executable, "-m", "benchmarks.upstream", str(upstream_port)], upstream)
        )
        systems = {"upstream": (upstream, "upstream")}
        if arguments.litellm:
            url = stack.enter_context(litellm(arguments.litellm, upstream_port))
            systems["LiteLLM"] = (url, "upstream")
        config = collegium_config(upstream_port, port, dashboard_port)
        stack.enter_context(running_service(config, say=lambda line: print(line, file=sys.stderr)))
        from ray import serve

        serve.run(bare_application(upstream_port), name="bare", route_prefix="/bare")
        ours = f"http://127.0.0.1:{port}/v1/chat/completions"
        systems["bare Ray Serve, one hop"] = (f"http://127.0.0.1:{port}/bare/chat", "upstream")
        systems["collegium, fixed expert"] = (ours, "general")
        systems["collegium, routed"] = (ours, "auto")
        systems["collegium, fixed expert, one hop"] = (ours, "hop")
        systems["collegium, fixed expert, one hop, no upstream"] = (ours, "scripted")
        counts = {1: arguments.requests // 4, 8: arguments.requests, 32: arguments.requests}
        rows = asyncio.run(run_rounds(systems, arguments.rounds, counts))
        cpu = cpu_per_request(systems)
    figures, embedding = medians(rows), embedding_ms()
    result = {
        "command": command_line(),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "rounds": arguments.rounds,
        "systems": list(systems),
        "figures": figures,
        "ratios": ratios(figures, embedding),
        "embedding_ms": embedding,
        "cpu_ms_per_request": cpu,
    }
    page = report(result)
    write(RESULTS / "overhead", page, result)
    print(page)


if __name__ == "__main__":
    main()
