"""How steadily the embedded experts stream on a small machine, by vLLM's executor on CPUs.

    python -m benchmarks.streaming [--streams 16] [--rounds 5]

Both executors serve the same pool, one after the other, on the machine alone and beside one busy
process per core. While one long answer streams, a one-token answer is asked for. Compare the
columns; absolute times belong to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.overhead import RESULTS, free_port, process
from benchmarks.pages import command_line, write
from orchestrator.config import load_config

EXECUTORS = {"uni": "model in the engine's process (ours)", "mp": "model in a worker (Ray's)"}
TOKENS = 48
CONCURRENCIES = (1, 8, 16)
QUESTION = "Count from one to one hundred in words, and name each number."


async def stream_times(session: aiohttp.ClientSession, url: str, tokens: int) -> list[float]:
    """Seconds from the request to each piece of one streamed answer."""
    body = {
        "model": "general",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    started, times = time.perf_counter(), []
    async with session.post(url, json=body) as response:
        response.raise_for_status()
        async for _ in response.content.iter_any():
            times.append(time.perf_counter() - started)
    return times


async def steadiness(url: str, streams: int) -> dict[str, float]:
    """When pieces of streams come, in seconds."""
    first, gaps, short = [], [], []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        await stream_times(session, url, TOKENS)
        for number in range(streams):
            long = asyncio.create_task(stream_times(session, url, TOKENS))
            # Not after the first piece of the long answer: that is what may come late.
            await asyncio.sleep(0.5)
            short.append((await stream_times(session, url, 1))[-1])
            times = await long
            first.append(times[0])
            gaps.append(max(np.diff(times), default=times[-1]))
            print(f"stream {number + 1} of {streams}", file=sys.stderr)
    figures: dict[str, float] = {}
    for name, seconds in (("first_piece", first), ("longest_gap", gaps), ("short_answer", short)):
        for share in (50, 90, 100):
            figures[f"{name}_p{share}_s"] = float(np.percentile(seconds, share))
    return figures


async def throughput(url: str, rounds: int) -> dict[str, float]:
    """Tokens per second of all streams together, the median over rounds, by concurrency."""
    rates: dict[int, list[float]] = {concurrency: [] for concurrency in CONCURRENCIES}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        for _ in range(rounds):
            for concurrency, measured in rates.items():
                started = time.perf_counter()
                streams = (stream_times(session, url, TOKENS) for _ in range(concurrency))
                await asyncio.gather(*streams)
                measured.append(TOKENS * concurrency / (time.perf_counter() - started))
    return {f"tokens_per_s_{c}": statistics.median(measured) for c, measured in rates.items()}


@contextmanager
def busy_cores() -> Iterator[None]:
    """One process per core that never rests, until the block ends."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(executor: str, streams: int, rounds: int) -> dict[str, float]:
    """Serve the embedded pool with one executor and measure it."""
    config = load_config().model_dump(mode="json", by_alias=True)
    config["experts"][0]["engine_kwargs"]["distributed_executor_backend"] = executor
    config["server"]["port"], config["ray"]["dashboard_port"] = free_port(), free_port()
    server = f"http://127.0.0.1:{config['server']['port']}"
    url = f"{server}/v1/chat/completions"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(config, file)  # JSON is YAML
        file.flush()
        command = [sys.executable, "-m", "orchestrator.cli", "serve", "--config", file.name]
        with process(command, f"{server}/health") as service:
            figures = asyncio.run(steadiness(url, streams))
            with busy_cores():
                busy = asyncio.run(steadiness(url, streams))
            figures |= {f"busy_{name}": value for name, value in busy.items()}
            figures |= asyncio.run(throughput(url, rounds))
            parent = psutil.Process(service.pid)
            family = [parent, *parent.children(recursive=True)]
            memory = sum(member.memory_full_info().pss for member in family) / 2**30
    return {**figures, "memory_gib": memory}


def report(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    figures = result["figures"]
    lines = [
        "# Streams of the embedded experts",
        "",
        f"`{result['command']}`, {result['machine']}: {result['streams']} streams of {TOKENS} "
        "tokens, a one-token answer beside each; `busy` is beside one busy process per core. "
        "Compare columns, not absolutes.",
        "",
        "| | " + " | ".join(EXECUTORS[name] for name in figures) + " | ratio |",
        "|---|" + "--:|" * (len(figures) + 1),
    ]
    ours, other = figures["uni"], figures["mp"]
    for name in ours:
        label = name.replace("_p100", " max").replace("_", " ")
        ratio = ours[name] / other[name]
        lines.append(f"| {label} | {ours[name]:.2f} | {other[name]:.2f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark and write ``docs/results/streaming.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="of the throughput")
    arguments = parser.parse_args()
    figures = {name: run(name, arguments.streams, arguments.rounds) for name in EXECUTORS}
    result = {
        "command": command_line(),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "streams": arguments.streams,
        "figures": figures,
    }
    page = report(result)
    write(RESULTS / "streaming", page, result)
    print(page)


if __name__ == "__main__":
    main()
